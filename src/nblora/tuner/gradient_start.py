"""A start that knows the task: an adapter that begins with a small step against the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nblora.cayley import random_frame
from nblora.lowrank import LowRank
from nblora.parametrizations import FreeParameters, descent_step
from nblora.tuner.layer import NBLoraLayer, nblora_layers
from nblora.tuner.weights import Method, stored

# Note [The gradient through the adapter]
#
# Wanted of each layer is the top of the singular value decomposition of G, the gradient of the loss by the
# base weight (m, n), which is large, frozen and perhaps quantized. The adapter is a window to it. While its
# tensors are taken for plain factors, left = out^T and right = into, the gradient of a zero `out` beside an
# orthonormal `into` is into G^T, and that of a zero `into` beside an orthonormal `out` is out G: products of
# G with k vectors, from either side, and the model stays as it is. Alternating them is a subspace iteration
# (Halko, Martinsson and Tropp, arXiv 0909.4061) that takes the memory of an ordinary step of training.


def start_at_gradient(
    model: nn.Module,
    train_step: Callable[[], object],
    *,
    adapter_name: str = "default",
    step: float = 0.03,
    rounds: int = 1,
) -> None:
    """Let a new adapter begin along the gradient of the loss, instead of in random directions.

    The largest singular directions of each layer's gradient become the adapter's, and its update a step of
    descent inside the ball. Training gets ahead by the steps that it takes to find these directions, which
    tells most at small learning rates and in short runs. After LoRA-GA (arXiv 2407.05000); unlike there the
    base weights stay as they are.

        start_at_gradient(model, lambda: model(**batch).loss.backward())

    Layers that get no gradient keep their start. If anything fails, all of them do.

    Args:
        model: with an NB-LoRA adapter that is active and trainable. Before it is wrapped for DDP, FSDP or
            DeepSpeed; in several processes, do it in all of them with the same data and seed.
        train_step: called 2 * rounds times; computes a loss and calls backward(), for one batch or several,
            the same ones each time; 128 samples served well. Without an optimizer's step.
        adapter_name: whose update is replaced.
        step: norm of the update at the start over its bound, above 0, at most 1.
        rounds: of the power iteration; one finds the directions of a gradient whose spectrum decays.

    Raises:
        ValueError: if there is no such adapter, it gets no gradient, or one that is not finite.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step must be above 0 and at most 1, got step={step!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer >= 1, got rounds={rounds!r}")
    layers = nblora_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"the model must have an NB-LoRA adapter, got none named {adapter_name!r}")
    windows = [_Window(name, layer, adapter_name) for name, layer in layers.items()]
    with _opened(model, windows):
        gradients = _gradients(windows, train_step, rounds)
    starts = [(window.layer, window.start(gradient, step)) for window, gradient in gradients.items()]
    for layer, free in starts:  # nothing can fail any more
        layer.set_free_parameters(adapter_name, free)


