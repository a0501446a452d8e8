"""The layouts of LoRA files: which tensors belong together, and what they are multiplied by.

- peft: a folder with adapter_config.json; `base_model.model.X.lora_A.weight`, `X.lora_embedding_A`
- diffusers: `pytorch_lora_weights.safetensors`; `unet.X.lora_A.weight`; in older files
  `unet.X.lora.down.weight`,
  `unet.X.processor.to_q_lora.down.weight`, `text_encoder.X.lora_linear_layer.down.weight`
- kohya: one file; `lora_unet_X.lora_down.weight`, `lora_unet_X.alpha`

Every layer has a down factor A (k, n, *kernel), which acts on inputs, an up factor B (m, k, 1...), and a
scale: ΔW = scale B A, a matrix (m, n) whose inputs are counted over the kernel. PEFT keeps the factors of
E experts in one pair: A (E k, n) expert by expert, B (m, k E) with the experts side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from nblora.checkpoints.storage import AdapterError, TensorFile, one_line, parse_json
from nblora.tuner.config import pattern_value

Layout = Literal["peft", "diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = ("peft", "diffusers", "kohya")
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Form:
    """What the update of a layer is, apart from its rank and its numbers.

    Attributes:
        shape: (m, n).
        experts: E, None for a layer with one matrix.
        kernel: of a convolution, whose inputs are counted over it, else empty.
        embedding: whether the update is of an embedding, whose weight is stored transposed.
    """

    shape: tuple[int, int]
    experts: int | None = None
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    def __str__(self) -> str:
        text = f"{self.shape}"
        text += f" of {self.experts} experts" if self.experts is not None else ""
        text += f" with the kernel {self.kernel}" if self.kernel else ""
        return text + " of an embedding" * self.embedding


_COMPONENTS = r"unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|diffusion_model"
_KOHYA_COMPONENTS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_FACTOR = re.compile(
    r"(?P<name>.+?)(?:"
    r"\.lora_(?P<peft>[AB])\.weight"
    r"|\.lora_embedding_(?P<embedding>[AB])"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|(?:\.processor)?\.to_(?P<attention>q|k|v|out)_lora\.(?P<old>down|up)\.weight"
    r"|\.lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r")"
)
_REFUSED = {
    r"\.lora_magnitude_vector|\.dora_scale": "DoRA rescales the whole weight, so its update is not low-rank",
    r"\.hada_[wt]\d": "LoHa multiplies two low-rank matrices entry by entry",
    r"\.lokr_[wt]\d": "LoKr is a Kronecker product",
    r"\.lora_mid\.": "LoCon's CP decomposition has a third factor",
    r"\.b?oft_": "OFT multiplies the weight by a rotation",
}
_FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LoraLayer:
    """Two factors in a file and what they are multiplied by.

    Attributes:
        name: module name in its component; with kohya's layout "_" stands for "." too.
        component: of a pipeline ("unet", "text_encoder_2"), None where names have none.
        down: name of the tensor A.
        up: name of the tensor B.
        shape: (m, n) of the update.
        rank: k.
        scale: of B A.
        experts: E, None for a layer with one matrix.
    """

    name: str
    component: str | None
    down: str
    up: str
    shape: tuple[int, int]
    rank: int
    scale: float
    experts: int | None

    @property
    def full_name(self) -> str:
        """The name with its component in front."""
        return self.name if self.component is None else f"{self.component}.{self.name}"

    @property
    def labels(self) -> list[str]:
        """How reports name the matrices."""
        if self.experts is None:
            return [self.full_name]
        return [f"{self.full_name}[{i}]" for i in range(self.experts)]

    def matrices(self, up: Tensor, down: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views (m, k) and (k, n) of contiguous B and A, one pair for each expert."""
        (m, _), k = self.shape, self.rank
        if self.experts is None:
            return [(up.view(m, k), down.view(k, -1))]
        lefts = up.view(m, k, self.experts).permute(2, 0, 1)
        return list(zip(lefts, down.view(self.experts, k, -1)))


