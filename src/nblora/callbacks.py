"""What a Trainer shows of NB-LoRA while it trains: how much of its bound each layer uses.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[NBLoraCallback()])

Works in every script on transformers.Trainer, TRL's trainers among them.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from nblora.parametrizations import FreeParameters
from nblora.tuner.layer import NBLoraLayer
from nblora.tuner.weights import Method

_KEY = "nblora/"
_AT_ONCE = 2**24  # free parameters of equal layers that are measured in one batch: 64 MiB in float32

# by name, since some of them import notebooks or TRL; that of a subclass counts too
_PRINTING = {"PrinterCallback", "ProgressCallback", "NotebookProgressCallback", "RichProgressCallback"}


class BoundUseWarning(UserWarning):
    """The bound is used up in every layer, or not nearly in any: another one would serve better."""


class NBLoraCallback(TrainerCallback):
    """Logs the norm of every update, its share of the bound, and its largest singular values.

    At every training log of the Trainer it measures each active adapter of each NB-LoRA layer, and logs
    to whatever the Trainer reports to (TensorBoard, Weights & Biases, ..., any callback with `on_log`),
    and to `trainer.state.log_history`:

    - `nblora/<layer>/norm`, in the norm that is bounded, and `nblora/<layer>/share`, norm / bound;
    - `nblora/<layer>/sigma_1`, `sigma_2`, ...: the largest singular values;
    - `nblora/share_max`, `nblora/share_mean`, `nblora/share_min` over all layers.

    Some reporters put `train/` before it, as before the loss. <layer> is the module name in the base
    model; with several active adapters it is <layer>/<adapter>; of experts, each has its own, <layer>[3].
    A layer of radius zero has no share.
    Progress bars and printers are spared. The numbers depend on the weights alone; training goes on
    bitwise as without the callback.

    At the end of training it warns (`BoundUseWarning`) if the bound was used up in every layer, or
    nearly unused in all.

    A large model has many layers, and the log history is written with each checkpoint: `every` and `top`
    keep it short.

    Args:
        every: Measure at those logs only that are at least so many steps after the last measurement.
        top: How many of the largest singular values of each layer.
        saturated: Warn if every layer uses at least this share of its bound.
        unused: Warn if no layer uses as much as this share of its bound; 0 for never.

    Attributes:
        history: one {"step": 10, "layers": {name: {"norm": 0.1, "share": 0.3, "top": [0.09, 0.02]}}} for
            each measurement, share None for a radius of zero. Training that resumes from a checkpoint
            has what was measured before it, too.

    Raises:
        ValueError: for arguments out of range; at the start of training, for a model without an active
            NB-LoRA adapter.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        top: int = 3,
        saturated: float = 0.95,
        unused: float = 0.5,
    ) -> None:
        if every is not None and not _is_integer(every, at_least=1):
            raise ValueError(f"every must be an integer >= 1 or None, got every={every!r}")
        if not _is_integer(top, at_least=0):
            raise ValueError(f"top must be an integer >= 0, got top={top!r}")
        if not 0 <= unused <= saturated <= 1:
            raise ValueError(
                "unused and saturated must be shares with 0 <= unused <= saturated <= 1, "
                f"got unused={unused!r} and saturated={saturated!r}"
            )
        self.every = every
        self.top = top
        self.saturated = saturated
        self.unused = unused
        self.history: list[dict[str, Any]] = []
        self._has_stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        adapters = _active_adapters(model)
        if not adapters:
            raise ValueError(
                "the model must have an active NB-LoRA adapter for NBLoraCallback, got "
                f"{type(model).__name__} without one: get_peft_model(model, NBLoraConfig(...)) adds it"
            )
        # the state of a checkpoint remembers what was measured up to it; that of a fresh start nothing
        names = [name for key, (layer, _) in adapters.items() for name in _names(key, layer)]
        self.history = _history(state.log_history, names)
        self._has_stepped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._has_stepped = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl | None:
        if logs is None or "loss" not in logs or not self._is_due(state.global_step):
            return None
        # also in processes that report nothing: where weights are sharded, all take part in gathering
        layers = _measure(kwargs["model"], self.top)
        self.history.append({"step": state.global_step, "layers": layers})
        entry = _entry(layers)
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        handler = _calling_handler()
        if handler is None:
            logs.update(entry)
            return None
        for callback in list(handler.callbacks):
            if callback is not self and not _prints(callback):
                control = callback.on_log(args, state, control, logs=entry, **kwargs) or control
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._has_stepped:
            return
        # afresh: the last log may be long ago, or the best checkpoint was loaded since
        shares = _shares(_measure(kwargs["model"], top=0))
        if not shares or not state.is_world_process_zero:
            return
        if all(share >= self.saturated for share in shares):
            warnings.warn(
                f"Every NB-LoRA layer uses at least {self.saturated:.0%} of its bound (the least "
                f"{min(shares):.1%}), so the bound is what limits the model: raise it if the target still "
                "improves with it.",
                BoundUseWarning,
                stacklevel=2,
            )
        elif all(share < self.unused for share in shares):
            warnings.warn(
                f"No NB-LoRA layer uses {self.unused:.0%} of its bound (the most is {max(shares):.1%}), so "
                "the bound does not matter here: a lower one would protect more of what the model knows, "
                "at no cost.",
                BoundUseWarning,
                stacklevel=2,
            )

    def _is_due(self, step: int) -> bool:
        return not self.history or step - self.history[-1]["step"] >= (self.every or 1)


