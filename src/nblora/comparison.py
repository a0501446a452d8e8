"""Methods x learning rates x ranks x epochs x bounds x seeds on a user's task.

`compare` runs what of a grid is not there yet, and summarises all of it. A run that fails or diverges
is a data point. The summary is a pure function of the runs, `summarise`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import numbers
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import nblora
from nblora.certificate import finite
from nblora.checkpoints import PathLike, atomic_file
from nblora.executors import Executor, LocalExecutor
from nblora.methods import Method, find_method
from nblora.settings import SettingsError, check_names, portable, write_yaml
from nblora.summary import RUN_FIELDS, hypervolume_corner, summarise_method, worst_scores

DEFAULT_ARGUMENTS: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
}
"""Where a run of a comparison differs from transformers' defaults."""


@dataclass(frozen=True)
class ComparisonConfig:
    """Everything that determines a comparison.

    `{seed}` in `model`, `data` and `keep` stands for the seed of a run.

    Attributes:
        model, task, data, keep, train, load, columns, keep_columns, max_length, max_train_samples,
            max_eval_samples: as in `nblora.training.FinetuneConfig`, the same for every run.
        methods: names (see `nblora.methods.find_method`), or a mapping from names of your own to
            `{method: NAME, label: ..., further fields of its configuration}`. A bound there takes the
            place of the axis.
        learning_rates, ranks, epochs, bounds, seeds: the axes.
        grid: "full": every combination. "star": ranks at the reference's epochs, epochs at the
            reference's rank.
        reference: rank and epochs at which learning rates are tuned; the middle of the axes without it.
        tolerance: within which a score counts as near the best: 0.02 is two points of accuracy, or
            0.02 nats.
        data_seed: of the split of the data.
    """

    model: str
    task: str
    data: str
    keep: str | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    ranks: tuple[int, ...] = (8,)
    epochs: tuple[float, ...] = (3,)
    bounds: tuple[float, ...] = (0.3,)
    seeds: tuple[int, ...] = (0,)
    grid: str = "full"
    reference: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.02
    train: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    keep_columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    data_seed: int = 0

    @staticmethod
    def of(settings: Mapping[str, Any]) -> ComparisonConfig:
        """The configuration in a mapping, such as a YAML file holds.

        Raises:
            SettingsError: for an unknown or missing name or a value of the wrong kind.
        """
        from nblora.training import FinetuneConfig

        check_names(settings, [f.name for f in dataclasses.fields(ComparisonConfig)], "a setting")
        values = dict(settings)
        try:
            json.dumps({name: value for name, value in values.items() if name not in _AXES})
        except (TypeError, ValueError) as error:
            raise SettingsError(f"settings must be text, numbers, lists and mappings: {error}") from error
        shared = {name: value for name, value in values.items() if name in _JOB}
        FinetuneConfig.of(shared)  # its rules hold for every run
        if not isinstance(values.get("keep"), (str, type(None))):
            raise SettingsError(f"keep must be a file, a folder or a hub name, got {values['keep']!r}")
        values["methods"] = _methods(values.get("methods", ["nblora", "lora"]))
        for name, kind in _AXES.items():
            if name in values:
                values[name] = _axis(name, values[name], kind)
        config = ComparisonConfig(**values)
        if config.grid not in ("full", "star"):
            raise SettingsError(f"grid must be 'full' or 'star', got {config.grid!r}")
        for name in ("num_train_epochs", "max_steps", "learning_rate", "seed", "output_dir"):
            if name in config.train:
                raise SettingsError(
                    f"train.{name} is an axis of the comparison or set by it: use --epochs, --learning-rates "
                    "or --seeds"
                )
        _check_arguments(config.train)
        tolerance = config.tolerance
        if not _is_number(tolerance) or not 0 <= tolerance < math.inf:
            raise SettingsError(f"tolerance must be a number >= 0, got {tolerance!r}")
        (data_seed,) = _axis("data_seed", [config.data_seed], int)
        if not isinstance(config.reference, Mapping):
            raise SettingsError(f"reference must map rank and epochs to values, got {config.reference!r}")
        reference = {
            "rank": config.ranks[len(config.ranks) // 2],
            "epochs": config.epochs[len(config.epochs) // 2],
            **config.reference,
        }
        check_names(reference, ["rank", "epochs"], "a setting of the reference")
        for name, axis in (("rank", config.ranks), ("epochs", config.epochs)):
            if reference[name] not in axis:
                raise SettingsError(f"the reference's {name} must be one of {axis}, got {reference[name]!r}")
        return dataclasses.replace(config, reference=reference, data_seed=data_seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML can hold and `of` reads, without those that are empty."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {name: value for name, value in values.items() if value not in (None, {}, [])}

    def shared(self, seed: int) -> dict[str, Any]:
        """What all runs of a seed have in common."""
        shared = {name: getattr(self, name) for name in (*_JOB, "data_seed")}
        for name in ("model", "data", "keep"):
            if shared[name] is not None:
                shared[name] = shared[name].replace("{seed}", str(seed))
        return shared

    def job(self, setting: Setting) -> dict[str, Any]:
        """All that determines one run."""
        return {
            **self.shared(setting.seed),
            "setting": dataclasses.asdict(setting),
            "options": dict(self.methods[setting.method]),
        }

    def settings(self) -> list[Setting]:
        """All runs of the grid; an axis that a method does not have has one value for it."""
        found = []
        for seed, name in itertools.product(self.seeds, self.methods):
            method = _method(name, self.methods[name])
            if method.reason is not None:
                continue
            ranks: Sequence[int | None] = self.ranks if method.ranked else (None,)
            bounds: Sequence[float | None] = self.bounds if method.bounded else (None,)
            if method.bounded and "bound" in self.methods[name]:
                bounds = (self.methods[name]["bound"],)
            for rank, epochs, bound, learning_rate in itertools.product(
                ranks, self.epochs, bounds, self.learning_rates
            ):
                on_star = rank in (None, self.reference["rank"]) or epochs == self.reference["epochs"]
                if self.grid == "full" or on_star:
                    found.append(Setting(name, learning_rate, rank, epochs, bound, seed))
        return found


_JOB = (
    "model",
    "task",
    "data",
    "keep",
    "train",
    "load",
    "columns",
    "keep_columns",
    "max_length",
    "max_train_samples",
    "max_eval_samples",
)


_AXES: dict[str, type] = {
    "learning_rates": float,
    "ranks": int,
    "epochs": float,
    "bounds": float,
    "seeds": int,
}
_SEEDS = 2**32  # as many as NumPy has


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _axis(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    single = isinstance(value, (str, Mapping)) or not isinstance(value, Iterable)
    values = []
    for item in [value] if single else value:
        whole = isinstance(item, numbers.Integral) and not isinstance(item, bool)
        if name in ("seeds", "data_seed"):
            rule, allowed = "integers from 0 to 2^32 - 1", whole and 0 <= item < _SEEDS
        elif kind is int:
            rule, allowed = "positive integers", whole and item > 0
        else:
            rule, allowed = "positive numbers", _is_number(item) and 0 < item < math.inf
        if not allowed:
            raise SettingsError(f"{name} must be {rule}, got {item!r}")
        values.append(int(item) if whole else float(item))
    if not values or len(set(values)) != len(values):
        raise SettingsError(f"{name} must have values, each once, got {values}")
    return tuple(sorted(values))


def _check_arguments(train: Mapping[str, Any]) -> None:
    """Refuse what transformers would refuse in every single run."""
    from nblora.settings import training_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training_arguments({**DEFAULT_ARGUMENTS, **train}, "unused")


def _methods(value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        if not all(isinstance(name, str) for name in value):
            raise SettingsError(f"methods must be names or a mapping from names to options, got {value!r}")
        entries: dict[str, dict[str, Any]] = {name: {} for name in value}
        if len(entries) != len(value):
            raise SettingsError(f"methods must be named once each, got {list(value)}")
    elif isinstance(value, Mapping):
        entries = {}
        for name, options in value.items():
            if not isinstance(options, (Mapping, type(None))):
                raise SettingsError(f"options of method {name!r} must map names to values, got {options!r}")
            entries[str(name)] = dict(options or {})
    else:
        raise SettingsError(f"methods must be names or a mapping from names to options, got {value!r}")
    if not entries:
        raise SettingsError("methods must have at least one, got none")
    for name, options in entries.items():
        if not re.fullmatch(r"[\w.+-]([\w .+-]{0,58}[\w.+-])?", name):  # names of files
            raise SettingsError(
                "a method's name must be of at most 60 letters, digits, spaces and . _ + - (its label may be "
                f"anything), got {name!r}"
            )
        method = _method(name, options)
        for rank in ("r", "oft_block_size"):
            if rank in options and method.ranked:
                raise SettingsError(f"{rank} of method {name!r} is an axis of the comparison: use ranks")
        if method.reason is None:
            method.config(4, 0.3, _own_options(options))
    return entries


def _method(name: str, options: Mapping[str, Any]) -> Method:
    base = options.get("method", name)
    if not isinstance(base, str):
        raise SettingsError(f"the method of {name!r} must be a name, got {base!r}")
    method = find_method(base)
    label = options.get("label")
    if label is None and name != base:
        label = name
    return method if label is None else dataclasses.replace(method, label=str(label))


def _own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("method", "label")}


@dataclass(frozen=True)
class Setting:
    """One run of a grid.

    Attributes:
        method: the user's name of it.
        learning_rate: peak of the schedule.
        rank: None for a method without one.
        epochs: of training.
        bound: None for a method without one.
        seed: of the start of the adapter and the order of the data.
    """

    method: str
    learning_rate: float
    rank: int | None
    epochs: float
    bound: float | None
    seed: int

    @property
    def key(self) -> str:
        """A name for files that tells the settings apart."""
        parts = [
            self.method,
            *([] if self.rank is None else [f"r{self.rank}"]),
            f"e{_digits(self.epochs)}",
            *([] if self.bound is None else [f"b{_digits(self.bound)}"]),
            f"lr{_digits(self.learning_rate)}",
            f"s{self.seed}",
        ]
        return "_".join(parts)


def _digits(value: float) -> str:
    """As few digits as tell the number from all others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def execute(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one run, whatever happens.

    Args:
        job: from `ComparisonConfig.job`.

    Returns:
        the record of the run: its setting and status, and, where there are any, scores, seconds, memory.
    """
    setting = Setting(**job["setting"])
    record = failed(job, None)
    try:
        record.update(_run(job, setting))
    except Exception as error:  # a failed run is a data point
        reason = " ".join(str(error).split())
        record["error"] = f"{type(error).__name__}: {reason}".rstrip(": ")[:500]
        record["traceback"] = traceback.format_exc()
    return record


def failed(job: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    """The record of a run that has no scores."""
    unknown = ("validation", "target", "kept_validation", "kept", "seconds", "peak_memory_bytes")
    return {
        **job["setting"],
        "status": "failed",
        "error": reason,
        **dict.fromkeys(unknown),
        "job": dict(job),
    }


def _run(job: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import PrinterCallback, set_seed

    from nblora.settings import training_arguments
    from nblora.tasks import load_base_model
    from nblora.training import BoundedTrainer, Meter, adapt

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    method = _method(setting.method, job["options"])
    data = _data_of(job)
    values = {
        **DEFAULT_ARGUMENTS,
        **job["train"],
        "learning_rate": setting.learning_rate,
        "num_train_epochs": setting.epochs,
        "seed": setting.seed,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = training_arguments(values, folder)
        set_seed(setting.seed)
        base = load_base_model(data, job["model"], **job["load"])
        with Meter() as meter:
            config = method.config(setting.rank, setting.bound, _own_options(job["options"]))
            model = adapt(base, config, job["task"])
            trainer = BoundedTrainer(model, base, data, arguments, make_optimizer=method.make_optimizer)
            trainer.remove_callback(PrinterCallback)
            if method.gradient_start:
                trainer.start_at_gradient()
            trainer.train()
        validation, test = trainer.measure("validation"), trainer.measure("test")
    kept_validation, kept = validation["keep"], test["keep"]
    assert validation["target"] is not None
    assert test["target"] is not None
    scores: dict[str, float | None] = {
        "validation": validation["target"]["score"],
        "target": test["target"]["score"],
        "kept_validation": None if kept_validation is None else kept_validation["score"],
        "kept": None if kept is None else kept["score"],
    }
    healthy = all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
    healthy &= all(value is None or math.isfinite(value) for value in scores.values())
    return {
        "status": "done" if healthy else "diverged",
        **scores,
        "seconds": meter.seconds,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "metrics": {"validation": validation, "test": test},
        "metric": data.metric,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _before(job: Mapping[str, Any]) -> dict[str, Any]:
    """Test scores of the base model."""
    from transformers import PrinterCallback, set_seed

    from nblora.settings import training_arguments
    from nblora.tasks import load_base_model
    from nblora.training import BoundedTrainer

    data = _data_of(job)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_seed(job["setting"]["seed"])
        base = load_base_model(data, job["model"], **job["load"])
        arguments = training_arguments({**DEFAULT_ARGUMENTS, **job["train"]}, folder)
        trainer = BoundedTrainer(base.model, base, data, arguments)
        trainer.remove_callback(PrinterCallback)
        measured = trainer.measure("test")
    return {
        "target": measured["target"] and measured["target"]["score"],
        "kept": measured["keep"] and measured["keep"]["score"],
        "metric": data.metric,
        "samples": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
    }


_PREPARED = (*(name for name in _JOB if name not in ("train", "load")), "data_seed")


@functools.lru_cache(maxsize=4)
def _prepared(description: str) -> Any:
    """The data of a job; kept, because many runs share it."""
    from nblora.training import FinetuneConfig

    values = json.loads(description)
    values["seed"] = values.pop("data_seed")
    return FinetuneConfig(**values).prepare()


def _data_of(job: Mapping[str, Any]) -> Any:
    return _prepared(json.dumps({name: job[name] for name in _PREPARED}, sort_keys=True))


def compare(
    settings: Mapping[str, Any] | ComparisonConfig,
    out_dir: PathLike,
    *,
    executor: Executor | None = None,
    retry_failed: bool = False,
    report: bool = True,
    on_run: Callable[[Mapping[str, Any] | None, float], None] | None = None,
) -> dict[str, Any]:
    """Run a comparison, or what of it is not done yet, and write its summary.

    `out_dir` gets `config.yaml`, a file for each run in `runs/`, `before.json` (scores of the base
    model), `comparison.json`, its table as `comparison.csv`, `runs.csv`, `figures/` and `report.html`.
    With the same folder and more methods, learning rates, ranks, epochs, bounds or seeds, only the new
    runs are done.

    Args:
        settings: as in `ComparisonConfig`.
        out_dir: new, or that of the same comparison.
        executor: where runs are done; processes on this machine without it.
        retry_failed: do failed runs again.
        report: whether to write figures and `report.html`, which need matplotlib, plotly and jinja2.
        on_run: called with a record after each run (at first with None) and the share of the work, by
            epochs, that is done.

    Returns:
        the content of `comparison.json`.

    Raises:
        ValueError: for settings, data or a model that cannot be used, or a folder with runs of another
            comparison.
        KeyboardInterrupt: on Ctrl-C; finished runs are kept.
    """
    from nblora.reporting import comparison_figures, comparison_report, comparison_rows, require_libraries

    if report:
        require_libraries()
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("figures need matplotlib: pip install 'nblora[plots]'")
    given = settings.to_dict() if isinstance(settings, ComparisonConfig) else settings
    config = ComparisonConfig.of(portable(given))
    out = Path(out_dir)
    wanted = config.settings()
    jobs = {setting.key: config.job(setting) for setting in wanted}
    if not jobs:
        raise SettingsError(f"methods must have one that can be run, got {', '.join(config.methods)}")
    if len(jobs) != len(wanted):
        raise SettingsError(f"names of methods must make different files, got {', '.join(config.methods)}")
    if out.exists() and not out.is_dir():
        raise SettingsError(f"the folder to write must not be a file, got {out}")
    if (out / "config.yaml").exists() and not ((out / "before.json").exists() or (out / "runs").exists()):
        raise SettingsError(f"the folder to write must be new or that of a comparison, got {out}")
    finished = _finished(config, out, retry_failed)
    before = _all_before(out, jobs)  # also finds bad data before anything is started
    write_yaml(out / "config.yaml", config.to_dict())
    total = math.fsum(setting.epochs for setting in wanted)

    def notify(record: Mapping[str, Any] | None) -> None:
        if on_run is not None:
            on_run(record, math.fsum(finished[key]["epochs"] for key in jobs if key in finished) / total)

    notify(None)
    records = (executor or LocalExecutor()).run([jobs[key] for key in jobs if key not in finished])
    try:
        for record in records:
            key = _setting_of(record).key
            finished[key] = _plain(record)
            _write_json(out / "runs" / f"{key}.json", finished[key])
            notify(finished[key])
    finally:
        if isinstance(records, Generator):
            records.close()  # ends what still runs, also where the caller holds on to the error
    comparison: dict[str, Any] = _plain(summarise(config, [finished[key] for key in jobs], before))
    _write_json(out / "comparison.json", comparison)
    _write_csv(out / "runs.csv", list(RUN_FIELDS), [list(run.values()) for run in comparison["runs"]])
    _write_csv(out / "comparison.csv", *comparison_rows(comparison))
    if report:
        comparison_figures(comparison, out / "figures")
        comparison_report(comparison, out / "report.html")
    return comparison


def _setting_of(record: Mapping[str, Any]) -> Setting:
    return Setting(**{field.name: record[field.name] for field in dataclasses.fields(Setting)})


def _finished(config: ComparisonConfig, out: Path, retry_failed: bool) -> dict[str, dict[str, Any]]:
    """Records of the runs that a folder has, by their setting's key.

    What is no record (of a disk that was full, say) counts as not there: that run is done again.

    Raises:
        SettingsError: if one of them is a run of another comparison.
    """
    found = {}
    for file in sorted((out / "runs").glob("*.json")):
        record = _read_json(file)
        try:
            setting, job = _setting_of(record), record["job"]
            key, there = setting.key, {**job, "options": _without_label(job["options"])}
            status = record["status"]
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        asked = config.shared(setting.seed)
        if setting.method in config.methods:
            asked["options"] = _without_label(config.methods[setting.method])
        for name, value in _plain(asked).items():
            if there.get(name) != value:
                raise SettingsError(
                    f"{out} holds runs of another comparison: {name}={there.get(name)!r} there, "
                    f"got {value!r}; choose another folder"
                )
        if not (retry_failed and status == "failed"):
            found[key] = record
    return found


def _without_label(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the one that changes no result."""
    return {name: value for name, value in options.items() if name != "label"}


def _all_before(out: Path, jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Test scores of the base models, means over those of different seeds."""
    distinct: dict[str, Mapping[str, Any]] = {}
    for job in jobs.values():
        shared = {name: value for name, value in job.items() if name not in ("setting", "options")}
        distinct.setdefault(json.dumps(shared, sort_keys=True), job)
    file = out / "before.json"
    found = _read_json(file)
    known: dict[str, Any] = found if isinstance(found, dict) else {}
    for key, job in distinct.items():
        if key not in known:
            known[key] = _plain(_before(job))
            _write_json(file, known)
    measured = [known[key] for key in distinct]
    return {
        **measured[0],
        **{name: _mean(value[name] for value in measured) for name in ("target", "kept")},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _plain(value: Any) -> Any:
    """The value as it will be read from a file: lists, and None in place of NaN."""
    return json.loads(json.dumps(finite(value), allow_nan=False))


def _read_json(file: Path) -> Any:
    """What a file holds; None if that is not JSON, or there is no file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(finite(value), indent=1, allow_nan=False), encoding="utf-8")


def _write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_file(path) as file, file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([heading, *rows])


def summarise(
    config: ComparisonConfig, records: Sequence[Mapping[str, Any]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """What the runs of a comparison say, as `comparison.json` has it.

    Args:
        config: of the comparison.
        records: of all runs, from `execute`.
        before: test scores of the base model, "target", "kept" and the "metric" that they are in.
    """
    runs = [{name: record.get(name) for name in RUN_FIELDS} for record in records]
    methods = []
    for name, options in config.methods.items():
        method = _method(name, options)
        entry: dict[str, Any] = {
            "method": name,
            "label": method.label,
            "available": method.reason is None,
            "reason": method.reason,
        }
        if method.reason is None:
            own = [run for run in runs if run["method"] == name]
            entry.update(
                summarise_method(
                    own,
                    reference=(
                        config.reference["rank"] if method.ranked else None,
                        config.reference["epochs"],
                    ),
                    worst=worst_scores(runs),
                    tolerance=config.tolerance,
                    corner=hypervolume_corner(before),
                )
            )
        methods.append(entry)
    return {
        "nblora": nblora.__version__,
        **{name: getattr(config, name) for name in ("task", "model", "data", "keep")},
        "metric": before["metric"],
        "before": {name: before[name] for name in ("target", "kept")},
        "samples": before.get("samples"),
        "reference": dict(config.reference),
        "tolerance": config.tolerance,
        "grid": {
            **{
                name: list(getattr(config, name))
                for name in ("learning_rates", "ranks", "epochs", "bounds", "seeds")
            },
            "kind": config.grid,
        },
        "config": config.to_dict(),
        "hypervolume_corner": hypervolume_corner(before),
        "runs": runs,
        "methods": methods,
    }
