"""What `speed.py` measures: models of Llama's shape or bare linear layers, and methods that adapt them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from peft import (
    BOFTConfig,
    DeloraConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from speed_figures import Unavailable
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nblora import NBLoraConfig

HEAD = 64
SEQUENCE = 1024
"""The longest sequence; more tokens are a batch of several."""


@dataclass(frozen=True)
class Cell:
    """Everything that a measurement depends on but the method.

    Attributes:
        model: "llama", or "stack" for bare linear layers.
        layers: blocks of the Llama, each with seven linear layers, or linear layers of the stack.
        tokens: of one micro-batch.
        dtype: of the whole base model; there is no autocast.
        checkpointing: "off", "non-reentrant" or "reentrant".
        accumulation: micro-batches of a train step.
        intermediate: of the Llama's MLP; 0 for 8/3 of the hidden size, rounded up to 256.
        kv_heads: of the Llama; 0 for a quarter of the heads.
        vocabulary: of the Llama. A small one, so that its output layer, the same for all, weighs little.
    """

    model: str = "llama"
    hidden: int = 512
    layers: int = 2
    tokens: int = 1024
    rank: int = 16
    dtype: str = "float32"
    checkpointing: str = "off"
    accumulation: int = 1
    compile: bool = False
    device: str = "cpu"
    intermediate: int = 0
    kv_heads: int = 0
    vocabulary: int = 512

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Sequences and tokens of each."""
        if self.tokens > SEQUENCE and self.tokens % SEQUENCE:
            raise ValueError(f"tokens beyond {SEQUENCE} must be a multiple of it, got tokens={self.tokens}")
        sequence = min(self.tokens, SEQUENCE)
        return self.tokens // sequence, sequence

    @property
    def adapted(self) -> int:
        """How many linear layers every method must adapt."""
        return 7 * self.layers if self.model == "llama" else self.layers

    def __str__(self) -> str:
        parts = [
            f"{self.model} hidden {self.hidden}, {self.layers} layers, {self.tokens} tokens, r {self.rank}"
        ]
        parts += [self.dtype, self.device]
        if self.checkpointing != "off":
            parts.append(f"{self.checkpointing} checkpointing")
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} micro-batches")
        if self.compile:
            parts.append("compiled")
        return ", ".join(parts)


class Stack(nn.Module):
    """Residual linear layers of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def llama_config(cell: Cell) -> LlamaConfig:
    heads = max(1, cell.hidden // HEAD)
    return LlamaConfig(
        hidden_size=cell.hidden,
        intermediate_size=cell.intermediate or -(-(8 * cell.hidden // 3) // 256) * 256,
        num_hidden_layers=cell.layers,
        num_attention_heads=heads,
        num_key_value_heads=cell.kv_heads or max(1, heads // 4),
        vocab_size=cell.vocabulary,
        max_position_embeddings=2 * SEQUENCE,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def base_model(cell: Cell) -> nn.Module:
    """The model before adaptation, with random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(cell.torch_dtype)
    try:
        with torch.device(cell.device):
            if cell.model == "llama":
                return LlamaForCausalLM(llama_config(cell))
            return Stack(cell.hidden, cell.layers)
    finally:
        torch.set_default_dtype(before)


def batch(cell: Cell) -> Tensor:
    """Token ids, or the input of the first linear layer."""
    generator = torch.Generator().manual_seed(1)
    if cell.model == "llama":
        ids = torch.randint(cell.vocabulary, cell.batch_shape, generator=generator)
        return ids.to(cell.device)
    x = torch.randn(cell.tokens, cell.hidden, generator=generator)
    return x.to(cell.device, cell.torch_dtype)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    if inputs.is_floating_point():
        loss: Tensor = model(inputs).square().mean()
        return loss
    loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    return loss


# ------------------------------------------------------------------------------------------ methods

Make = Callable[[int, str], PeftConfig]
"""Of a rank and target modules."""


def _lora(rank: int, targets: str, **options: object) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options)


def _psoft(rank: int, targets: str) -> PeftConfig:
    if not hasattr(peft, "PsoftConfig"):
        raise Unavailable(f"PEFT {peft.__version__} has no PSOFT")
    # its randomised start: the exact one decomposes every weight, which `create` shows for PiSSA
    return peft.PsoftConfig(r=rank, psoft_alpha=rank, psoft_svd="lowrank", target_modules=targets)