def parse(
    file: TensorFile, config: Mapping[str, Any] | None
) -> tuple[Layout, tuple[LoraLayer, ...], tuple[str, ...]]:
    """Sort the tensors of a file into layers.

    Args:
        file: of any layout.
        config: PEFT's configuration, for that layout.

    Returns:
        The layout, the layers, and the names of all other tensors.

    Raises:
        AdapterError: with the name of the tensor, where the rules of the layout are broken.
    """
    for pattern, reason in _REFUSED.items():
        for key in file.entries:
            if re.search(pattern, key):
                raise _error(file, f"must have plain LoRA factors, got {key!r}: {reason}")
    factors = {key: match for key in file.entries if (match := _FACTOR.fullmatch(key))}
    if not factors:
        raise _error(file, "must have LoRA factors (lora_A and lora_B, or lora_down and lora_up), got none")
    layout: Layout = (
        "peft"
        if config is not None
        else "kohya"
        if any(m["kohya"] for m in factors.values())
        else "diffusers"
    )
    if layout != "peft" and any(key.startswith(PEFT_PREFIX) for key in factors):
        raise _error(file, "has the names of a PEFT adapter and needs its adapter_config.json beside it")
    pairs: dict[tuple[str | None, str], dict[str, str]] = {}
    alphas: dict[tuple[str | None, str], str] = {}
    for key, match in factors.items():
        found = _module(match, layout)
        side = "up" if (match[match.lastgroup or 0]) in ("B", "up") else "down"
        pair = pairs.setdefault(found, {})
        if side in pair:
            raise _error(file, f"must have one pair of factors for a layer, got {pair[side]!r} and {key!r}")
        pair[side] = key
        if layout != "peft" and (alpha := f"{match['name']}.alpha") in file.entries:
            alphas[found] = alpha
    scales = _Scales(file, layout, config)
    layers = tuple(
        _layer(file, component, name, pair, alphas.get((component, name)), scales)
        for (component, name), pair in pairs.items()
    )
    used = {key for layer in layers for key in (layer.down, layer.up)} | set(alphas.values())
    return layout, layers, tuple(key for key in file.entries if key not in used)


def _error(file: TensorFile, message: str) -> AdapterError:
    return AdapterError(f"{file.path} {message}")


def _module(match: re.Match[str], layout: Layout) -> tuple[str | None, str]:
    """Component and module name of a factor."""
    name = match["name"]
    if layout == "peft":
        return None, name.removeprefix(PEFT_PREFIX)
    if layout == "kohya":
        if found := re.fullmatch(rf"lora_({'|'.join(_KOHYA_COMPONENTS)})_(.+)", name):
            return _KOHYA_COMPONENTS[found[1]], found[2]
        return None, name
    component = None
    if found := re.fullmatch(rf"({_COMPONENTS})\.(.+)", name):
        component, name = found[1], found[2]
    name = name.replace(".processor.", ".")
    if side := match["attention"]:  # attention processors, before diffusers used PEFT
        if component is not None and component.startswith("text_encoder"):
            name += f".{side}_proj"
        else:
            name += ".to_out.0" if side == "out" else f".to_{side}"
    return component, name


def adapted_parameters(targets: Iterable[str] | None, name: str) -> list[str]:
    """Full names of the parameters that PEFT's target_parameters adapt in a module of this name.

    Several adapted parameters of one module are nested, `.base_layer` by `.base_layer`.
    """
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    pairs = (str(target).rpartition(".") for target in targets or ())
    return [
        f"{name}.{parameter}"
        for module, _, parameter in pairs
        if name == module or name.endswith(f".{module}")
    ]


