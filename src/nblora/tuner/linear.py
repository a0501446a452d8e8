"""NB-LoRA on linear layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as all_modules
from transformers.pytorch_utils import Conv1D

from nblora.lowrank import LowRank, full_precision, plain_operations_only
from nblora.tuner.layer import FEW_ROWS, NBLoraLayer
from nblora.tuner.quantized import weight_by_its_action


class NBLoraLinear(NBLoraLayer):
    """NB-LoRA on nn.Linear, transformers' Conv1D or a quantized linear layer."""

    def _check_base_layer(self, layer_name: str) -> None:
        if self.quantization_backend is not None:
            return
        m, n = self.out_in_features
        expected = (n, m) if self.fan_in_fan_out else (m, n)
        if tuple(self.weight.shape) != expected or not self.weight.is_floating_point():
            raise TypeError(
                f"layer {layer_name!r} must have a floating-point weight of shape {expected}, or one that is "
                f"quantized in a way that PEFT knows, got {tuple(self.weight.shape)} {self.weight.dtype}"
            )

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def out_in_features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if self.fan_in_fan_out:
            return base.nf, base.nx
        return base.out_features, base.in_features

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.fan_in_fan_out else weight

    def _dense(self, update: LowRank) -> Tensor:
        return self._matrix(update.dense())

    def _apply_update(self, update: LowRank, x: Tensor) -> Tensor:
        return update.apply(x)

    def _add(self, result: Tensor, update: LowRank, x: Tensor) -> Tensor:
        hidden = functional.linear(x.to(update.right.dtype), update.right)
        if hidden.dtype != result.dtype or hidden.device != result.device:
            return result + functional.linear(hidden, update.left).to(result)
        total = torch.addmm(_rows(result), _rows(hidden), update.left.mT)
        return total.view(result.shape)

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]
        names = [name for name in self.active_adapters if name in self.method]
        drops = self.training and any(isinstance(self.nblora_dropout[name], nn.Dropout) for name in names)
        if not names or args or kwargs or drops or not _is_bare_linear(base, x):
            return super()._adapted(x, *args, **kwargs)
        updates = [self._update_for(name, x) for name in names]
        left, right = updates[0].left, updates[0].right
        if len(updates) > 1:
            left = torch.cat([update.left for update in updates], dim=-1)
            right = torch.cat([update.right for update in updates], dim=-2)
        weight = _stored(base, "weight")
        weight = weight.mT if type(base) is Conv1D else weight
        tensors = _rows(x), weight, _stored(base, "bias"), left, right
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        output: Tensor = _AdaptedLinear.apply(*tensors) if learns else _adapted_linear(*tensors)[0]
        # shaped out here: what a function of autograd returns as a view must not be changed in place
        return output.view(*x.shape[:-1], output.shape[-1])

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        few = x.dtype.itemsize == 2 and x.is_cpu and x.numel() <= FEW_ROWS * x.shape[-1]
        if few and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return torch.float32  # in which a CPU multiplies few rows faster
        return super()._dtype_for(x)

    def _measurable_weight(self) -> Tensor:
        if not isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            return self.get_base_weight()
        base = self.get_base_layer()
        return weight_by_its_action(
            base, self.out_in_features[1], *self._get_base_layer_device_and_dtype(base)
        )


def _stored(base: nn.Module, name: str) -> Any:
    """A parameter of a module, past its attribute access; FSDP puts its views among the members."""
    members = base.__dict__
    return members[name] if name in members else members["_parameters"].get(name)


def _is_bare_linear(base: nn.Module, x: Tensor) -> bool:
    """Whether calling a base layer is nothing but a product with its weight, so that it can be left out."""
    if type(base) not in (nn.Linear, Conv1D) or type(x) is not Tensor or plain_operations_only():
        return False
    weight, members = _stored(base, "weight"), base.__dict__
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and (weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type))
        and not (members["_forward_hooks"] or members["_forward_pre_hooks"] or "forward" in members)
        and not (members["_backward_hooks"] or members["_backward_pre_hooks"])
        and not all_modules._has_any_global_hook()
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _adapted_linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (t, n) through weight (m, n) + left (m, k) @ right (k, n) and bias, and through `right` (t, k).

    In the dtype of the factors, or the update only where the others agree on another one. No further tensor
    of the output's size is made.
    """
    dtype = left.dtype
    if dtype is torch.float32 and weight.dtype is rows.dtype is not dtype:
        output = functional.linear(rows, weight, bias)
        hidden = functional.linear(rows.float(), right)
        return output.add_(functional.linear(hidden, left)), hidden
    if weight.dtype is not dtype or rows.dtype is not dtype:  # autocast
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    output = functional.linear(rows, weight, bias)
    hidden = functional.linear(rows, right)
    output.addmm_(hidden, left.mT)
    return output, hidden


class _AdaptedLinear(torch.autograd.Function):
    """`_adapted_linear`; what backward needs is the input, and k numbers for each of its rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        output, hidden = _adapted_linear(rows, weight, bias, left, right)
        ctx.save_for_backward(rows, weight, left, right, hidden)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad):
            return _AdaptedLinear._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, left, right, hidden = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, rows.dtype
        rows = rows.to(left.dtype)
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            hidden = rows @ right.mT
        reached = grad @ left
        results: list[Tensor | None] = [None] * 5
        if needs[0]:
            into = grad @ weight.to(left.dtype)
            into.addmm_(reached, right)
            results[0] = into.to(dtype)
        if needs[1]:
            results[1] = (grad.mT @ rows).to(weight.dtype)
        if needs[2]:
            results[2] = grad.sum(0).to(ctx.bias_dtype)
        if needs[3]:
            results[3] = (hidden.mT @ grad).mT
        if needs[4]:
            results[4] = reached.mT @ rows
        return tuple(results)
