"""The fine-tuning job: a user's model and data through transformers' Trainer, with a bound and a record.

`finetune` is the whole job and writes its folder. `adapt` and `BoundedTrainer` are its parts, which
`nblora.comparison` uses for every method.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftConfig, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import nblora
from nblora.callbacks import NBLoraCallback
from nblora.certificate import Certificate, certify, finite
from nblora.checkpoints import PathLike, atomic_file, export_lora
from nblora.settings import (
    SettingsError,
    check_names,
    overlay,
    portable,
    read_yaml,
    training_arguments,
    write_yaml,
)
from nblora.tasks import TASKS, BaseModel, Task, TaskData, load_base_model, prepare
from nblora.tuner import NBLoraConfig, NBLoraLayer, start_at_gradient

DEFAULT_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
}
"""Where a job differs from transformers' defaults."""

_START_SAMPLES = 128
"""How many a start along the gradient looks at."""

_PEFT_TASKS = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "seq-cls": TaskType.SEQ_CLS,
    "token-cls": TaskType.TOKEN_CLS,
}


class Interrupted(Exception):
    """The user asked to stop; the checkpoint to resume from is written."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that determines a fine-tuning job.

    Attributes:
        model: folder or hub repository of the base model.
        task: one of `nblora.tasks.TASKS`.
        data: folder, file or hub data set to learn.
        keep: a data set that stands for what the model must not forget, or None.
        adapter: fields of `NBLoraConfig`.
        train: fields of transformers' TrainingArguments.
        load: arguments of `from_pretrained`, such as dtype.
        columns: role -> column of `data`.
        keep_columns: role -> column of `keep`.
        max_length: in tokens, of a sample.
        max_train_samples: use only so many.
        max_eval_samples: use only so many of every evaluated split.
        seed: of the split of the data, the start of the adapter and the training.
        start: of the adapter; "random", or "gradient" for `nblora.start_at_gradient` with training samples.
    """

    model: str
    task: str
    data: str
    keep: str | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    keep_columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    seed: int = 0
    start: str = "random"

    @staticmethod
    def of(settings: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration in a mapping, such as a YAML file holds.

        Raises:
            SettingsError: for an unknown or missing name or a value of the wrong kind.
        """
        fields = {f.name: f for f in dataclasses.fields(FinetuneConfig)}
        check_names(settings, fields, "a setting")
        for name in ("model", "task", "data"):
            if not isinstance(settings.get(name), str) or not settings[name]:
                raise SettingsError(f"the settings must have a {name}, got {settings.get(name)!r}")
        check_names([settings["task"]], TASKS, "the task")
        for name in ("adapter", "train", "load", "columns", "keep_columns"):
            if not isinstance(settings.get(name, {}), Mapping):
                raise SettingsError(f"{name} must map names to values, got {settings[name]!r}")
        for name in ("max_length", "max_train_samples", "max_eval_samples"):
            value = settings.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} must be an integer >= 1, got {value!r}")
        seed = settings.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise SettingsError(f"seed must be an integer >= 0, got {seed!r}")
        if (start := settings.get("start", "random")) not in ("random", "gradient"):
            raise SettingsError(f'start must be "random" or "gradient", got {start!r}')
        check_names(settings.get("adapter", {}), _adapter_fields(), "a setting of the adapter")
        return FinetuneConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML can hold and `of` reads, without those that are empty."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value not in (None, {})}

    def nblora_config(self) -> NBLoraConfig:
        """The configuration of the adapter; "all-linear" layers unless others are chosen."""
        return NBLoraConfig(**{"target_modules": "all-linear", **self.adapter})

    def prepare(self) -> TaskData:
        """The data, ready for a Trainer."""
        return prepare(
            cast(Task, self.task),  # `of` has checked it
            self.model,
            self.data,
            self.keep,
            columns=self.columns or None,
            keep_columns=self.keep_columns or None,
            max_length=self.max_length,
            seed=self.seed,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
        )

    def load_model(self, data: TaskData) -> BaseModel:
        """The base model, with a head for the target's classes."""
        try:
            return load_base_model(data, self.model, **self.load)
        except (TypeError, AttributeError) as error:
            if not self.load:
                raise
            raise SettingsError(
                f"load must have arguments of from_pretrained, got {dict(self.load)}: {error}"
            ) from error


def _adapter_fields() -> list[str]:
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    return [f.name for f in dataclasses.fields(NBLoraConfig) if f.name not in inherited]


def adapt(base: BaseModel, config: PeftConfig | None, task: str) -> nn.Module:
    """A base model with a PEFT adapter.

    The classification head is never adapted: it is frozen where the model knows the classes already. It
    is trained in full, and saved with the adapter, where it starts at random, and so is any other module
    that does, such as the pooler of a language model that gets its first head.

    Args:
        base: from `nblora.tasks.load_base_model`; its model is changed in place.
        config: of any PEFT method; None trains the whole model.
        task: one of `nblora.tasks.TASKS`.
    """
    model: nn.Module = base.model
    if config is None:
        return model
    config.task_type = None  # PEFT would train a head of a usual name even where it is not new
    if base.head is not None and config.target_modules == "all-linear":
        excluded = config.exclude_modules or []
        names = [excluded] if isinstance(excluded, str) else list(excluded)
        config.exclude_modules = {*names, base.head}
    if base.untrained:
        excluded = config.exclude_modules or []
        if not isinstance(excluded, str):
            config.exclude_modules = {*excluded, *base.untrained}
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *base.untrained]))
    model = get_peft_model(model, config)
    if base.head is None or base.head in base.untrained:
        # what PEFT loads the adapter as; set late for the reason above
        config.task_type = _PEFT_TASKS.get(task)
    return model


