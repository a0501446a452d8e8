"""Writing one HTML file that is complete in itself.

Plotly's script is written into it once, and a content security policy forbids everything else: no other
script runs, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nblora
from nblora.certificate import finite
from nblora.checkpoints import PathLike, atomic_file
from nblora.reporting.looks import HEAT, PALETTE

TASKS = {
    "causal-lm": ("language modelling", "AutoModelForCausalLM"),
    "seq-cls": ("classification of text", "AutoModelForSequenceClassification"),
    "token-cls": ("classification of tokens", "AutoModelForTokenClassification"),
    "seq2seq": ("text to text", "AutoModelForSeq2SeqLM"),
    "image-cls": ("classification of images", "AutoModelForImageClassification"),
}


@dataclass(frozen=True)
class Snippet:
    """Text to copy."""

    title: str
    code: str


def reproducing_snippets(content: Mapping[str, Any], otherwise: str | None) -> list[Snippet]:
    """The command and the configuration of a run, where they are known."""
    snippets = []
    command = content.get("command") or otherwise
    if command:
        words = command if isinstance(command, str) else shlex.join(map(str, command))
        snippets.append(Snippet("Command", words))
    config = content.get("config")
    if config:
        words = config if isinstance(config, str) else _yaml(config)
        snippets.append(Snippet("Configuration (YAML)", words))
    return snippets


def _yaml(value: Any) -> str:
    """As a configuration file has it, lists of plain values in one line."""
    import yaml

    text: str = yaml.safe_dump(
        finite(value), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text.rstrip()


def require_libraries() -> None:
    """Raise now what writing a report would raise for want of a library.

    Raises:
        ImportError: without plotly or jinja2.
    """
    try:
        for name in ("jinja2", "plotly.offline"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError("reports need plotly and jinja2: pip install 'nblora[train]'") from error


def write_page(out: PathLike, template: str, **content: Any) -> Path:
    """Fill a template and write it, whole or not at all."""
    require_libraries()
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nblora"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def asset(name: str) -> str:
        assert environment.loader is not None
        return environment.loader.get_source(environment, name)[0]

    # a browser reads line ends as \n, and the policy below holds the hash of what it reads
    scripts = [script.replace("\r\n", "\n") for script in (get_plotlyjs(), asset("report.js"))]
    text = environment.get_template(template).render(
        version=nblora.__version__,
        palette=PALETTE,
        heat=HEAT,
        css=Markup(asset("report.css")),
        plotly_js=Markup(scripts[0]),
        report_js=Markup(scripts[1]),
        script_hashes=Markup(" ".join(_policy_hash(script) for script in scripts)),
        **content,
    )
    with atomic_file(out) as file:
        file.write_text(text, encoding="utf-8", newline="\n")
    return Path(out)


def _policy_hash(script: str) -> str:
    """How a content security policy names the one script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
