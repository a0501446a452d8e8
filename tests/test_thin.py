"""Merging apart, nothing forms or decomposes a matrix as large as a weight: updates stay thin factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import TwoLayers
from nblora import NBLoraConfig, certify, clip_lora, export_lora, import_lora, inspect_lora
from nblora.lowrank import LowRank
from nblora.parametrizations import Parametrization
from nblora.tuner import nblora_layers

M, N, K = 300, 400, 4  # also the other way round, in the second layer
LARGE = min(M, N)
THIN = K * N * 4  # elements: room for both factors of some adapters
DECOMPOSITIONS = ("linalg", "svd", "qr", "eig", "cholesky", "inverse", "lstsq", "pinverse", "lu_", "solve")

METHODS = [
    ("frobenius", "joint"),
    ("spectral", "svd"),
    ("nuclear", "joint"),
    ("ky-fan-2", "svd"),
    (3.0, "joint"),
]


class Recorder(TorchDispatchMode):
    """What operations make, and what they decompose, that is as large as a weight.

    Attributes:
        formed: operations whose result has two dimensions of the size of a weight's, or more elements than
            thin factors have.
        decomposed: decompositions of such a tensor.
        count: of all operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.formed: list[str] = []
        self.decomposed: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += 1
        name = str(function)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        memory = {leaf.untyped_storage().data_ptr() for leaf in given}
        for tensor in tree_leaves(result):
            # not views of what is there already, such as a base weight
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in memory:
                self._note(self.formed, name, tensor)
        if any(part in name for part in DECOMPOSITIONS) and "linalg_vector_norm" not in name:
            for tensor in given:
                self._note(self.decomposed, name, tensor)
        return result

    @staticmethod
    def _note(where: list[str], name: str, tensor: Tensor) -> None:
        if sum(size >= LARGE for size in tensor.shape) > 1 or tensor.numel() > THIN:
            where.append(f"{name} {tuple(tensor.shape)}")


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TwoLayers(n=N, hidden=M, m=N)


def options(norm: str | float, parametrization: Parametrization) -> dict[str, Any]:
    return {
        "r": K,
        "norm": norm,
        "parametrization": parametrization,
        "target_modules": ["first", "second"],
        "bound": 0.5,
        "bound_kind": "absolute",
    }