class BoundedTrainer(Trainer):
    """transformers' Trainer on a `TaskData`, whose kept data is evaluated with the model's own head.

    Args:
        base: the base model that `model` was made of.
        data: what to train and evaluate on.
        make_optimizer: from the model and the training arguments; transformers' choice without it.
    """

    def __init__(
        self,
        model: nn.Module,
        base: BaseModel,
        data: TaskData,
        arguments: TrainingArguments,
        *,
        make_optimizer: Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        arguments.label_names = ["labels"]
        if arguments.log_level_replica == "warning":
            arguments.log_level_replica = "error"  # transformers' default; the first process speaks for all
        arguments.remove_unused_columns = False  # the data hold model inputs only
        evaluated = {"target": data.validation}
        if data.keep_validation is not None:
            evaluated["keep"] = data.keep_validation
        self._base, self._data, self._make_optimizer = base, data, make_optimizer
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=evaluated,
            data_collator=data.collator,
            processing_class=data.processor,
            compute_metrics=data.compute_metrics,
            preprocess_logits_for_metrics=data.preprocess_logits,
            callbacks=list(callbacks),
        )
        if data.task != "causal-lm":
            # transformers 5 takes a forward with **kwargs for one that divides its loss by
            # num_items_in_batch. That of BERT, T5 and others is a mean, and gradients would grow with the
            # number of processes and of accumulated batches
            self.model_accepts_loss_kwargs = False

    optimizer: torch.optim.Optimizer | None
    _tr_loss: torch.Tensor

    def start_at_gradient(self) -> None:
        """`nblora.start_at_gradient` with training samples, before `train`.

        Raises:
            SettingsError: with FSDP or DeepSpeed, which have not the whole model in one place.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SettingsError("start must be random with FSDP or DeepSpeed, got start='gradient'")
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(self._data.train), generator=generator)[:_START_SAMPLES]
        batches = DataLoader(
            Subset(self._data.train, chosen.tolist()),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
        )

        def step() -> None:
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs)
                loss.backward()

        self.model.train()
        if self.args.gradient_checkpointing:  # train() will, too: no more memory is needed than there
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        start_at_gradient(self.model, step)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self._make_optimizer is not None:
            self.optimizer = self._make_optimizer(self.model, self.args)
        created: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return created

    # transformers starts the mean of the losses since the last log anew when it resumes. It goes where each
    # process has a file of its own in a checkpoint, and before that file, which tells a whole checkpoint.

    def _save_rng_state(self, output_dir: str) -> None:
        with suppress(AttributeError):  # in a transformers that counts otherwise the curve has a kink
            losses = {"sum": self._tr_loss.item(), "since_step": self._globalstep_last_logged}
            os.makedirs(output_dir, exist_ok=True)  # this process may be ahead of the one that makes it
            (Path(output_dir) / self._losses_file()).write_text(json.dumps(losses))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        with suppress(OSError, ValueError, KeyError, AttributeError):
            losses = json.loads((Path(checkpoint) / self._losses_file()).read_text())
            self._tr_loss = torch.full_like(self._tr_loss, losses["sum"])
            self._globalstep_last_logged = losses["since_step"]

    def _losses_file(self) -> str:
        return f"losses_{self.args.process_index}.json"

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        with self._own_head() if metric_key_prefix.endswith("_keep") else _unchanged():
            measured: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return measured

    @contextmanager
    def _own_head(self) -> Iterator[None]:
        """The classification head that the model came with, while its own task is evaluated."""
        original, name = self._base.original_head, self._base.head
        if original is None or name is None:
            yield
            return
        model: Any = self._base.model
        new, config, classes = model.get_submodule(name), model.config, model.num_labels
        original.to(next(new.parameters()).device).eval()
        model.set_submodule(name, original)
        # the loss is computed for so many classes
        model.config, model.num_labels = copy.deepcopy(config), len(self._data.keep_labels or ())
        model.config.num_labels = model.num_labels
        try:
            yield
        finally:
            model.set_submodule(name, new)
            model.config, model.num_labels = config, classes

    def measure(self, part: str) -> dict[str, dict[str, float] | None]:
        """The metrics of the target and the kept data; None for kept data that is not there.

        Args:
            part: "validation" or "test".
        """
        found: dict[str, dict[str, float] | None] = {}
        for name, dataset in (
            ("target", getattr(self._data, part)),
            ("keep", getattr(self._data, f"keep_{part}")),
        ):
            prefix = f"{part}_{name}"
            found[name] = (
                None
                if dataset is None
                else _without_prefix(self.evaluate(dataset, metric_key_prefix=prefix), prefix)
            )
        return found


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


_BESIDE_METRICS = ("runtime", "samples_per_second", "steps_per_second", "loss", "model_preparation_time")


def _without_prefix(measured: Mapping[str, float], prefix: str) -> dict[str, float]:
    """A data set's own metrics among those that a Trainer measured."""
    own = {key.removeprefix(f"{prefix}_"): value for key, value in measured.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key not in _BESIDE_METRICS}