class _Window:
    """An adapter of one layer, whose tensors can be taken for plain factors."""

    def __init__(self, name: str, layer: NBLoraLayer, adapter_name: str) -> None:
        self.name, self.layer, self.adapter_name = name, layer, adapter_name
        self.method = layer.method[adapter_name]
        modules = [getattr(layer, side)[adapter_name] for side in (layer.in_name, layer.out_name)]
        if any(stored(module) is None for module in modules):
            raise ValueError(
                "the start must be set before a model is sharded, offloaded or loaded, "
                f"got parameters that are elsewhere in layer {name!r}"
            )
        self.into, self.out = (module.weight for module in modules)
        if not (self.into.requires_grad and self.out.requires_grad):
            raise ValueError(f"the adapter must be trainable, got a frozen one in layer {name!r}")
        self.before = [parameter.detach().clone() for parameter in (self.into, self.out)]

    def open(self) -> None:
        known = self.method
        self.layer.method[self.adapter_name] = _PlainFactors(
            known.norm, known.parametrization, known.temperature
        )

    @torch.no_grad()
    def close(self) -> None:
        self.layer.method[self.adapter_name] = self.method
        for parameter, tensor in zip((self.into, self.out), self.before):
            parameter.copy_(tensor)

    def random_rows(self) -> Tensor:
        """(..., k, n), orthonormal; made on the CPU, so that a seed gives the same ones everywhere."""
        n, k = self.layer.out_in_features[1], self.layer.r[self.adapter_name]
        return random_frame(n, k, batch_shape=self.layer.batch_shape, dtype=self.into.dtype).mT

    @torch.no_grad()
    def look(self, *, into: Tensor | None = None, out: Tensor | None = None) -> None:
        """Prepare for a pass with rows (..., k, n) or (..., k, m); the gradient of the other is wanted."""
        for parameter, rows in ((self.into, into), (self.out, out)):
            parameter.grad = None
            if rows is None:
                parameter.zero_()
            else:
                parameter.copy_(rows.reshape(parameter.shape))

    def seen(self, parameter: Tensor) -> Tensor | None:
        """The gradient (..., k, n) or (..., k, m) of `into` or `out` after a pass."""
        if parameter.grad is None:
            return None
        if not bool(parameter.grad.isfinite().all()):
            raise ValueError(f"gradients must be finite, got NaN or infinity in layer {self.name!r}")
        return parameter.grad.reshape(*self.layer.batch_shape, self.layer.r[self.adapter_name], -1)

    def start(self, gradient: LowRank, step: float) -> FreeParameters:
        """Free parameters of a step against the gradient; those from before where it is zero."""
        radius = self.layer.radius(self.adapter_name)
        rank = self.layer.r[self.adapter_name]
        exact = LowRank(gradient.left.double(), gradient.right.double())
        wanted = descent_step(exact, rank, norm=self.method.norm, radius=radius.double(), step=step)
        new = self.method.pull_back(wanted, rank, radius.double())
        old = self.layer.free_parameters(self.adapter_name)
        seen = (gradient.right != 0).any(-1).any(-1)  # (...,)

        def where(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(seen.reshape(*seen.shape, *[1] * (new.ndim - seen.ndim)), new.to(old), old)

        return FreeParameters(
            out=where(new.out, old.out),
            into=where(new.into, old.into),
            angle=None if new.angle is None or old.angle is None else where(new.angle, old.angle),
            logits=None if new.logits is None or old.logits is None else where(new.logits, old.logits),
        )


class _PlainFactors(Method):
    """Takes the tensors of an adapter for the thin factors of its update."""

    def update(self, free: FreeParameters, radius: Tensor) -> LowRank:
        return LowRank(free.out.mT, free.into)

    def updates(self, batches: Sequence[FreeParameters], radii: Sequence[Tensor]) -> list[LowRank]:
        return [self.update(free, radius) for free, radius in zip(batches, radii)]


@contextmanager
def _opened(model: nn.Module, windows: Sequence[_Window]) -> Iterator[None]:
    """Adapters as plain factors; afterwards their tensors and all gradients are as before."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for window in windows:
            window.open()
        yield
    finally:
        for window in windows:
            window.close()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _gradients(
    windows: Sequence[_Window], train_step: Callable[[], object], rounds: int
) -> dict[_Window, LowRank]:
    """The top of the gradient (..., m, n) of each layer that has one."""
    right = {window: window.random_rows() for window in windows}
    found: dict[_Window, LowRank] = {}
    for _ in range(rounds):
        for window in windows:
            window.look(into=right[window])
        train_step()
        left = {}
        for window in windows:
            if (columns := window.seen(window.out)) is not None:
                left[window] = torch.linalg.qr(columns.mT).Q.mT
            window.look(out=left.get(window))
        train_step()
        for window, basis in left.items():
            if (rows := window.seen(window.into)) is not None:
                found[window] = LowRank(basis.mT, rows)
                right[window] = found[window].svd().v.mT
    if not found:
        raise ValueError(
            "train_step must call backward() on a loss that the adapter has a part in, got no gradient"
        )
    return found