class _Scales:
    """Ranks, scales and experts of layers, from whatever a layout says them with."""

    def __init__(self, file: TensorFile, layout: Layout, config: Mapping[str, Any] | None) -> None:
        self.file = file
        self.config = config
        self.metadata: dict[str, Any] = {}
        if layout == "diffusers" and (text := file.metadata.get("lora_adapter_metadata")):
            try:
                self.metadata = parse_json(text)
                if not isinstance(self.metadata, dict):
                    raise ValueError(f"got {type(self.metadata).__name__}")
            except ValueError as error:
                raise _error(
                    file,
                    f"must have a JSON object as the metadata 'lora_adapter_metadata': {one_line(error)}",
                ) from error

    def of_component(self, component: str | None) -> Mapping[str, Any] | None:
        if self.config is not None or not self.metadata:
            return self.config
        prefix = "" if component is None else f"{component}."
        found = {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}
        return found if "r" in found else None

    def configured(self, component: str | None, name: str) -> tuple[int, float] | None:
        """Rank and scale of a layer from a PEFT configuration, None where there is none."""
        config = self.of_component(component)
        if config is None:
            return None
        if config.get("use_dora"):
            raise _error(self.file, f"must not use DoRA, which rescales the whole weight, at {name!r}")
        try:
            names = adapted_parameters(config.get("target_parameters"), name) or [name]
            found = {
                (
                    pattern_value(config.get("rank_pattern"), each, config["r"]),
                    pattern_value(config.get("alpha_pattern"), each, config.get("lora_alpha", 8)),
                )
                for each in names
            }
            if len(found) > 1:
                raise ValueError(f"one rank and alpha for all parameters of a module, got {sorted(found)}")
            ((rank, alpha),) = found
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"the rank must be an integer >= 1, got {rank!r}")
            scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
            if not math.isfinite(scale):
                raise ValueError(f"lora_alpha must be finite, got {alpha!r}")
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise _error(
                self.file, f"needs a configuration with ranks and alphas: {one_line(error)} at {name!r}"
            ) from error
        return rank, scale

    def is_of_experts(self, name: str) -> bool:
        """Whether PEFT adapts a parameter of this module, and not the module."""
        return bool(adapted_parameters((self.config or {}).get("target_parameters"), name))


def _layer(
    file: TensorFile,
    component: str | None,
    name: str,
    pair: Mapping[str, str],
    alpha_key: str | None,
    scales: _Scales,
) -> LoraLayer:
    if len(pair) < 2:
        (key,) = pair.values()
        raise _error(file, f"must have both factors of a layer, got {key!r} alone")
    down, up = file.entries[pair["down"]], file.entries[pair["up"]]
    for side in pair.values():
        if file.entries[side].dtype not in _FACTOR_DTYPES:
            raise _error(
                file,
                f"must have factors of the types {', '.join(_FACTOR_DTYPES)}, "
                f"got {file.entries[side].dtype} in {side!r}",
            )
    if len(down.shape) < 2 or len(down.shape) != len(up.shape) or 0 in down.shape + up.shape:
        raise _error(
            file,
            "must have factors (k, n, *kernel) and (m, k, 1...) with k >= 1, got shapes "
            f"{down.shape} of {pair['down']!r} and {up.shape} of {pair['up']!r}",
        )
    m, n, columns = up.shape[0], math.prod(down.shape[1:]), up.shape[1]
    if columns != down.shape[0] or any(size != 1 for size in up.shape[2:]):
        grouped = len(up.shape) > 2 and down.shape[0] % columns == 0
        reason = "; the layers of grouped convolutions are not supported" if grouped else ""
        raise _error(
            file,
            f"must have factors (k, n, *kernel) and (m, k, 1...) with the same k, got shapes {down.shape} of "
            f"{pair['down']!r} and {up.shape} of {pair['up']!r}{reason}",
        )
    configured = scales.configured(component, name)
    rank, experts = columns, None
    if configured is not None:
        if scales.is_of_experts(name) and columns % configured[0] == 0:
            rank, experts = configured[0], columns // configured[0]
            experts = experts if experts > 1 else None
        if rank != configured[0]:
            raise _error(
                file,
                f"must have the rank {configured[0]} of the configuration, got {columns} in {pair['down']!r}",
            )
    if alpha_key is not None:
        scale = _alpha(file, alpha_key) / rank
    else:
        scale = 1.0 if configured is None else configured[1]
    return LoraLayer(name, component, pair["down"], pair["up"], (m, n), rank, scale, experts)


def _alpha(file: TensorFile, key: str) -> float:
    shape = file.entries[key].shape
    number = file.read(key).item() if math.prod(shape) == 1 else math.nan  # nothing larger is read
    if not math.isfinite(number):
        raise _error(file, f"must have one finite number in {key!r}, got {number} of shape {shape}")
    return float(number)
