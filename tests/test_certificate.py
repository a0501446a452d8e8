"""Certificates: right numbers from models and folders, and no certificate from what cannot be trusted."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import TwoLayers, tiny_gpt2, tiny_llama
from nblora import Certificate, NBLoraConfig, certify, export_lora
from nblora.certificate import TOLERANCE, LayerCertificate
from nblora.checkpoints import AdapterError
from nblora.tuner import nblora_layers

EPS = torch.finfo(torch.float32).eps
LAYER = "model.layers.0.self_attn.q_proj"


def adapted(base: nn.Module | None = None, **choices: Any) -> PeftModel:
    """A model with a random update in every layer."""
    torch.manual_seed(5)
    config = NBLoraConfig(**({"target_modules": "all-linear", "r": 4, "init_weights": False} | choices))
    return get_peft_model(base or tiny_llama(), config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def weights_file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(weights_file(folder))
    change(tensors)
    save_file(tensors, weights_file(folder), metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def key(part: str, layer: str = LAYER) -> str:
    return f"base_model.model.{layer}.nblora_{part}.weight"


# --- what a certificate says ------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["joint", "svd", "radial"])
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear", 3.5, "ky-fan-2"])
@pytest.mark.parametrize("bound_kind", ["relative", "absolute"])
def test_a_model_and_its_folder_have_the_same_certificate(
    bound_kind: str, norm: Any, parametrization: str, tmp_path: Path
) -> None:
    model = adapted(norm=norm, parametrization=parametrization, bound_kind=bound_kind, temperature=0.5)
    model.save_pretrained(tmp_path)
    certificate = certify(model)
    assert certificate == certify(tmp_path) == certify(str(tmp_path))
    assert certificate.holds
    assert certificate.norm_name == {3.5: "schatten-3.5"}.get(norm, norm)
    assert len(certificate.layers) == 14


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_singular_values_are_those_of_the_dense_update(build: Callable[[], nn.Module]) -> None:
    targets = "all-linear" if build is tiny_llama else ["c_attn", "c_fc"]
    model = adapted(build(), target_modules=targets, rank_pattern={r".*1\..*": 2})
    modules = nblora_layers(model, "default")
    certificate = certify(model)
    assert len(certificate.layers) == len(modules)
    for layer in certificate.layers:
        module = modules[f"base_model.model.{layer.name}"]
        m, n = module.out_in_features
        factors = module.low_rank_update("default")
        exact = torch.linalg.svdvals(factors.left.detach().double() @ factors.right.detach().double())
        measured = torch.tensor(layer.singular_values, dtype=torch.float64)
        rounding = 10 * max(m, n) * torch.finfo(torch.float64).eps
        torch.testing.assert_close(
            measured, exact[: layer.rank], rtol=rounding, atol=rounding * exact[0].item()
        )
        assert layer.shape == (m, n)
        assert layer.rank == module.r["default"]
        assert layer.norm == pytest.approx(exact.square().sum().sqrt().item(), rel=rounding)
        assert layer.bound == module.radius("default").item()
        assert layer.slack == layer.bound - layer.norm > 0
        assert layer.share == layer.norm / layer.bound
        assert layer.holds


def test_a_zero_update_uses_nothing_of_its_bound() -> None:
    certificate = certify(adapted(init_weights=True))
    assert certificate.holds
    assert all(layer.norm == 0 and layer.share == 0 for layer in certificate.layers)
    assert all(layer.bound > 0 for layer in certificate.layers)


def test_a_zero_bound_holds_for_a_zero_update_only() -> None:
    kept = LayerCertificate("a", (2, 3), 1, (0.0,), 0.0, 0.0)
    broken = LayerCertificate("a", (2, 3), 1, (1e-30,), 1e-30, 0.0)
    assert (kept.holds, kept.share) == (True, 0.0)
    assert (broken.holds, broken.share) == (False, float("inf"))
    json.loads(Certificate("spectral", (kept, broken)).to_json())


def test_what_counts_as_rounding() -> None:
    def holds(value: float) -> bool:
        return LayerCertificate("a", (2, 3), 1, (value,), value, 1.0).holds

    assert holds(1.0)
    assert holds(1 + TOLERANCE / 2)
    assert not holds(1 + 2 * TOLERANCE)
    assert not holds(float("inf"))
    assert not holds(float("nan"))
    assert not LayerCertificate("a", (2, 3), 1, (0.1,), 0.1, float("nan")).holds


def test_layers_come_in_natural_order() -> None:
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    model = adapted(base, target_modules=[str(i) for i in range(12)])
    assert [layer.name for layer in certify(model).layers] == [str(i) for i in range(12)]


def test_every_adapter_has_its_own_certificate() -> None:
    model = adapted()
    model.add_adapter("other", NBLoraConfig(target_modules=["q_proj"], norm="nuclear", bound=2.0, r=3))
    assert len(certify(model).layers) == 14
    other = certify(model, "other")
    assert {layer.name for layer in other.layers} == {LAYER, LAYER.replace("0", "1")}
    assert other.norm_name == "nuclear"
    assert all(layer.rank == 3 for layer in other.layers)


def test_doors_to_a_model(tmp_path: Path) -> None:
    """A PeftModel, its inner model, layers injected by transformers, and a model wrapped for training."""
    model = adapted()
    certificate = certify(model)
    assert certify(nn.DataParallel(model)) == certificate
    model.save_pretrained(tmp_path)
    transformers_model = tiny_llama()
    transformers_model.load_adapter(str(tmp_path))
    assert certify(transformers_model) == certificate


def test_measuring_leaves_the_model_as_it_is() -> None:
    model = adapted().train()
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    certify(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_merged_model_has_the_same_certificate() -> None:
    model = adapted()
    certificate = certify(model)
    model.merge_adapter()
    assert certify(model) == certificate


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16], ids=lambda c: c.__name__)
def test_a_cast_model_still_holds(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(norm="spectral")
    bounds = [layer.bound for layer in certify(model).layers]
    cast(model)
    certificate = certify(model)
    assert certificate.holds
    assert [layer.bound for layer in certificate.layers] == bounds


# --- broken promises --------------------------------------------------------------------------------


def poison(part: str, value: float, folder: Path) -> tuple[str, list[Certificate]]:
    """A layer with a poisoned parameter, and the certificates of the model and of its folder."""
    model = adapted()
    name = LAYER.replace("0", "1")
    layer = nblora_layers(model, "default")[f"base_model.model.{name}"]
    with torch.no_grad():
        getattr(layer, f"nblora_{part}")["default"].weight.view(-1)[0] = value
    change_tensors(folder, lambda tensors: tensors[key(part, name)].view(-1)[0].fill_(value))
    return name, [certify(model), certify(folder)]


@pytest.mark.parametrize("part", ["in", "out", "scale"])
def test_nan_parameters_never_hold(part: str, folder: Path) -> None:
    name, certificates = poison(part, torch.nan, folder)
    for certificate in certificates:
        assert [layer.name for layer in certificate.layers if not layer.holds] == [name]
        assert not certificate.holds
        assert certificate.summary == f"1 of 14 layers break their bound, first {name!r}."
        assert "NO" in certificate.to_table()
        parsed = json.loads(certificate.to_json(), parse_constant=pytest.fail)  # NaN is no JSON
        assert parsed["holds"] is False
        assert [layer["name"] for layer in parsed["layers"] if not layer["holds"]] == [name]


@pytest.mark.parametrize("part", ["in", "out", "scale"])
def test_infinite_parameters_hold_only_where_the_update_is_a_bounded_one(part: str, folder: Path) -> None:
    _, certificates = poison(part, torch.inf, folder)
    for certificate in certificates:
        json.loads(certificate.to_json(), parse_constant=pytest.fail)
        for layer in certificate.layers:
            bounded = torch.tensor(layer.singular_values).norm().item() <= layer.bound * (1 + TOLERANCE)
            assert layer.holds == bounded


@pytest.mark.parametrize("factor", [1.01, 10.0])
def test_a_radius_above_an_absolute_bound_is_found_out(factor: float, tmp_path: Path) -> None:
    model = adapted(
        bound=0.7,
        bound_kind="absolute",
        norm="spectral",
        parametrization="svd",
        bound_pattern={"v_proj": 2.0},
    )
    with torch.no_grad():  # every singular value at its bound
        for layer in nblora_layers(model, "default").values():
            layer.nblora_angle["default"].weight.fill_(torch.pi / 2 / math.sqrt(layer.out_in_features[0]))
    model.save_pretrained(tmp_path)
    honest = certify(tmp_path)
    assert honest.holds
    assert all(layer.share > 1 - 10 * 48 * EPS for layer in honest.layers)
    assert {layer.bound for layer in honest.layers if layer.name.endswith("v_proj")} == {2.0}
    change_tensors(tmp_path, lambda tensors: tensors[key("radius")].mul_(factor))
    certificate = certify(tmp_path)
    assert not certificate.holds
    (broken,) = [layer for layer in certificate.layers if not layer.holds]
    assert broken.name == LAYER
    assert broken.bound == 0.7
    assert broken.share == pytest.approx(factor, rel=1e-5)


def test_a_radius_that_is_nan_never_holds(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[key("radius")].fill_(torch.nan))
    certificate = certify(folder)
    assert [layer.name for layer in certificate.layers if not layer.holds] == [LAYER]
    json.loads(certificate.to_json(), parse_constant=pytest.fail)
    assert LAYER in certificate.to_table()


# --- text and JSON ----------------------------------------------------------------------------------


def test_table_and_json_mention_every_layer() -> None:
    certificate = certify(adapted())
    table = certificate.to_table()
    rows = table.splitlines()
    parsed = json.loads(certificate.to_json(), parse_constant=pytest.fail)
    assert parsed["holds"] is True
    assert parsed["norm_name"] == "frobenius"
    assert parsed["tolerance"] == TOLERANCE
    assert len(parsed["layers"]) == 14
    for layer, found in zip(certificate.layers, parsed["layers"], strict=True):
        assert sum(row.startswith(f"{layer.name} ") for row in rows) == 1
        assert found["name"] == layer.name
        assert found["shape"] == list(layer.shape)
        assert found["singular_values"] == list(layer.singular_values)  # no digit is lost
        assert (found["norm"], found["bound"]) == (layer.norm, layer.bound)
        assert (found["slack"], found["share"]) == (layer.slack, layer.share)
        assert found["holds"] is True
    assert rows[-1] == certificate.summary
    assert certificate.summary.startswith("All 14 layers keep their bound; ")
    fullest = max(certificate.layers, key=lambda layer: layer.share)
    assert repr(fullest.name) in certificate.summary


# --- what is no adapter of ours ---------------------------------------------------------------------


def refused(source: Any, *parts: str, adapter: str = "default") -> None:
    """An AdapterError of one line that has all the parts."""
    with pytest.raises(AdapterError) as error:
        certify(source, adapter)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("part", ["in", "out", "radius", "scale"])
def test_a_missing_tensor_is_refused(part: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__(key(part)))
    refused(folder, WEIGHTS, LAYER, "must have the tensors")


def test_a_missing_angle_is_refused(tmp_path: Path) -> None:
    adapted(parametrization="svd").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.__delitem__(key("angle")))
    refused(tmp_path, WEIGHTS, LAYER, "angle")


def test_tensors_of_another_norm_are_refused(folder: Path) -> None:
    change_config(folder, norm="spectral")  # which has no learnable bounds
    refused(folder, WEIGHTS, "must have the tensors")
    change_config(folder, norm="nuclear", parametrization="svd")
    refused(folder, WEIGHTS, "must have the tensors", "angle")


def test_a_negative_radius_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[key("radius")].neg_())
    refused(folder, WEIGHTS, LAYER, "must not be negative")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("in", lambda t: t[:2]),
        ("in", lambda t: t[0]),
        ("in", lambda t: t[:0]),
        ("in", lambda t: t.to(torch.int64)),
        ("out", lambda t: t[:, :2]),  # fewer columns than the rank
        ("out", lambda t: t[:3]),
        ("out", lambda t: t[None]),
        ("scale", lambda t: t[:2]),
        ("scale", lambda t: t[None]),
        ("radius", lambda t: t[None]),
        ("radius", lambda t: t.to(torch.int32)),
    ],
)
def test_tensors_of_a_wrong_shape_are_refused(
    part: str, change: Callable[[Tensor], Tensor], folder: Path
) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[key(part)] = change(tensors[key(part)]).contiguous()

    change_tensors(folder, shrink)
    refused(folder, WEIGHTS, LAYER, "must have floating-point tensors")


def test_no_layers_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.clear())
    refused(folder, WEIGHTS, "must have adapted layers, got none")


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_weights_file_is_refused(keep: int, folder: Path) -> None:
    content = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(content[:keep])
    refused(folder, str(weights_file(folder)), "must be an intact safetensors file")


def test_garbage_for_weights_is_refused(folder: Path) -> None:
    weights_file(folder).write_bytes(bytes(range(256)) * 4)
    refused(folder, str(weights_file(folder)), "must be an intact safetensors file")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, f"must have {name}", str(folder))


def test_the_weights_file_stands_for_its_folder(folder: Path) -> None:
    assert certify(weights_file(folder)) == certify(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', "{}", '{"r": 8}', b"\xff\xfe\x00", '{"peft_type": }']
)
def test_a_configuration_that_is_none_is_refused(content: str | bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, str(folder / CONFIG), "must be a PEFT adapter configuration")


@pytest.mark.parametrize("kind", ["IA3", "nblora", None, 7, ["NBLORA"], {}])
def test_another_method_is_refused(kind: Any, folder: Path) -> None:
    change_config(folder, peft_type=kind)
    refused(folder, str(folder / CONFIG), "must be of an NB-LoRA adapter", repr(kind))


@pytest.mark.parametrize(
    "values",
    [{"bound": -1.0}, {"bound": float("nan")}, {"norm": "operator"}, {"bound_pattern": 3}, {"r": "8"}],
)
def test_a_configuration_with_broken_values_is_refused(values: dict[str, Any], folder: Path) -> None:
    change_config(folder, **values)
    refused(folder, str(folder / CONFIG), "is not valid", *values)


@pytest.mark.parametrize(
    "values",
    [{"bound": 10**400}, {"norm": 10**400}, {"bound_pattern": {"q_proj": 10**400}}, {"target_parameters": 5}],
    ids=str,
)
def test_values_beyond_their_types_are_refused(values: dict[str, Any], folder: Path) -> None:
    change_config(folder, **values)
    refused(folder, str(folder / CONFIG), "numbers must be finite" if 5 not in values.values() else "got 5")


def test_a_deeply_nested_configuration_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000 + "]" * 100_000)
    refused(folder, str(folder / CONFIG), "nested too deeply")


@pytest.mark.parametrize("source", [5, None])
def test_what_is_no_source_is_refused(source: Any, tmp_path: Path) -> None:
    refused(source, repr(source))
    with pytest.raises(AdapterError, match=f"an adapter must be .* got {source!r}"):
        export_lora(source, tmp_path / "out")


def test_a_plain_lora_without_bounds_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    refused(tmp_path, str(tmp_path / WEIGHTS), "a plain LoRA has no bounds to certify")


def test_pickled_weights_are_refused_and_never_loaded(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "exploded",))

    torch.save({"bomb": Bomb()}, folder / "adapter_model.bin")
    weights_file(folder).unlink()
    refused(folder, f"must have {WEIGHTS}", str(folder))
    assert not (folder / "exploded").exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)  # the bomb is live
    assert (folder / "exploded").exists()


def test_a_repository_that_cannot_be_reached_is_refused() -> None:
    refused("nobody/no-such-adapter", "'nobody/no-such-adapter'", CONFIG, "hub repository")


@pytest.mark.parametrize("source", ["no-such-folder", "./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(source, "must be a folder or a hub repository", repr(source))


def test_an_unknown_adapter_of_a_model_is_refused() -> None:
    model = adapted()
    model.add_adapter("other", NBLoraConfig(target_modules=["q_proj"]))
    refused(model, "['default', 'other']", "'third'", adapter="third")


def test_a_model_without_our_adapters_is_refused() -> None:
    refused(TwoLayers(), "[]", "'default'")
    refused(get_peft_model(TwoLayers(), LoraConfig(target_modules=["first"])), "[]", "'default'")


# --- exported LoRA ----------------------------------------------------------------------------------


def test_an_export_has_the_certificate_of_its_source(tmp_path: Path) -> None:
    model = adapted(rank_pattern={"q_proj": 2}, bound_pattern={"v_proj": 0.05})
    source, exported = certify(model), certify(export_lora(model, tmp_path))
    assert exported.holds
    assert exported.norm_name == source.norm_name
    for ours, theirs in zip(source.layers, exported.layers, strict=True):
        assert (ours.name, ours.shape, ours.bound) == (theirs.name, theirs.shape, theirs.bound)
        slack = 10 * max(ours.shape) * EPS
        assert theirs.norm == pytest.approx(ours.norm, rel=slack)
        first = torch.tensor(theirs.singular_values)[: ours.rank]
        atol = slack * ours.singular_values[0]
        torch.testing.assert_close(first, torch.tensor(ours.singular_values), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        "{}",
        '{"norm": "operator", "bounds": {}}',
        f'{{"norm": {10**400}, "bounds": {{}}}}',
        "[" * 100_000 + "]" * 100_000,
    ],
    ids=range(6),
)
def test_damaged_bounds_of_an_export_are_refused(metadata: str, tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path)
    tensors = load_file(weights_file(tmp_path))
    save_file(tensors, weights_file(tmp_path), metadata={"format": "pt", "nblora_bounds": metadata})
    refused(tmp_path, WEIGHTS, "nblora_bounds", "damaged")


@pytest.mark.parametrize(
    "bounds",
    [{}, {LAYER: "much"}, {LAYER: None}, {LAYER: -1.0}, {"no.such.layer": 1.0}],
)
def test_bounds_of_an_export_that_do_not_fit_are_refused(bounds: dict[str, Any], tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path)
    tensors = load_file(weights_file(tmp_path))
    metadata = {"format": "pt", "nblora_bounds": json.dumps({"norm": "frobenius", "bounds": bounds})}
    save_file(tensors, weights_file(tmp_path), metadata=metadata)
    refused(tmp_path, WEIGHTS)


@pytest.mark.parametrize(
    "damage",
    [
        {"r": 0},
        {"rank_pattern": {"q_proj": 0}},
        {"lora_alpha": "6"},
        {"alpha_pattern": {"q_proj": None}},
        {"rank_pattern": {"(": 4}},
    ],
)
def test_damaged_ranks_of_an_export_are_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    export_lora(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(AdapterError) as error:
        certify(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
