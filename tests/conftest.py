"""What every test shares: quiet, offline, seeded; and small models built from configurations."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from nblora import Certificate

torch.set_num_threads(1)  # tests run in parallel processes


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _has_no_ball(item: pytest.Item) -> bool:
    """Whether a test is parametrized with a norm that its parametrization, "radial", does not have."""
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    norm = params.get("norm", "frobenius")
    return params.get("parametrization") == "radial" and getattr(norm, "name", norm) not in ("frobenius", 2.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _has_no_ball(item)]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class TwoLayers(nn.Module):
    """The smallest model with two linear layers of different shape."""

    def __init__(self, n: int = 12, hidden: int = 20, m: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(n, hidden)
        self.second = nn.Linear(hidden, m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def assert_loss_falls_from_a_gradient_start(model: nn.Module, ids: torch.Tensor) -> None:
    """Of an adapted language model; and the update is inside its bound."""
    from nblora import certify, start_at_gradient

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    before = loss().item()
    start_at_gradient(model, lambda: loss().backward(), step=0.1)
    assert loss().item() < before - 0.01
    assert certify(model).holds


def assert_same_certificate(
    first: Certificate, second: Certificate, *, exactly: bool = False, rel: float = 1e-4
) -> None:
    """Equal, or up to what processors round differently."""
    if exactly:
        assert first == second
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    for one, other in zip(first.layers, second.layers):
        assert one.norm == pytest.approx(other.norm, rel=rel, abs=1e-6)
        assert one.bound == pytest.approx(other.bound, rel=1e-6)


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its layers are transformers' Conv1D, which store (in, out) weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM"
    )
    torch.manual_seed(1)
    return GPT2LMHeadModel(config).to(dtype).eval()


def tokens(count: int = 2, length: int = 7, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))
