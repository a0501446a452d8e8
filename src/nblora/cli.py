"""The command line: each command is one call of a public function, with its result printed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import nblora

app = typer.Typer(
    name="nblora",
    help="Norm-bounded low-rank adaptation: fine-tuning whose updates cannot grow too large.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

UNREADABLE = 2  # exit status for input that cannot be read, as for wrong options
BROKEN = 1  # exit status for a broken bound


def _version(value: bool) -> None:
    if value:
        typer.echo(f"nblora {nblora.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def certify(
    path: Annotated[
        str,
        typer.Argument(
            help="A saved NB-LoRA adapter, or a plain LoRA that `nblora export` wrote: a folder or a hub "
            "repository."
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Measure every update of an adapter against its bound.

    Exit status: 0 if every bound holds, 1 if one is broken, 2 if the adapter can't be read.
    """
    with _one_line_errors():
        certificate = nblora.certify(path)
    if json:
        typer.echo(certificate.to_json())
    else:
        heading, *rows = certificate.rows()
        table = Table(title=f"Certificate of {path}", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column(heading[0], overflow="fold")
        for name in heading[1:]:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*row, style=None if row[-1] == "yes" else "bold red")
        console = Console()
        console.print(table)
        console.print(certificate.summary, style="green" if certificate.holds else "bold red")
    raise typer.Exit(0 if certificate.holds else BROKEN)


@app.command()
def export(
    path: Annotated[str, typer.Argument(help="A saved NB-LoRA adapter: a folder or a hub repository.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the plain LoRA to.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or float64; the bound holds after rounding.")
    ] = "float32",
) -> None:
    """Write an NB-LoRA adapter as a plain LoRA, exactly, for PEFT and serving engines."""
    with _one_line_errors():
        nblora.export_lora(path, out, dtype=dtype)
        certificate = nblora.certify(out)
    typer.echo(f"Wrote a plain LoRA in {dtype} to {out}. {certificate.summary}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("nblora-demo"),
    seed: Annotated[int, typer.Option(help="Of the data split and all training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of every adaptation.")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="Of both methods.")] = 8,
    bound: Annotated[
        float, typer.Option(help="On the Frobenius norm of every update, times the weight's spectral norm.")
    ] = 0.566,
) -> None:
    """Adapt a small vision transformer to rotated digits with LoRA and NB-LoRA: two minutes on two cores.

    Prints a table and writes the adapter, its certificate, a plain-LoRA export and a figure.
    """
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"The demo needs {' and '.join(missing)}: pip install 'nblora[demo]'")
    import transformers

    from nblora.demo import Recipe, run_demo, training_steps

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # PEFT 0.21 asks transformers 5 for a property by its old name
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
    recipe = Recipe(seed=seed, epochs=epochs, rank=rank, bound=bound)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with _one_line_errors(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Training", total=training_steps(recipe))
        result = run_demo(out, recipe, advance=lambda: progress.advance(task))
    table = Table(
        "learning rate",
        "method",
        "target accuracy",
        "source accuracy kept",
        "largest ‖ΔW‖_F/‖W0‖₂",
        "bound",
        title="Digits rotated by 90° (target) after upright digits (source)",
        caption=f"before: target {result.target_before:.1%}, source {result.source_before:.1%}; "
        "* chosen on target validation",
    )
    for run in result.runs:
        table.add_row(
            f"{run.learning_rate:g}{' *' if run is result.chosen(run.method) else ''}",
            run.method,
            f"{run.target:.1%}",
            f"{run.source:.1%}",
            f"{run.update:.3f}",
            "none" if run.bound is None else f"{run.bound:g}",
        )
    console.print(table)
    console.print(
        f"Wrote to {out}: adapter/, its certificate.json, lora/ (a plain LoRA for PEFT), tradeoff.png, "
        "results.json",
        highlight=False,
    )


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn errors about the user's input into one line on standard error and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"nblora: {message}", err=True)
    raise typer.Exit(UNREADABLE)
