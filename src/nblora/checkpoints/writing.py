"""What a plain LoRA that every engine takes is made of: names, shapes, one rank, rounding (MATH.md §5)."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from nblora.bounds import Norm
from nblora.checkpoints.adapter import BOUNDS_KEY
from nblora.checkpoints.layouts import LAYOUTS, PEFT_PREFIX, Form, Layout
from nblora.checkpoints.lora import DIFFUSERS_WEIGHTS_NAME
from nblora.checkpoints.storage import AdapterError, PathLike
from nblora.contract import TOLERANCE
from nblora.lowrank import LowRank

KOHYA_WEIGHTS_NAME = "lora.safetensors"
_WEIGHTS_NAMES: dict[Layout, str] = {
    "peft": SAFETENSORS_WEIGHTS_NAME,
    "diffusers": DIFFUSERS_WEIGHTS_NAME,
    "kohya": KOHYA_WEIGHTS_NAME,
}
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",  # what kohya's scripts call every denoiser
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def exported_file(out_dir: PathLike, layout: Layout) -> Path:
    """The weights that `export_lora` writes."""
    return Path(out_dir) / _WEIGHTS_NAMES[layout]


def checked_rank(rank: Any) -> int:
    """A Python int, also of NumPy's integers, which JSON cannot hold."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got rank={rank!r}")
    return int(rank)


def checked_layout(layout: Any) -> Layout:
    """Refuse a layout outside its rule."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got layout={layout!r}")
    found: Layout = layout
    return found


def check_component(component: Any) -> None:
    """Refuse a component outside its rule."""
    if component is not None and not (isinstance(component, str) and re.fullmatch(r"\w+", component)):
        raise ValueError(f"component must be a name without dots or slashes, got component={component!r}")


def check_apart(source: Path, out_dir: Path) -> None:
    """Refuse to replace what is read: an adapter can be trained further, and a LoRA made of it cannot."""
    if not source.exists() or not out_dir.is_dir():
        return
    if (source if source.is_dir() else source.parent).samefile(out_dir):
        raise AdapterError(f"the folder to write must be another one than that of the adapter, got {out_dir}")


def bounds_metadata(norm: Norm, bounds: Mapping[str, Sequence[float] | float]) -> dict[str, str]:
    """What the metadata of a file says of its bounds, for `certify`.

    Args:
        bounds: absolute, by the names that the layers have in the file; of experts one for each.
    """
    return {BOUNDS_KEY: json.dumps({"norm": norm.name, "bounds": dict(sorted(bounds.items()))})}


def plain_config(rank: int, **options: Any) -> LoraConfig:
    """PEFT's configuration of a LoRA with one rank and the scale 1 everywhere, as serving engines want it."""
    lora = LoraConfig(r=rank, lora_alpha=rank, inference_mode=True, **options)
    for field in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(lora, field), set):
            setattr(lora, field, sorted(names))  # a set would be written in another order each time
    return lora


class PeftNames:
    """Names and shapes of PEFT's layout."""

    def noted(self, name: str) -> str:
        return name

    def tensors(self, name: str, form: Form, factors: list[LowRank]) -> dict[str, Tensor]:
        down, up = _shaped(form, factors)
        if form.embedding:
            return {
                f"{PEFT_PREFIX}{name}.lora_embedding_A": down,
                f"{PEFT_PREFIX}{name}.lora_embedding_B": up,
            }
        return {f"{PEFT_PREFIX}{name}.lora_A.weight": down, f"{PEFT_PREFIX}{name}.lora_B.weight": up}


class FileNames:
    """Names and shapes of diffusers' and kohya's layouts."""

    def __init__(self, layout: Layout, component: str) -> None:
        self.layout = layout
        self.component = component
        if layout == "kohya" and component not in _KOHYA_PREFIXES:
            raise ValueError(
                f"component must be one of {', '.join(_KOHYA_PREFIXES)} in kohya's layout, "
                f"got component={component!r}"
            )

    def noted(self, name: str) -> str:
        if self.layout == "diffusers":
            return f"{self.component}.{name}"
        component = {"lora_unet": "unet"}.get(_KOHYA_PREFIXES[self.component], self.component)
        return f"{component}.{name.replace('.', '_')}"

    def tensors(self, name: str, form: Form, factors: list[LowRank]) -> dict[str, Tensor]:
        if form.embedding or len(factors) > 1:
            raise AdapterError(
                f"the {self.layout} layout must be of linear layers and convolutions, got {name!r}, "
                + ("an embedding" if form.embedding else "of experts")
            )
        down, up = _shaped(form, factors)
        if self.layout == "diffusers":
            key = f"{self.component}.{name}"
            return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        key = f"{_KOHYA_PREFIXES[self.component]}_{name.replace('.', '_')}"
        alpha = torch.tensor(float(up.shape[1]))  # in half precision 259 would be 260
        return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def _shaped(form: Form, factors: list[LowRank]) -> tuple[Tensor, Tensor]:
    """A and B as LoRA stores them."""
    down = torch.cat([factor.right for factor in factors])  # experts after each other
    up = torch.stack([factor.left for factor in factors], -1).flatten(1)  # and side by side
    if not form.kernel:
        return down, up
    return down.reshape(len(down), -1, *form.kernel), up.reshape(*up.shape, *(1 for _ in form.kernel))


def padded(factors: LowRank, rank: int) -> LowRank:
    missing = rank - factors.rank
    pad = nn.functional.pad
    return LowRank(pad(factors.left, (0, missing)), pad(factors.right, (0, 0, 0, missing)))


def rounded(update: LowRank, norm: Norm, bound: float | None, dtype: torch.dtype, name: str) -> LowRank:
    """Factors in `dtype` whose product, measured in float64, keeps the bound, where there is one.

    Raises:
        AdapterError: if the update is not finite, before or after rounding, or does not keep its bound.
    """
    exact = norm.value(update.singular_values()).item()
    if not exact < math.inf or (bound is not None and not exact <= bound * (1 + TOLERANCE)):
        rule = "be finite" if bound is None else "be finite and keep its bound"
        raise AdapterError(
            f"the update of layer {name!r} must {rule}, got norm {exact!r}"
            + ("" if bound is None else f" and bound {bound!r}")
        )
    left, right = update.left.double(), update.right.double()
    # equal norms of both sides round best; a zero side stays as it is
    ratio = left.norm(dim=-2) / right.norm(dim=-1)
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    left, right = left / balance, right * balance[:, None]
    shrink = 1.0
    while True:
        factors = LowRank((left * shrink).to(dtype), right.to(dtype))
        value = norm.value(factors.singular_values()).item()
        if not value < math.inf:
            raise AdapterError(f"the update of layer {name!r} must be finite in {dtype}, got norm {value!r}")
        if bound is None or value <= bound:
            return factors
        shrink *= bound / value * (1 - torch.finfo(dtype).eps / 8)


def export_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    named = {
        str(d).removeprefix("torch."): d
        for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    if dtype is None:
        return torch.float32
    found = named.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(named)}, got dtype={dtype!r}")
    return found