def trained(norm: str | float, parametrization: Parametrization) -> PeftModel:
    """A model with an adapter that is not zero."""
    model = get_peft_model(plain(), NBLoraConfig(**options(norm, parametrization)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lora(folder: Path) -> Path:
    """A plain LoRA from PEFT, far outside any bound."""
    model = get_peft_model(plain(), LoraConfig(r=K, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def recorded(act: Callable[[], Any]) -> Recorder:
    with Recorder() as recorder:
        act()
    assert recorder.count > 10
    return recorder


def check(act: Callable[[], Any]) -> None:
    recorder = recorded(act)
    assert not recorder.formed
    assert not recorder.decomposed


@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_measuring_and_exporting_stay_thin(
    norm: str | float, parametrization: Parametrization, tmp_path: Path
) -> None:
    model = trained(norm, parametrization)
    model.save_pretrained(tmp_path / "adapter")
    check(lambda: certify(model))
    check(lambda: certify(tmp_path / "adapter"))
    for dtype in (torch.float32, torch.bfloat16):
        check(lambda dtype=dtype: export_lora(model, tmp_path / "lora", dtype=dtype))
    check(lambda: export_lora(tmp_path / "adapter", tmp_path / "lora", rank=2 * K))
    check(lambda: export_lora(tmp_path / "adapter", tmp_path / "unet", layout="kohya", component="unet"))
    check(lambda: certify(tmp_path / "lora"))
    check(lambda: certify(tmp_path / "unet"))
    for layer in nblora_layers(model, "default").values():
        check(lambda layer=layer: layer.warn_if_run_away("default"))


@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_files_stay_thin(norm: str | float, parametrization: Parametrization, tmp_path: Path) -> None:
    source = lora(tmp_path / "lora")
    check(lambda: clip_lora(source, tmp_path / "clipped", bound=0.5, norm=norm))
    check(lambda: inspect_lora(source))
    check(lambda: inspect_lora(tmp_path / "clipped"))
    check(
        lambda: import_lora(
            source,
            tmp_path / "adapter",
            bound=0.5,
            norm=norm,
            parametrization=parametrization,
            bound_kind="absolute",
        )
    )
    assert certify(tmp_path / "adapter").holds


@pytest.mark.parametrize("base", ["model", "file"])
def test_base_weights_are_read_and_never_decomposed(base: str, tmp_path: Path) -> None:
    """Relative bounds need their spectral norms."""
    source = lora(tmp_path / "lora")
    model: nn.Module | Path = plain()
    if base == "file":
        save_file(plain().state_dict(), tmp_path / "model.safetensors")
        model = tmp_path / "model.safetensors"
    for act in (
        lambda: inspect_lora(source, base=model),
        lambda: clip_lora(source, tmp_path / "clipped", bound=0.3, bound_kind="relative", base=model),
        lambda: import_lora(source, tmp_path / "adapter", bound=0.3, base=model),
    ):
        recorder = recorded(act)
        assert not recorder.decomposed
        assert not [made for made in recorder.formed if "mm" in made]


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_sums_of_adapters_stay_thin(norm: str | float, parametrization: Parametrization, kind: str) -> None:
    model = trained(norm, parametrization)
    model.add_adapter("other", NBLoraConfig(**options(norm, parametrization)))
    tuner = model.base_model
    check(lambda: tuner.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", kind, bound=0.5))
    check(lambda: certify(model, "sum"))


@pytest.mark.parametrize(("norm", "parametrization"), METHODS)
def test_new_adapters_stay_thin(norm: str | float, parametrization: Parametrization) -> None:
    model = plain()
    recorder = recorded(lambda: get_peft_model(model, NBLoraConfig(**options(norm, parametrization))))
    assert not recorder.decomposed
    assert not recorder.formed


def test_relative_bounds_do_not_decompose_the_weight() -> None:
    choices = options("frobenius", "joint") | {"bound_kind": "relative"}
    recorder = recorded(lambda: get_peft_model(plain(), NBLoraConfig(**choices)))
    assert not recorder.decomposed


# --- the tests of the tests above ---


def test_merging_forms_the_update() -> None:
    """Its result is one. It is formed from the factors, not decomposed."""
    model = trained("frobenius", "joint")
    layer = model.base_model.model.first
    for act in (lambda: layer.get_delta_weight("default"), lambda: layer.merge()):
        recorder = recorded(act)
        assert recorder.formed
        assert not recorder.decomposed


@pytest.mark.parametrize(
    "act",
    [
        torch.linalg.svdvals,
        torch.linalg.qr,
        lambda x: torch.linalg.matrix_norm(x, 2),
        lambda x: torch.linalg.eigvalsh(x @ x.mT),
        lambda x: torch.linalg.pinv(x),
        LowRank.from_dense,
    ],
)
def test_decompositions_of_a_weight_are_seen(act: Callable[[Tensor], Any]) -> None:
    weight = torch.randn(M, N)
    with Recorder() as recorder:
        act(weight)
    assert recorder.decomposed


def test_products_and_copies_are_seen() -> None:
    weight, thin = torch.randn(M, N), torch.randn(K, N)
    for act in (weight.clone, weight.double, lambda: weight @ weight.mT, lambda: thin.mT @ thin):
        with Recorder() as recorder:
            act()
        assert recorder.formed
    with Recorder() as recorder:
        _ = weight[:5].detach() @ thin.mT, weight.mT, weight.view(-1)
    assert not recorder.formed
