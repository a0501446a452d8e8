"""Settings of jobs: YAML files, single options on top of them, and transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import json
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from nblora.checkpoints import PathLike, atomic_file


class SettingsError(ValueError):
    """Settings that cannot be used; the message is one line."""


_MERGE = "tag:yaml.org,2002:merge"


def _name(key: yaml.Node) -> object:
    """What tells a mapping's keys apart."""
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, `save_strategy: no` is a name, 2026-01-31 and 007 are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:  # of which PyYAML would silently take the last
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} must be given once, got it again", problem_mark=key.start_mark
                    )
                names.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<): a mapping's own names win, then the first source's, also of merges of merges.

        PyYAML 6.0.4 compares names by the identity of their strings, so that there a grandparent may win.
        """
        sources: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _MERGE:
                sources += value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(source, yaml.MappingNode) for source in sources):
            super().flatten_mapping(node)  # says what is wrong, and where
        pairs = {_name(pair[0]): pair for pair in node.value if pair[0].tag != _MERGE}
        for source in sources:
            self.flatten_mapping(source)
            for pair in source.value:
                pairs.setdefault(_name(pair[0]), pair)
        node.value = list(pairs.values())


class _Dumper(yaml.SafeDumper):
    """Text that looks like something else to the loader, or to a YAML 1.1 one, in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = (
    r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9]\d*|0x[0-9a-fA-F]+)", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", r"<<", "<"),
):
    _resolver = f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)


def read_yaml(path: PathLike) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingsError: if it cannot be read, parsed or is no mapping.
    """
    try:
        value = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} must be a readable YAML file: {error}") from error
    except SettingsError as error:
        raise SettingsError(f"{path} must be YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{path} must map names to values, got {type(value).__name__}")
    strange = [key for key in value if not isinstance(key, str)]
    if strange:
        raise SettingsError(f"{path} must map names to values, got {strange[0]!r} in place of a name")
    return value


def parse_yaml(text: str) -> Any:
    """One value in YAML: 8, 1e-3, frobenius, [a, b], {a: 1}."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{error.problem or error.context}{where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(_one_line(error)) from error


def write_yaml(path: PathLike, value: Mapping[str, Any]) -> None:
    """Write a mapping of plain values; the file is whole or not there.

    Raises:
        SettingsError: for a value that YAML cannot hold.
    """
    try:
        text = yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise SettingsError(f"settings must be plain values: {_one_line(error)}") from error
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


def dotted_options(arguments: Iterable[str], groups: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options such as `--train.learning_rate 1e-3` or `--load.dtype=bfloat16`, as a mapping for each group.

    An option without a value is True; several values make a list; values are YAML.

    Raises:
        SettingsError: for anything else.
    """
    groups = tuple(groups)
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    option, values = "", None
    for argument in arguments:
        match = re.fullmatch(r"--(\w+)\.([\w-]+)(?:=(.*))?", argument, re.DOTALL)
        if match and match[1] in groups:
            values = found[match[1]][match[2].replace("-", "_")] = []
            option = f"--{match[1]}.{match[2]}"
            if match[3] is not None:
                values.append(_option_value(option, match[3]))
        elif argument.startswith("--") or values is None:
            allowed = ", ".join(f"--{group}.NAME VALUE" for group in groups)
            raise SettingsError(f"further options must be {allowed}, got {argument!r}")
        else:
            values.append(_option_value(option, argument))
    return {
        group: {name: _single(values) for name, values in options.items()} for group, options in found.items()
    }


def _option_value(option: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except SettingsError as error:
        raise SettingsError(f"the value of {option} must be YAML, got {text!r}: {error}") from error


def _single(values: list[Any]) -> Any:
    return True if not values else values[0] if len(values) == 1 else values


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one; where both have a mapping, merged one level deep, else the upper wins."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths as text in place of relative ones that exist.

    `{seed}` in a path stands for numbers, so that a path with any number there counts as one that exists.
    """
    return {
        name: _absolute(os.fspath(value))
        if name in ("model", "data", "keep") and isinstance(value, (str, os.PathLike))
        else value
        for name, value in settings.items()
    }


def _absolute(path: str) -> str:
    pattern = "*".join(map(glob.escape, path.split("{seed}")))
    return str(Path(path).absolute()) if glob.glob(pattern) else path


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse unknown names, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"{what} must be one of {', '.join(known)}, got {name!r}{hint}")


def training_arguments(values: Mapping[str, Any], output_dir: PathLike) -> TrainingArguments:
    """TrainingArguments of the given fields, with the types that transformers' own parser gives them.

    Args:
        values: by field name; None stands for transformers' default.
        output_dir: where checkpoints go.

    Raises:
        SettingsError: for a field or a value that transformers refuses.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in values:
        if name == "output_dir":
            raise SettingsError("train.output_dir is set by the job: use --out")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"train.{name} is no field of transformers' TrainingArguments{hint}")
    command = [f"--output_dir={os.fspath(output_dir)}"]
    direct: dict[str, Any] = {}  # values that the parser would know as text only
    try:
        for name, value in values.items():
            kinds = _kinds(name)
            dataclass: Any = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
            if value is None:
                continue
            if isinstance(value, float) and math.isnan(value):
                raise SettingsError(f"train.{name} must be a number, got {value}")
            if isinstance(value, (list, tuple)) and list not in kinds:
                raise SettingsError(f"train.{name} must be a single value, got {value!r}")
            if type(value) in kinds & {bool, list, dict} or (isinstance(value, str) and {str, bool} <= kinds):
                direct[name] = value
            elif isinstance(value, Mapping) and dataclass is not None:
                direct[name] = dataclass(**value)
            elif isinstance(value, Mapping):
                command.append(f"--{name}={json.dumps(dict(value))}")
            elif isinstance(value, (list, tuple)):
                command.extend([f"--{name}", *map(str, value)])
            elif isinstance(value, float) and value.is_integer() and int in kinds:
                command.append(f"--{name}={int(value)}")  # 1e3 steps
            else:
                command.append(f"--{name}={value}")
        parsed = vars(_argument_parser().parse_args(command))
        return TrainingArguments(**{**parsed, **direct})
    except SettingsError:
        raise
    except Exception as error:  # whatever transformers refuses it with
        raise SettingsError(f"the training arguments must suit transformers: {_one_line(error)}") from error


def _kinds(name: str) -> set[Any]:
    """The types that a field of TrainingArguments may have."""
    hint = get_type_hints(TrainingArguments)[name]
    union = get_origin(hint) in (Union, types.UnionType)
    kinds = {get_origin(kind) or kind for kind in (get_args(hint) if union else (hint,))}
    return kinds | {bool} if name == "fsdp" else kinds  # its documented value is not in its type


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.lru_cache(maxsize=1)
def _argument_parser() -> HfArgumentParser:
    parser = HfArgumentParser(TrainingArguments, prog="train", add_help=False)

    def refuse(message: str) -> NoReturn:  # argparse would end the process
        field = re.match(r"argument --(\w+)\S*: ", message)
        which = f"train.{field[1]}" if field else "the training arguments"
        rule = message[field.end() :] if field else message
        raise SettingsError(f"{which} must suit transformers: {_one_line(rule)}")

    parser.error = refuse
    return parser
