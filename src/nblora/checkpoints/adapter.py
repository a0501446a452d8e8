"""Adapters with bounds: NB-LoRA, from a model or a folder, and exported LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from nblora.bounds import Norm, parse_norm
from nblora.checkpoints.base import Place
from nblora.checkpoints.layouts import PEFT_PREFIX, Form, adapted_parameters
from nblora.checkpoints.lora import LoraFile, locate, parse_lora
from nblora.checkpoints.storage import (
    DTYPES,
    AdapterError,
    PathLike,
    TensorFile,
    one_line,
    parse_json,
    read_json,
)
from nblora.contract import TOLERANCE
from nblora.lowrank import LowRank
from nblora.parametrizations import FreeParameters
from nblora.tuner import NBLoraConfig, NBLoraType, nblora_layers
from nblora.tuner.config import pattern_value
from nblora.tuner.weights import Method, whole

BOUNDS_KEY = "nblora_bounds"  # in the safetensors metadata of an exported LoRA

_TENSOR = re.compile(
    r"(?P<name>.+)\.nblora_(?P<embedding>embedding_)?(?P<part>in|out|angle|scale|radius)\.weight"
)


@dataclass(frozen=True)
class BoundedLayer:
    """The update of one layer and the bound that it was promised to keep.

    Attributes:
        update: (m, n) as thin factors, in the precision that the model computes it in, `scale` included;
            (E, m, n) for E experts.
        norm: the norm that is bounded.
        bounds: absolute, `scale` included, one for each matrix (0 for a zero base weight; NaN where no
            checkpoint told it).
        scale: what a model multiplies the update and so the bound by; 1 unless `set_scale` changed it.
        kernel: of a convolution, whose inputs are counted over it, else empty.
        embedding: whether the update is of an embedding, whose weight is stored transposed.
    """

    update: LowRank
    norm: Norm
    bounds: tuple[float, ...]
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def form(self) -> Form:
        """What the update is, apart from its rank and its numbers."""
        *experts, m, n = self.update.shape
        return Form((m, n), experts[0] if experts else None, self.kernel, self.embedding)

    @property
    def matrices(self) -> list[LowRank]:
        """The update of each expert; of other layers the one that there is."""
        if self.update.left.ndim == 2:
            return [self.update]
        return [LowRank(left, right) for left, right in zip(self.update.left, self.update.right)]

    def labels(self, name: str) -> list[str]:
        """How reports name the matrices of a layer of this name."""
        experts = self.update.left.ndim == 3
        return [f"{name}[{i}]" for i in range(len(self.bounds))] if experts else [name]


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint or a model holds of one adapter.

    Attributes:
        config: its PEFT configuration, None for a LoRA file without one.
        layers: by module name in the base model.
        others: further trained tensors (modules to save, biases) by checkpoint key, without PEFT's
            prefix.
    """

    config: NBLoraConfig | LoraConfig | None
    layers: dict[str, BoundedLayer]
    others: dict[str, Tensor]

    def place(self, name: str, source: str) -> Place:
        """How the base weight of a layer is recognised.

        Args:
            source: where the adapter is from, for errors.
        """
        layer = self.layers[name]
        targets = None if self.config is None else self.config.target_parameters
        parameters = adapted_parameters(targets, name) or [".weight"]
        *_, m, n = layer.update.shape
        return Place(
            name,
            (m, n),
            None if layer.update.left.ndim == 2 else len(layer.bounds),
            frozenset(parameter.rpartition(".")[2] for parameter in parameters),
            flattened=False,
            file=source,
        )