class Meter:
    """Seconds and peak memory of a block.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: the most that the block held: of GPU memory where there is a GPU, else of
            the process's resident memory.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __enter__(self) -> Meter:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux forgets the peak so far; elsewhere it is the process's
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if torch.cuda.is_available():
            self.peak_memory_bytes = torch.cuda.max_memory_allocated()
            return
        status = Path("/proc/self/status")
        if status.is_file():
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            self.peak_memory_bytes = int(lines[0].split()[1]) * 1024
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _StopOnSignal(TrainerCallback):
    """Ends training after the step in which the user asked to, with a checkpoint.

    Processes that train together agree on the step, since all must take part in a checkpoint. A second
    request ends the process at once.
    """

    _EVERY = 8  # steps between agreements of several processes

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            if state.global_step % self._EVERY:
                return
            flag = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.requested and not _is_end_of_epoch(state):
            # transformers ends an epoch that it breaks off like any other
            control.should_log = control.should_evaluate = control.should_save = False


class _SaveAfterEvaluation(TrainerCallback):
    """Writes a checkpoint at the end of an epoch after what is logged and evaluated there.

    A run that is resumed from it begins with the next epoch, and would never do so.
    """

    def __init__(self) -> None:
        self._postponed = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._postponed = control.should_save and _is_end_of_epoch(state)
        if self._postponed:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save |= self._postponed
        self._postponed = False


def _is_end_of_epoch(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()


class _Clock(TrainerCallback):
    """Notes the seconds of training in every checkpoint, so that they add up over resumed runs."""

    FILE = "seconds.json"

    def __init__(self, before: float) -> None:
        self.before = before
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._start

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / self.FILE).write_text(json.dumps(self.seconds))

    @classmethod
    def seconds_of(cls, checkpoint: Path | None) -> float:
        if checkpoint is None:
            return 0.0
        with suppress(OSError, ValueError):
            return float(json.loads((checkpoint / cls.FILE).read_text()))
        return 0.0


class _MeasureBefore(TrainerCallback):
    """Test metrics of the base model, from an earlier process of this run if there was one.

    Measured when training begins: a model that is evaluated before that counts as prepared for accelerate,
    and processes that train together would not share their gradients.
    """

    trainer: BoundedTrainer

    def __init__(self, file: Path) -> None:
        self.file = file
        self.scores: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.scores = self._saved() or self._measured()
        set_seed(args.seed)  # the same stream of random numbers whether or not that was measured now

    def _saved(self) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            saved: dict[str, Any] = json.loads(self.file.read_text())
            return saved
        return None

    def _measured(self) -> dict[str, Any]:
        with _without_adapter(self.trainer.model):
            scores = self.trainer.measure("test")
        if self.trainer.is_world_process_zero():
            _write_text(self.file, json.dumps(finite(scores)))
        return scores


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """Bounded updates switched off; by themselves, since PEFT would freeze the adapter too."""
    layers = [module for module in model.modules() if isinstance(module, NBLoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before):
            layer._disable_adapters = disabled


class Progress(TrainerCallback):
    """Calls a function after every optimizer step with the step and the last one."""

    def __init__(self, advance: Callable[[int, int], None]) -> None:
        self.advance = advance

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.advance(state.global_step, state.max_steps)


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning job made.

    Attributes:
        folder: everything that it wrote.
        metrics: the content of `metrics.json`.
        certificate: measured spectra against the bound.
    """

    folder: Path
    metrics: Mapping[str, Any]
    certificate: Certificate