# Note [Reaching the reporters]
#
# A callback has no way to log: the Trainer hands it neither itself nor the other callbacks, and calls
# those that report (TensorBoard, ...) before those of the user, so that what a callback adds to `logs`
# comes too late for them. But whenever the Trainer calls a callback, the CallbackHandler that holds all
# of them is up the stack, as the `self` of the method that calls. That is where it is found, and what was
# measured goes to the other callbacks as an on_log event of its own, in the way that the handler
# delivers one. It has no "loss", so that nobody takes it for a training log (two of these callbacks don't
# answer each other). Trainer.log, were it at hand, is not for that: TRL's adds its own running means to
# whatever is logged, and printers would show hundreds of numbers.
#
# Without a handler (a training loop that calls the callback by itself) the numbers are added to `logs`.


def _calling_handler() -> CallbackHandler | None:
    """The handler that calls, however indirectly. See Note [Reaching the reporters]."""
    frame = inspect.currentframe()
    if frame is not None:
        # a frame that is among its own locals lives, with all that call it, until garbage collection
        frame = frame.f_back
    while frame is not None:
        caller = frame.f_locals.get("self")
        if issubclass(type(caller), CallbackHandler):  # isinstance would ask proxies for their class
            return caller
        frame = frame.f_back
    return None


def _prints(callback: TrainerCallback) -> bool:
    return any(base.__name__ in _PRINTING for base in type(callback).__mro__)