@dataclass(frozen=True)
class BoundedFile:
    """A saved NB-LoRA adapter of which only the header is in memory.

    Attributes:
        tensors: the weights.
        config: what is in adapter_config.json.
        parts: keys of the tensors of every layer, by module name in the base model and by part.
        embeddings: which layers are embeddings.
        others: keys of further trained tensors (modules to save, biases).
    """

    tensors: TensorFile
    config: NBLoraConfig
    parts: dict[str, dict[str, str]]
    embeddings: frozenset[str]
    others: tuple[str, ...]

    def form(self, name: str) -> tuple[Form, int]:
        """What the update of a layer is, and its number of factors, from the header alone.

        Raises:
            AdapterError: if the tensors of the layer do not fit together.
        """
        entries = {part: self.tensors.entries[key] for part, key in self.parts[name].items()}
        empty = {
            part: torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype), device="meta")
            for part, entry in entries.items()
        }
        with self._errors():
            part = _checked_parts(self.config, name, empty)
        experts = part["radius"].shape
        *_, k, m = part["out"].shape
        into = tuple(part["in"].shape[len(experts) + 1 :])
        count = experts[0] if experts else None
        return Form((m, math.prod(into)), count, into[1:], name in self.embeddings), k

    def layer(self, name: str) -> BoundedLayer:
        """Read one layer.

        Raises:
            AdapterError: if its tensors cannot be read or do not fit together.
        """
        part = {part: self.tensors.read(key) for part, key in self.parts[name].items()}
        with self._errors():
            return _bounded_layer(self.config, name, part, 1.0, name in self.embeddings)

    def bounds(self, name: str) -> tuple[float, ...]:
        """The absolute bounds of one layer, one for each matrix, without computing its update.

        Raises:
            AdapterError: if they cannot be read, or are negative.
        """
        radius = self.tensors.read(self.parts[name]["radius"])
        with self._errors():
            return _absolute_bounds(self.config, name, radius)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors that say which file."""
        try:
            yield
        except AdapterError as error:
            raise AdapterError(f"{self.tensors.path}: {error}") from error


def read_adapter(source: nn.Module | PathLike, adapter_name: str = "default") -> Adapter:
    """The bounded layers of a model, of a saved NB-LoRA adapter, or of an exported LoRA.

    Args:
        source: a model with NB-LoRA adapters (a PeftModel, or one with injected layers), a folder, the
            name of a hub repository, or a LoRA file that `export_lora` wrote.
        adapter_name: which adapter of a model; a folder has one.

    Raises:
        AdapterError: if there is no such adapter, or files are missing, damaged or not ours. Pickled
            weights are never loaded.
    """
    if isinstance(source, nn.Module):
        return _from_model(source, adapter_name)
    weights_file, config_file = locate(source)
    if config_file is None:
        return _exported(parse_lora(weights_file, None, None))
    raw = read_json(config_file, "a PEFT adapter configuration")
    if "peft_type" not in raw:
        raise AdapterError(f"{config_file} must be a PEFT adapter configuration: it has no peft_type")
    if raw["peft_type"] == "LORA":
        return _exported(parse_lora(weights_file, config_file, raw))
    file = _opened(weights_file, config_file, raw)
    layers = {name: file.layer(name) for name in file.parts}
    others = {key.removeprefix(PEFT_PREFIX): file.tensors.read(key) for key in file.others}
    return Adapter(file.config, layers, others)


def open_nblora(source: PathLike) -> BoundedFile:
    """Read what a saved NB-LoRA adapter says of itself, without its tensors.

    Raises:
        AdapterError: as `read_adapter`.
    """
    weights_file, config_file = locate(source)
    if config_file is None:
        raise AdapterError(f"{weights_file} must be of an NB-LoRA adapter, and needs its adapter_config.json")
    return _opened(weights_file, config_file, read_json(config_file, "a PEFT adapter configuration"))


def _opened(weights_file: Path, config_file: Path, raw: dict[str, Any]) -> BoundedFile:
    """The NB-LoRA adapter in a weights file, with PEFT's configuration as it was read."""
    if raw.get("peft_type") != NBLoraType.NBLORA.value:
        raise AdapterError(
            f"{config_file} must be of an NB-LoRA adapter, got peft_type={raw.get('peft_type')!r}"
        )
    try:
        config = NBLoraConfig.from_peft_type(**raw)
    except Exception as error:  # whatever PEFT raises for fields of other types
        raise AdapterError(f"{config_file} is not valid: {one_line(error)}") from error
    if not isinstance(config.target_parameters, list | None):
        raise AdapterError(
            f"{config_file} must have a list of names as target_parameters, got {config.target_parameters!r}"
        )
    tensors = TensorFile(weights_file)
    try:
        parts, embeddings, others = _sorted(config, tensors.entries)
    except AdapterError as error:
        raise AdapterError(f"{weights_file}: {error}") from error
    return BoundedFile(tensors, config, parts, embeddings, others)


def is_ours(source: PathLike) -> bool:
    """Whether a path is of a saved NB-LoRA adapter."""
    config_file = locate(source)[1]
    if config_file is None:
        return False
    return read_json(config_file, "a PEFT adapter configuration").get("peft_type") == NBLoraType.NBLORA.value