def effective_config(settings: Mapping[str, Any], out_dir: PathLike, *, resume: bool) -> FinetuneConfig:
    """The configuration of a job from the user's settings, the defaults and, on resuming, the saved one.

    Raises:
        SettingsError: if the folder holds another run, or the settings differ from those of the run to
            resume.
    """
    saved_file = Path(out_dir) / "config.yaml"
    if resume and saved_file.is_file():
        saved = read_yaml(saved_file)
        config = FinetuneConfig.of(portable(overlay(saved, settings)))
        asked = config.to_dict()
        for name in {**asked, **saved}:
            if asked.get(name) != saved.get(name):
                raise SettingsError(
                    f"a run is resumed with its own settings, those in {saved_file}; got {name}="
                    f"{asked.get(name)!r} where it has {saved.get(name)!r}"
                )
        return config
    if not _is_unused(Path(out_dir)):
        hint = "continue it with --resume, or " if saved_file.is_file() else ""
        raise SettingsError(f"the folder to write must be new or empty, got {out_dir}; {hint}choose another")
    if resume and not settings:
        raise SettingsError(f"a run to resume must have a config.yaml, got {out_dir} without it")
    train = settings.get("train", {})
    if isinstance(train, Mapping):
        train = {**DEFAULT_ARGUMENTS, "seed": settings.get("seed", 0), **train}
    return FinetuneConfig.of(portable({**settings, "train": train}))


def _is_unused(folder: Path) -> bool:
    """Whether a folder is not there, is empty, or has only what a run killed at its very start leaves."""
    if not folder.is_dir():
        return not folder.exists()
    checkpoints = folder / "checkpoints"
    return all(
        path.name.startswith(".config.yaml-") or (path == checkpoints and not any(path.iterdir()))
        for path in folder.iterdir()
    )