def _is_integer(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


# --- what is logged ---


def _entry(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What was measured, as flat numbers by key."""
    entry: dict[str, float] = {}
    for name, layer in layers.items():
        entry[f"{_KEY}{name}/norm"] = layer["norm"]
        if layer["share"] is not None:
            entry[f"{_KEY}{name}/share"] = layer["share"]
        entry |= {f"{_KEY}{name}/sigma_{i}": sigma for i, sigma in enumerate(layer["top"], start=1)}
    if shares := _shares(layers):
        known = not any(math.isnan(share) for share in shares)  # min and max would lose a NaN
        entry[f"{_KEY}share_max"] = max(shares) if known else math.nan
        entry[f"{_KEY}share_mean"] = sum(shares) / len(shares)
        entry[f"{_KEY}share_min"] = min(shares) if known else math.nan
    return entry


def _history(log_history: Iterable[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The way back from `_entry`: what a log history knows of measurements, layers in order of `names`.

    A checkpoint stores the keys of an entry in alphabetical order.
    """
    order = {name: i for i, name in enumerate(names)}
    history = []
    for logged in log_history:
        layers: dict[str, dict[str, Any]] = {}
        for key, value in logged.items():
            name, _, quantity = key.removeprefix(_KEY).rpartition("/")
            if not key.startswith(_KEY) or not name:  # not ours, or over all layers
                continue
            layer = layers.setdefault(name, {"norm": math.nan, "share": None, "top": []})
            if quantity in ("norm", "share"):
                layer[quantity] = value
            else:
                layer["top"].append(value)
        for layer in layers.values():
            layer["top"].sort(reverse=True)
        if layers:
            ordered = sorted(layers, key=lambda name: order.get(name, len(order)))
            history.append({"step": logged["step"], "layers": {name: layers[name] for name in ordered}})
    return history


def _shares(layers: dict[str, dict[str, Any]]) -> list[float]:
    return [layer["share"] for layer in layers.values() if layer["share"] is not None]


# --- measuring ---


class _Batch(NamedTuple):
    """Updates of equal shape and method; what of them is left on their device to be measured.

    The singular values of L R, with L = Q_1 T_1 and R^T = Q_2 T_2, are those of T_1 T_2^T.
    """

    names: list[str]
    method: Method
    triangles: Tensor  # (2, b, k, k): T_1 and T_2
    radii: Tensor  # (b,)


def _active_adapters(model: nn.Module) -> dict[str, tuple[NBLoraLayer, str]]:
    """Layer and adapter name of every active NB-LoRA adapter, by the layer's name in the base model.

    With several adapters, the name is <layer>/<adapter>.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    found = [
        (layer.target(_plain_name(name)), adapter, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, NBLoraLayer)
        for adapter in layer.active_adapters
        if layer.has_adapter(adapter)
    ]
    several = len({adapter for _, adapter, _ in found}) > 1
    return {f"{name}/{adapter}" if several else name: (layer, adapter) for name, adapter, layer in found}


def _plain_name(name: str) -> str:
    """A module name without what PEFT and wrappers inside the model add to it."""
    wrappers = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
    plain = ".".join(part for part in name.split(".") if part not in wrappers)
    return plain.removeprefix("base_model.model.")


@torch.no_grad()
def _measure(model: nn.Module, top: int) -> dict[str, dict[str, Any]]:
    """Norm, share of the bound and `top` singular values of every active adapter, by layer.

    Equal layers are measured together, no (m, n) product is formed, and the device is waited for only
    once all work is queued. What the layers use is measured, in the precision in which they compute it;
    the small matrices that are left of it in float64 on the CPU.
    """
    adapters = _active_adapters(model)
    waiting: dict[Any, list[tuple[str, FreeParameters, Tensor]]] = {}
    batches: list[_Batch] = []
    names: list[str] = []
    for layer_name, (layer, adapter) in adapters.items():
        free = layer.free_parameters(adapter)
        if free.out.ndim != 2 + len(layer.batch_shape):
            raise ValueError(
                "FSDP must wrap adapters with peft.utils.other.fsdp_auto_wrap_policy, as it does for a "
                f"PeftModel in a Trainer: got a shard of layer {layer_name!r}, which cannot be measured"
            )
        equal = (layer.method[adapter], free.out.shape, free.into.shape, free.out.dtype, free.out.device)
        # an update is proportional to its radius, so this is the update as the layer applies it
        radius = layer.radius(adapter) * abs(layer.scaling[adapter])
        for i, name in enumerate(_names(layer_name, layer)):
            one = free.map(itemgetter(i)) if layer.batch_shape else free
            names.append(name)
            group = waiting.setdefault(equal, [])
            group.append((name, one, radius[i] if layer.batch_shape else radius))
            if len(group) * (one.out.numel() + one.into.numel()) >= _AT_ONCE:
                batches.append(_batch(layer.method[adapter], waiting.pop(equal)))
    batches += [_batch(equal[0], group) for equal, group in waiting.items()]
    measured = {}
    for batch in _on_cpu(batches):
        finite = batch.triangles.isfinite().all(-1).all(-1).all(0)  # (b,)
        left, right = torch.where(finite[:, None, None], batch.triangles.double(), 0.0)
        spectra = torch.linalg.svdvals(left @ right.mT)
        spectra = torch.where(finite[:, None], spectra, torch.nan)  # (b, k): NaN is never a number
        norms = batch.method.norm.value(spectra).tolist()
        for name, spectrum, norm, radius in zip(
            batch.names, spectra[:, :top].tolist(), norms, batch.radii.tolist()
        ):
            share = None if radius == 0 else norm / radius
            measured[name] = {"norm": norm, "share": share, "top": spectrum}
    return {name: measured[name] for name in names}


def _names(layer_name: str, layer: NBLoraLayer) -> list[str]:
    """The name of a layer, or of each of its experts."""
    if not layer.batch_shape:
        return [layer_name]
    return [f"{layer_name}[{i}]" for i in range(layer.batch_shape[0])]


def _batch(method: Method, group: Sequence[tuple[str, FreeParameters, Tensor]]) -> _Batch:
    names, free, radii = zip(*group)
    stacked = FreeParameters(
        out=torch.stack([one.out for one in free]),
        into=torch.stack([one.into for one in free]),
        angle=None if free[0].angle is None else torch.stack([one.angle for one in free]),
        logits=None if free[0].logits is None else torch.stack([one.logits for one in free]),
    )
    radius = torch.stack(radii)
    update = method.update(stacked, radius)
    left = torch.linalg.qr(update.left, mode="r").R
    right = torch.linalg.qr(update.right.mT, mode="r").R
    return _Batch(list(names), method, torch.stack([left, right]), radius)


def _on_cpu(batches: Sequence[_Batch]) -> list[_Batch]:
    """The batches with their numbers on the CPU, by one copy, and so one wait, for each device."""
    moved: dict[int, _Batch] = {}
    for device in {batch.triangles.device for batch in batches}:
        here = [i for i, batch in enumerate(batches) if batch.triangles.device == device]
        pieces = [piece for i in here for piece in (batches[i].triangles, batches[i].radii)]
        numbers = torch.cat([piece.flatten() for piece in pieces]).cpu().split([p.numel() for p in pieces])
        for j, i in enumerate(here):
            shape = batches[i].triangles.shape
            moved[i] = batches[i]._replace(triangles=numbers[2 * j].view(shape), radii=numbers[2 * j + 1])
    return [moved[i] for i in range(len(batches))]