def _nblora(rank: int, targets: str, **options: object) -> PeftConfig:
    return NBLoraConfig(r=rank, target_modules=targets, **options)


REFERENCE = "LoRA"
FULL = "full fine-tuning"
FROZEN = "frozen"
JOINT = "NB-LoRA joint"
SVD = "NB-LoRA svd"

METHODS: dict[str, Make | None] = {
    FULL: None,
    FROZEN: None,
    REFERENCE: _lora,
    "rsLoRA": lambda rank, targets: _lora(rank, targets, use_rslora=True),
    "DoRA": lambda rank, targets: _lora(rank, targets, use_dora=True),
    "DeLoRA": lambda rank, targets: DeloraConfig(r=rank, target_modules=targets),
    "OFT": lambda rank, targets: OFTConfig(r=0, oft_block_size=rank, target_modules=targets),
    "BOFT": lambda rank, targets: BOFTConfig(
        boft_block_size=rank, boft_n_butterfly_factor=2, target_modules=targets
    ),
    "PSOFT": _psoft,
    "PiSSA": lambda rank, targets: _lora(rank, targets, init_lora_weights="pissa_niter_16"),
    JOINT: _nblora,
    SVD: lambda rank, targets: _nblora(rank, targets, parametrization="svd"),
}
"""PEFT's configurations by name; None for those without an adapter."""

STARTS: dict[str, Make] = {
    "PiSSA, exact SVD": lambda rank, targets: _lora(rank, targets, init_lora_weights="pissa"),
    f"{JOINT}, absolute bound": lambda rank, targets: _nblora(rank, targets, bound_kind="absolute"),
}
"""Further ones of which only the creation is of interest: the second measures no spectral norms."""

NOTES = (
    f"{FULL}: all parameters. {FROZEN}: the forward pass without gradients, in the train step too.",
    "OFT and BOFT have no rank: their blocks have the rank's size, BOFT with two butterfly factors.",
    "LoRA, rsLoRA, DoRA, PiSSA, PSOFT: alpha = r. PiSSA and PSOFT start by a randomised SVD.",
    "The fresh adapter with an absolute bound measures no spectral norms: the difference is their time.",
    "Full fine-tuning, PiSSA and PSOFT change base weights; all others share one copy of them.",
)


def with_own_parameters(base: nn.Module, *, own_weights: bool) -> nn.Module:
    """A copy of the base model, whose parameters share their memory with the base's or have their own.

    Shared memory keeps many methods in little memory, and in the same place of the caches.
    """

    def parameter(p: Tensor) -> nn.Parameter:
        return nn.Parameter(p.detach().clone() if own_weights else p.detach(), requires_grad=p.requires_grad)

    return copy.deepcopy(base, {id(p): parameter(p) for p in base.parameters()})


def adapt(base: nn.Module, cell: Cell, method: str, *, own_weights: bool = False) -> nn.Module:
    """A copy of the base model with a method on all linear layers, away from its zero start.

    Raises:
        Unavailable: where this cell or this PEFT does not have the method, or it adapts other layers.
    """
    make = METHODS[method]
    model = with_own_parameters(base, own_weights=own_weights or method == FULL)
    if cell.checkpointing != "off":
        if cell.model != "llama":
            raise Unavailable("the bare layers have no checkpointing")
        options = {"use_reentrant": cell.checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    if make is None:
        return model.train().requires_grad_(method == FULL)
    adapted = attach(model, cell, make)
    generator = torch.Generator(cell.device).manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(adapted):
            noise = torch.empty(parameter.shape, device=parameter.device, dtype=torch.float32)
            parameter.add_(noise.normal_(std=1e-3, generator=generator).to(parameter.dtype))
    return adapted.train()


def attach(model: nn.Module, cell: Cell, make: Make) -> PeftModel:
    """PEFT's model with a fresh adapter."""
    targets = "all-linear" if cell.model == "llama" else r"layers\.\d+"
    adapted = get_peft_model(model, make(cell.rank, targets))
    layers = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    if layers != cell.adapted:
        raise Unavailable(f"it adapts {layers} layers instead of {cell.adapted}")
    return adapted


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trainable_count(model: nn.Module) -> int:
    return sum(p.numel() for p in trainable(model))