def finetune(
    settings: Mapping[str, Any] | FinetuneConfig,
    out_dir: PathLike,
    *,
    resume: bool = False,
    report: bool = True,
    advance: Callable[[int, int], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneResult:
    """Fine-tune a model with a norm-bounded adapter and write everything that belongs to the result.

    `out_dir` gets `adapter/` (with the tokenizer or image processor), `lora/` (the same adapter as a plain
    LoRA), `certificate.json`, `metrics.json`, `config.yaml` (which reproduces the run), `report.html` and
    `checkpoints/`. A run that was killed at any moment is resumed to the same result. The job may run in
    several processes, started by torchrun or accelerate launch; the first of them writes.

    Args:
        settings: as in `FinetuneConfig`.
        out_dir: new, empty or, with `resume`, that of the run to resume.
        resume: continue from the last whole checkpoint, or start where there is none.
        report: whether to write `report.html`, which needs plotly and jinja2.
        advance: called with the step and the number of steps.
        callbacks: further ones for the Trainer.

    Raises:
        ValueError: for settings, data or a model that cannot be used; nothing is written then.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
        OSError: if a file cannot be written; checkpoints written before stay.
    """
    if isinstance(settings, FinetuneConfig):
        settings = settings.to_dict()
    out = Path(out_dir)
    config = effective_config(settings, out, resume=resume)
    nblora_config = config.nblora_config()
    if report:
        from nblora.reporting import finetune_report, require_libraries

        require_libraries()  # now, not after hours of training
    arguments = training_arguments(config.train, out / "checkpoints")
    if arguments.save_only_model:
        raise SettingsError("train.save_only_model must be false: a run is resumed from whole checkpoints")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise SettingsError(f"train.{name} must be at least 1, got {getattr(arguments, name)}")
    with arguments.main_process_first(desc="preparing the data"):
        data = config.prepare()
    set_seed(arguments.seed)
    base = config.load_model(data)
    nblora_config.base_model_name_or_path = config.model
    model = adapt(base, nblora_config, config.task)
    checkpoint = last_checkpoint(out / "checkpoints") if resume else None
    stop, clock = _StopOnSignal(), _Clock(_Clock.seconds_of(checkpoint))
    # often enough for a curve, and not so often that the log of a long run outgrows the adapter
    spectra = NBLoraCallback(every=max(1, _steps(arguments, data) // 100))
    before = _MeasureBefore(out / "checkpoints" / "before.json")
    watching = [stop, before, _SaveAfterEvaluation(), clock, spectra, *callbacks]
    if advance is not None:
        watching.append(Progress(advance))
    trainer = BoundedTrainer(model, base, data, arguments, callbacks=watching)
    trainer.remove_callback(PrinterCallback)
    first = trainer.is_world_process_zero()
    if config.start == "gradient" and checkpoint is None:
        trainer.start_at_gradient()
    with _writing(out), stop.listening():
        if first:
            out.mkdir(parents=True, exist_ok=True)
            write_yaml(out / "config.yaml", config.to_dict())
        before.trainer = trainer
        with Meter() as meter:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"continue with: nblora finetune --resume --out {out}"
            )
        seconds = clock.seconds
        after = trainer.measure("test")
        validation = trainer.measure("validation")
        _save_adapter(trainer, out / "adapter")
        metrics = {
            "nblora": nblora.__version__,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            **{name: getattr(config, name) for name in ("task", "model", "data", "keep", "seed")},
            "metric": data.metric,
            "new_head": data.new_head,
            "labels": None if data.labels is None else list(data.labels),
            "method": "NB-LoRA",
            "start": config.start,
            "adapter": {name: _plain(getattr(nblora_config, name)) for name in _adapter_fields()},
            "train": dict(config.train),
            "before": before.scores,
            "after": after,
            "validation": validation,
            "history": _history(trainer.state.log_history),
            "spectra": spectra.history,
            "samples": {
                name: None if part is None else len(part)
                for name, part in (
                    ("train", data.train),
                    ("validation", data.validation),
                    ("test", data.test),
                    ("keep", data.keep_test),
                )
            },
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "processes": arguments.world_size,
            "seconds": seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
        }
        if first:
            export_lora(out / "adapter", out / "lora")
            certificate = certify(out / "adapter")
            _write_text(out / "certificate.json", certificate.to_json())
            if report:
                finetune_report(metrics, json.loads(certificate.to_json()), out / "report.html")
            # the last file to be written: where it is, everything is
            _write_text(out / "metrics.json", json.dumps(finite(metrics), indent=2, allow_nan=False))
        trainer.accelerator.wait_for_everyone()
        return FinetuneResult(out, metrics, certify(out / "adapter"))


def _steps(arguments: TrainingArguments, data: TaskData) -> int:
    """About how many optimizer steps a job takes."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return int(arguments.num_train_epochs * len(data.train) / batch)


def last_checkpoint(folder: PathLike) -> Path | None:
    """The newest whole checkpoint of a Trainer; half-written newer ones are removed.

    The Trainer's state is the last file of a checkpoint that the main process writes, and every process
    writes one file with the state of its random numbers.
    """
    found = sorted(
        (path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()),
        key=lambda path: int(path.name.partition("-")[2]),
        reverse=True,
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for path in found:
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            states = 1 if processes == 1 else processes
            if len(list(path.glob("rng_state*.pth"))) >= states:
                return path
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(path, ignore_errors=True)
    return None


def _save_adapter(trainer: BoundedTrainer, folder: Path) -> None:
    """The adapter and the processor, in a folder that is whole or not there."""
    temporary = folder.with_name(f".{folder.name}")
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing needs
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    trainer.accelerator.wait_for_everyone()


def _history(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log as learning curves: losses and evaluations by step."""
    history: list[dict[str, Any]] = []
    for entry in log:
        place = {"step": entry["step"], "epoch": entry.get("epoch")}
        if "loss" in entry:
            kept = ("loss", "learning_rate", "grad_norm")
            history.append(place | {name: entry[name] for name in kept if name in entry})
        for name in ("target", "keep"):
            if f"eval_{name}_score" in entry:
                if not history or history[-1]["step"] != entry["step"] or "loss" in history[-1]:
                    history.append(place)
                history[-1][name] = _without_prefix(entry, f"eval_{name}")
    return history


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Errors of writing as OSError, whatever the library that writes raises."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from error
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(f"{out} cannot be written: {error}") from error
    except torch.OutOfMemoryError as error:
        raise OSError(
            "the GPU has too little memory: use a smaller --train.per_device_train_batch_size with "
            f"--train.gradient_accumulation_steps, or --train.gradient_checkpointing ({error})"
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(f"{out} cannot be written, is the disk full? ({error})") from error


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