def _from_model(model: nn.Module, adapter_name: str) -> Adapter:
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    configs = getattr(model, "peft_config", {})
    ours = sorted(name for name, config in configs.items() if isinstance(config, NBLoraConfig))
    if adapter_name not in ours:
        raise AdapterError(
            f"the adapter must be one of the model's NB-LoRA adapters {ours}, got {adapter_name!r}"
        )
    layers = nblora_layers(model, adapter_name)
    # save_embedding_layers=False: else PEFT may ask the hub for the base model's vocabulary
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    scales = {name.removeprefix(PEFT_PREFIX): layer.scaling[adapter_name] for name, layer in layers.items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise AdapterError(
            f"adapter {adapter_name!r} must be in memory, got tensors that are offloaded or not loaded yet: "
            "take the saved adapter"
        )
    return _adapter(configs[adapter_name], {key: whole(tensor) for key, tensor in state.items()}, scales)


def _adapter(
    config: NBLoraConfig, tensors: Mapping[str, Tensor], scales: Mapping[str, float] | None = None
) -> Adapter:
    """Sort the tensors of an NB-LoRA checkpoint into layers."""
    parts, embeddings, others = _sorted(config, tensors)
    layers = {
        name: _bounded_layer(
            config,
            name,
            {part: tensors[key] for part, key in keys.items()},
            (scales or {}).get(name, 1.0),
            name in embeddings,
        )
        for name, keys in parts.items()
    }
    return Adapter(config, layers, {key.removeprefix(PEFT_PREFIX): tensors[key] for key in others})


def _sorted(
    config: NBLoraConfig, keys: Iterable[str]
) -> tuple[dict[str, dict[str, str]], frozenset[str], tuple[str, ...]]:
    """Keys of an NB-LoRA checkpoint by layer and part, which layers are embeddings, and all other keys."""
    parts: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    others: list[str] = []
    for key in keys:
        if match := _TENSOR.fullmatch(key.removeprefix(PEFT_PREFIX)):
            parts.setdefault(match["name"], {})[match["part"]] = key
            if match["embedding"]:
                embeddings.add(match["name"])
        else:
            others.append(key)
    if not parts:
        raise AdapterError("an NB-LoRA adapter must have adapted layers, got none")
    frozen = frozen_keys(parts, config.bias)
    return parts, frozenset(embeddings), tuple(k for k in others if k.removeprefix(PEFT_PREFIX) not in frozen)


def frozen_keys(names: Iterable[str], bias: str) -> set[str]:
    """Keys, without PEFT's prefix, of the frozen tensors that PEFT saves beside adapted embeddings."""
    kinds = ("weight", "bias") if bias == "none" else ("weight",)
    return {f"{name}.base_layer.{kind}" for name in names for kind in kinds}


def _checked_parts(config: NBLoraConfig, name: str, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer once their shapes fit together, angles and scales without their last axis."""
    method = Method.of(config)
    needed = {"in", "out", "radius"}
    needed |= {"angle"} if config.parametrization == "svd" else set()
    single = "out" in part and part["out"].ndim > 1 and part["out"].shape[-2] == 1
    learns = method.norm.learnable and method.parametrization != "radial"
    if learns and (not single or "scale" in part):  # older adapters of rank 1 have it too
        needed.add("scale")
    if part.keys() != needed:
        raise AdapterError(f"layer {name!r} must have the tensors {sorted(needed)}, got {sorted(part)}")
    # stored as columns (k, 1), by older versions as vectors (k,)
    columns = {key for key in part.keys() & {"angle", "scale"} if part[key].ndim == part["out"].ndim}
    checked = {key: tensor.squeeze(-1) if key in columns else tensor for key, tensor in part.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in checked.items()}
    batch = shapes["radius"]  # () or (E,) for experts
    into, out = shapes["in"][len(batch) :], shapes["out"][len(batch) :]
    k = out[0] if out else 0
    if (
        not all(tensor.is_floating_point() for tensor in checked.values())
        or len(batch) > 1
        or any(shapes[key][: len(batch)] != batch for key in needed)
        or len(into) < 2
        or len(out) != 2
        or (batch and len(into) > 2)
        or not 1 <= k <= min(math.prod(into[1:]), out[1])
        or into[0] != k
        or any(shapes[key] != (*batch, k) for key in needed & {"angle", "scale"})
    ):
        raise AdapterError(
            f"layer {name!r} must have floating-point tensors in (k, n) or (k, n, *kernel), out (k, m), "
            "radius () and angle and scale (k, 1) where there are any, with k <= min(m, n), all of them with "
            f"the number of experts in front for experts, got {shapes}"
        )
    return checked


def _bounded_layer(
    config: NBLoraConfig, name: str, part: Mapping[str, Tensor], scale: float, embedding: bool
) -> BoundedLayer:
    part = _checked_parts(config, name, part)
    method = Method.of(config)
    batch = part["radius"].shape
    free = FreeParameters(
        part["out"], part["in"].flatten(len(batch) + 1), part.get("angle"), part.get("scale")
    )
    kernel = tuple(part["in"].shape[len(batch) + 2 :])
    radius = part["radius"].detach()
    bounds = _absolute_bounds(config, name, radius)
    with torch.no_grad():
        update = method.update(free, radius)
        update = LowRank(update.left * scale, update.right) if scale != 1 else update
    return BoundedLayer(
        update, method.norm, tuple(abs(scale) * bound for bound in bounds), scale, kernel, embedding
    )


def _absolute_bounds(config: NBLoraConfig, name: str, radius: Tensor) -> tuple[float, ...]:
    """The bounds of a layer with this radius () or radii (E,)."""
    if bool((radius < 0).any()):
        raise AdapterError(f"the radius of layer {name!r} must not be negative, got {radius.tolist()!r}")
    bounds = radius.flatten().tolist()
    if config.bound_kind == "absolute":  # promised in the configuration; a radius above it breaks the promise
        stated = [_promised(config, name, bound) for bound in bounds]
        # of experts the configuration can state only the largest
        bounds = [min(pair) for pair in zip(stated, bounds)] if radius.ndim else stated
    return tuple(bounds)


def _promised(config: NBLoraConfig, name: str, radius: float) -> float:
    """The bound that a configuration states for a layer of this radius.

    Names in a checkpoint tell the module of a parameter, not which of its parameters it is: then the bound
    of one of them must contain the radius.
    """
    names = adapted_parameters(config.target_parameters, name) or [name.replace(".base_layer", "")]
    stated: list[float] = sorted({pattern_value(config.bound_pattern, each, config.bound) for each in names})
    return next((bound for bound in stated if radius <= bound * (1 + TOLERANCE)), stated[-1])


def noted_bounds(file: LoraFile) -> tuple[Norm, dict[str, tuple[float, ...]]] | None:
    """The norm, and the absolute bounds by the full names of layers, that we noted in a plain LoRA.

    Returns:
        None where nothing is noted.

    Raises:
        AdapterError: if what is noted is damaged.
    """
    path = file.tensors.path
    if BOUNDS_KEY not in file.tensors.metadata:
        return None
    try:
        noted = parse_json(file.tensors.metadata[BOUNDS_KEY])
        norm = parse_norm(noted["norm"])
        bounds = {name: _one_or_more(bound) for name, bound in noted["bounds"].items()}
        if not bounds:
            raise ValueError("it has no bounds")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path}: the metadata entry {BOUNDS_KEY!r} is damaged: {one_line(error)}"
        ) from error
    return norm, bounds


def _exported(file: LoraFile) -> Adapter:
    """The layers of a plain LoRA that `export_lora` wrote, with the bounds that it noted."""
    path, noted = file.tensors.path, noted_bounds(file)
    if noted is None:
        raise AdapterError(f"{path}: a plain LoRA has no bounds to certify, unless nblora exported it")
    norm, bounds = noted
    layers = {}
    for layer in file.layers:
        name = layer.full_name
        if len(bounds.get(name, ())) != len(layer.labels):
            raise AdapterError(
                f"{path}: every LoRA tensor must belong to a layer with a bound, got {layer.down!r} too"
            )
        # not `updates`: a factor that is not finite makes a bound that does not hold
        lefts, rights = zip(*file.factors(layer))
        left, right = torch.stack(lefts).double() * layer.scale, torch.stack(rights).double()
        update = LowRank(left, right) if layer.experts is not None else LowRank(left[0], right[0])
        layers[name] = BoundedLayer(update, norm, bounds[name])
    if missing := [name for name in bounds if name not in layers]:
        raise AdapterError(f"{path}: layer {missing[0]!r} must have factors, got none")
    others = {key.removeprefix(PEFT_PREFIX): file.tensors.read(key) for key in file.others}
    return Adapter(file.config, layers, others)


def _one_or_more(value: float | list[float]) -> tuple[float, ...]:
    """One bound, or one for each expert."""
    bounds = tuple(float(bound) for bound in (value if isinstance(value, list) else [value]))
    if not all(0 <= bound < math.inf for bound in bounds):
        raise ValueError(f"bounds must be finite and not negative, got {value!r}")
    return bounds
