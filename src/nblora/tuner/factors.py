"""The thin factors of a model's adapters: computed for many layers at once, and kept while they are right."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from nblora.lowrank import LowRank, full_precision
from nblora.parametrizations import FreeParameters
from nblora.tuner.weights import Method, stored

# Note [Factors are kept]
#
# The thin factors of an update change only with its parameters, and computing them for one layer is some
# thirty small operations, which cost more than the layer's two thin products where the layer is small or
# the tokens are few. So the first layer that asks after a change has the factors computed for all layers of
# its kind, in one batch with one inverse, and they are kept: for the other layers, for the next token, for
# the other micro-batches of an accumulation and for what gradient checkpointing computes again.
#
# When are they right? A tensor's version counter misses writes through `.data` (some optimizers) and
# through NumPy. On the CPU the tensors are therefore compared with copies, which is exact and costs a small
# part of the factors' use. Only where a large adapter (more than 16 KiB a layer) is used for a few rows, a
# token or so, would that cost as much as the use. There the versions and a glance decide, at 512 bytes of
# every tensor, others each time: so what changes a whole tensor is seen at once, and what changes one entry
# in secret when more rows come, or when the glance has come round. On other devices a comparison would wait
# for the device. There version and address decide, and whatever else tells of an update: an optimizer has
# made a step, or gradients were computed and are gone again. Since eval() and the change to train() drop
# what was kept, what goes unnoticed there is a write through `.data` between two calls in one mode, without
# an optimizer.
#
# Gradients: all layers of a batch share one autograd node, whose backward pass runs once for all of them.
# It keeps what it needs itself, so that a second backward pass through it works (PyTorch frees what was
# saved for the first), and out of sight of saved-tensor hooks: gradient checkpointing counts what is saved,
# and computing again must save as much as the first time, whether the factors were kept or not. A layer
# whose factors were not used gets no gradient, not zeros, since optimizers move what has a gradient.
#
# Who needs gradients of a layer as soon as they are there, or a node for each layer: sharding (FSDP,
# DeepSpeed), for one. In a process group factors with gradients are therefore shared only inside
# DistributedDataParallel. If that looks for unused parameters, it waits for all that a node may reach:
# there unused layers of a batch do get zeros, once, and are computed alone from then on.
#
# Tensors that live elsewhere between calls (FSDP, offloading: hooks on the leaf modules) are never kept.


class Sources(NamedTuple):
    """The tensors of one adapter of one layer, as they are stored."""

    out: Tensor
    into: Tensor
    angle: Tensor | None
    logits: Tensor | None
    radius: Tensor

    def free(self) -> FreeParameters:
        """The free parameters: one row for each singular value."""
        rows = self.out.shape[:-1]
        return FreeParameters(
            out=self.out,
            into=self.into.reshape(*rows, -1),
            angle=None if self.angle is None else self.angle.reshape(rows),
            logits=None if self.logits is None else self.logits.reshape(rows),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Sources:
        return Sources(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    @property
    def learn(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors)


_Pair = tuple[Tensor | None, Tensor | None]
"""Gradients of a left and a right factor."""


class Layer(Protocol):
    """What layers are to `Factors`."""

    training: bool
    method: dict[str, Method]
    _slots: Slots

    def sources(self, adapter_name: str) -> Sources | None:
        """The tensors of an adapter, None where they cannot be kept."""


_SMALL, _WINDOW = 2**14, 2**9  # bytes: of an adapter that is compared as a whole, of what a glance compares


class _Steps:
    """Counts the steps of all optimizers."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps)


@dataclass(eq=False)
class _Kept:
    """Factors, and what they come from."""

    update: LowRank
    method: Method
    sources: Sources  # the very tensors
    places: Sequence[_Place]
    compared: bool  # with what they were
    batch: _Batch | None  # which computed them, where they have gradients
    marks: Sequence[_Mark]  # of the sources before the factors were computed
    steps: int = field(init=False)
    now: list[memoryview] = field(init=False)
    then: list[bytearray] = field(init=False)
    large: bool = field(init=False)
    glances: int = 0

    def __post_init__(self) -> None:
        self.steps = _steps.count
        self.now = [_memory(tensor) for tensor in self.sources.tensors] if self.compared else []
        self.then = [bytearray(memory) for memory in self.now]
        self.large = sum(map(len, self.then)) > _SMALL

    def is_untouched(self, layer: Layer, adapter_name: str, may_learn: bool, *, glance: bool) -> bool:
        """Whether the factors are what is asked for, and right: at little cost, as it is asked for every use.

        May say no where `is_of` and `is_right` say yes.
        """
        if layer.method.get(adapter_name) is not self.method:
            return False
        if self.batch is None and may_learn:
            return False
        for siblings, leaf, members, size, hooks, more_hooks, tensors, stored_tensor in self.places:
            if siblings.get(adapter_name) is not leaf or tensors.get("weight") is not stored_tensor:
                return False
            if hooks or more_hooks or len(members) != size:
                return False
        for tensor, place, dtype, learns, version in self.marks:
            if tensor.data_ptr() != place or tensor.dtype is not dtype or tensor.requires_grad is not learns:
                return False
            if version is not None and tensor._version != version:
                return False
        if not self.compared:
            return self._nobody_learned()
        if not glance or not self.large:
            return self.then == self.now
        self.glances += 1
        for then, now in zip(self.then, self.now):
            start = self.glances * _WINDOW % len(then)
            if then[start : start + _WINDOW] != now[start : start + _WINDOW]:
                return False
        return True

    def is_of(self, method: Method, sources: Sources, may_learn: bool) -> bool:
        """Whether these are the factors that are asked for, right or not.

        Args:
            may_learn: whether gradients may be asked of them.
        """
        if self.method is not method or sources is not self.sources:
            return False
        if self.batch is not None:
            return True
        return not (may_learn and sources.learn) and not (
            torch.is_grad_enabled() and self.update.left.is_inference()
        )

    def seems_right(self) -> bool:
        """Whether nothing but a look at the values could tell that the sources have changed."""
        return all(mark.holds() for mark in self.marks) and (self.compared or self._nobody_learned())

    def _nobody_learned(self) -> bool:
        """Whether no optimizer has made a step, and no gradients were computed and are gone again."""
        ran = self.batch is not None and self.batch.ran
        gone = ran and any(t.requires_grad and t.grad is None for t in self.sources.tensors)
        return self.steps == _steps.count and not gone

    def is_right(self) -> bool:
        if not self.compared:
            return self.seems_right()
        # in this order: what has moved must not be read where it was
        return all(mark.is_there() for mark in self.marks) and self.then == self.now


class _Place(NamedTuple):
    """Where a tensor was found, to see at little cost that it is still there, and nobody else provides it."""

    siblings: dict[str, nn.Module | None]  # of its leaf module, by adapter
    leaf: nn.Module | None
    members: dict[str, Any]  # of the leaf
    size: int  # of them: FSDP's views and offloading add some
    hooks: dict[Any, Any]
    more_hooks: dict[Any, Any]
    tensors: Mapping[str, Tensor | None]
    tensor: Tensor | None

    @staticmethod
    def of(container: nn.Module, leaf: nn.Module | None, tensor: Tensor | None) -> _Place:
        if leaf is None:
            return _Place(container._modules, None, {}, 0, {}, {}, {}, None)
        tensors = leaf._parameters if "weight" in leaf._parameters else leaf._buffers
        members = leaf.__dict__
        hooks, more_hooks = leaf._forward_hooks, leaf._forward_pre_hooks
        return _Place(container._modules, leaf, members, len(members), hooks, more_hooks, tensors, tensor)

    def holds(self, adapter_name: str) -> bool:
        return (
            self.siblings.get(adapter_name) is self.leaf
            and self.tensors.get("weight") is self.tensor
            and not (self.hooks or self.more_hooks or len(self.members) != self.size)
        )


class _Mark(NamedTuple):
    """What tells of most changes of a tensor, without a look at its values."""

    tensor: Tensor
    place: int
    dtype: torch.dtype
    learns: bool
    version: int | None

    def is_there(self) -> bool:
        """Whether its values are where they were, and as they were."""
        same = self.tensor.data_ptr() == self.place and self.tensor.dtype is self.dtype
        return same and self.tensor.requires_grad is self.learns

    def holds(self) -> bool:
        return self.is_there() and (self.version is None or self.tensor._version == self.version)


def _marks(sources: Sources) -> list[_Mark]:
    return [
        _Mark(t, t.data_ptr(), t.dtype, t.requires_grad, None if t.is_inference() else t._version)
        for t in sources.tensors
    ]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to compare in a tenth of the time of torch.equal."""
    values: Any = tensor.detach().flatten().view(torch.uint8).numpy()
    return memoryview(values)


@dataclass(eq=False)
class _Slot:
    """Where the factors of one adapter of one layer are kept."""

    kept: _Kept | None = None
    asked: bool = False  # not only computed because others asked
    shares: bool = False  # a node with other layers, as of the last forward pass
    alone: bool = False  # is sometimes unused


class _Member(NamedTuple):
    slot: _Slot
    method: Method
    sources: Sources
    places: Sequence[_Place]


class _OfAdapter(dict[torch.dtype, _Slot]):
    """What is kept of one adapter of one layer."""

    sources: Sources | None = None
    places: Sequence[_Place] = ()  # where they were found


class Slots(dict[str, _OfAdapter]):
    """What is kept of one layer, by adapter."""

    def of(self, adapter_name: str) -> _OfAdapter:
        slots = self.get(adapter_name)
        if slots is None:
            slots = self[adapter_name] = _OfAdapter()
        return slots

    def drop(self) -> None:
        """Forget the factors."""
        for slots in self.values():
            for slot in slots.values():
                slot.kept = None

    def read(self, adapter_name: str, containers: Sequence[nn.Module]) -> Sources | None:
        """The tensors of an adapter as they are stored; None where they are not always there.

        Args:
            containers: of the leaf modules, in the order of `Sources`.
        """
        slots = self.of(adapter_name)
        if slots.sources is not None and all(place.holds(adapter_name) for place in slots.places):
            return slots.sources
        slots.sources, places, tensors = None, [], []
        for container in containers:
            leaf = container._modules.get(adapter_name)
            tensor = None if leaf is None else stored(leaf)
            if tensor is None and leaf is not None:
                return None
            tensors.append(tensor)
            places.append(_Place.of(container, leaf, tensor))
        slots.sources, slots.places = Sources(*tensors), places  # type: ignore[arg-type]
        return slots.sources

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a layer start without."""
        return Slots, ()


class Factors:
    """Computes and keeps the factors of a model; its layers share one. Note [Factors are kept]."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[Layer, None] = WeakKeyDictionary()  # in order
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of a model, the copies of its layers add themselves."""
        return Factors, ()

    def add(self, layer: Layer) -> None:
        """Compute the factors of this layer together with those of others."""
        self._layers[layer] = None

    def update(
        self, layer: Layer, adapter_name: str, dtype: torch.dtype, *, glance: bool = False
    ) -> LowRank | None:
        """The update of a layer, its scale apart, as factors in `dtype`; None where none can be kept.

        Args:
            glance: whether it is to be used so little that comparing all of a large adapter would cost more.
        """
        may_learn = torch.is_grad_enabled() or (layer.training and not torch.is_inference_mode_enabled())
        slots = layer._slots.of(adapter_name)
        slot = slots.get(dtype)
        if slot is None:
            slot = slots[dtype] = _Slot()
        slot.asked = True
        kept = slot.kept
        if kept is not None and kept.is_untouched(layer, adapter_name, may_learn, glance=glance):
            return kept.update
        sources = layer.sources(adapter_name)
        if sources is None:
            return None
        member = _Member(slot, layer.method[adapter_name], sources, slots.places)
        asked_for = kept is not None and kept.is_of(member.method, sources, may_learn)
        if kept is not None and asked_for and kept.is_right():
            return kept.update
        with_graph = may_learn and sources.learn
        if with_graph:
            if not _in_backward():
                slot.shares = _may_share()
            if not slot.shares:
                return None
        # if values have changed without a sign, those of other layers may have, too
        suspicious = kept is not None and asked_for and kept.seems_right()
        with self._lock:
            members = [member]
            if not slot.alone:
                kind = _kind(member)
                members += [
                    other
                    for other in self._others(layer, adapter_name, dtype)
                    if _kind(other) == kind and (suspicious or _seems_wrong(other, may_learn))
                ]
            return _compute(members, dtype, with_graph)[0]

    def _others(self, layer: Layer, adapter_name: str, dtype: torch.dtype) -> Iterator[_Member]:
        """What other layers ask for in this adapter, or will, and could share with this layer."""
        for other in list(self._layers):
            if other is layer or adapter_name not in other.method or other.training != layer.training:
                continue
            slots = other._slots.of(adapter_name)
            slot = slots.setdefault(dtype, _Slot())
            asks_for_another = not slot.asked and any(one.asked for one in slots.values())
            if slot.alone or asks_for_another:
                continue
            sources = other.sources(adapter_name)
            if sources is not None:
                yield _Member(slot, other.method[adapter_name], sources, slots.places)


def _kind(member: _Member) -> tuple[Any, ...]:
    """What layers that are computed together have in common."""
    out = member.sources.out
    learns = [None if tensor is None else tensor.requires_grad for tensor in member.sources]
    return member.method, out.shape[-2], out.device, out.dtype, *learns


def _seems_wrong(member: _Member, may_learn: bool) -> bool:
    kept = member.slot.kept
    return kept is None or not (kept.is_of(member.method, member.sources, may_learn) and kept.seems_right())


def _compared(tensor: Tensor) -> bool:
    """Whether a tensor is compared with a copy, which elsewhere would wait for the device."""
    return tensor.is_cpu and tensor.is_contiguous()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _may_share() -> bool:
    """Whether gradients may reach parameters late, through a node that layers share."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return False
    return not (dist.is_available() and dist.is_initialized()) or _ddp() is not None


def _ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass this is."""
    active: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()
    return active


def _compute(members: Sequence[_Member], dtype: torch.dtype, with_graph: bool) -> list[LowRank]:
    """Compute the factors of layers of one kind and keep them."""
    batch = _Batch(members[0].method, dtype, [member.sources for member in members], with_graph)
    if with_graph:
        ddp = _ddp()
        if ddp is not None and ddp.find_unused_parameters:
            batch.waited_for = [weakref.ref(member.slot) for member in members]
        with torch.enable_grad():
            flat = _Shared.apply(batch, *(t for member in members for t in member.sources.tensors))
    else:
        flat = batch.compute()
    compared = all(map(_compared, (t for member in members for t in member.sources.tensors)))
    updates = [LowRank(left, right) for left, right in zip(flat[::2], flat[1::2])]
    own = batch if with_graph else None
    for member, update, marks in zip(members, updates, batch.marks):
        member.slot.kept = _Kept(update, member.method, member.sources, member.places, compared, own, marks)
        member.slot.shares |= with_graph
    return updates


class _Batch:
    """Layers whose factors are computed together, and their gradients.

    Args:
        method, dtype: of all of them.
        sources: as they are now; what changes in them later does not matter.
        with_graph: whether `backward` will be called.
    """

    ran = False
    waited_for: Sequence[weakref.ref[_Slot]] = ()  # of its layers, where those that are unused get zeros

    def __init__(
        self, method: Method, dtype: torch.dtype, sources: Sequence[Sources], with_graph: bool
    ) -> None:
        self.method, self.dtype, self.sources, self.with_graph = method, dtype, sources, with_graph
        self.marks = [_marks(one) for one in sources]
        by_shape: dict[Any, list[int]] = defaultdict(list)
        for i, one in enumerate(sources):
            by_shape[one.out.shape, one.into.shape].append(i)
        self.groups = list(by_shape.values())
        self.position = {i: (g, j) for g, group in enumerate(self.groups) for j, i in enumerate(group)}
        with torch.no_grad(), full_precision(sources[0].out):
            self.stacks = [_stacked([sources[i] for i in group]) for group in self.groups]
        if with_graph:
            for group, stack in zip(self.groups, self.stacks):
                for tensor, source in zip(stack.tensors, sources[group[0]].tensors):
                    tensor.requires_grad_(source.requires_grad)

    def copies(self, i: int, *, learn: bool = False) -> Sources:
        """The tensors of a layer as they were; to `learn`, those that require gradients do so here."""
        group, j = self.position[i]
        return self.stacks[group].map(
            lambda stack: stack.detach()[j].requires_grad_(learn and stack.requires_grad)
        )

    def compute(self) -> list[Tensor]:
        """left (..., m, k) and right (..., k, n) of the first layer, of the second, ..."""
        with torch.set_grad_enabled(self.with_graph), _out_of_sight():
            updates = _updates(self.method, self.dtype, self.stacks)
        self.updates = updates if self.with_graph else []
        sides = [(one.left.detach().unbind(), one.right.detach().unbind()) for one in updates]
        places = [self.position[i] for i in range(len(self.sources))]
        return [side[j] for group, j in places for side in sides[group]]

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the tensors of every layer, from those of its factors; None for unused layers."""
        self.ran = True
        pairs = list(zip(grads[::2], grads[1::2]))
        used = [i for i, (left, right) in enumerate(pairs) if left is not None or right is not None]
        if torch.is_grad_enabled():
            found = self._differentiable(used, pairs)
        elif len(used) < len(pairs):
            part = _Batch(
                self.method, self.dtype, [self.copies(i, learn=True) for i in used], with_graph=True
            )
            part.compute()
            found = part._of_all([pairs[i] for i in used])
        else:
            found = self._of_all(pairs)
        results: list[Tensor | None] = []
        by_layer = dict(zip(used, found))
        for i, one in enumerate(self.sources):
            if i in by_layer:
                results += by_layer[i]
            elif self._leave_alone(i):
                results += [torch.zeros_like(t) if t.requires_grad else None for t in one.tensors]
            else:
                results += [None] * len(one.tensors)
        return results

    def _leave_alone(self, i: int) -> bool:
        """Whether an unused layer is waited for; from then on it is computed alone."""
        slot = self.waited_for[i]() if self.waited_for else None
        if slot is None or not (slot.kept is None or slot.kept.batch is self):  # reached by another batch
            return False
        slot.alone, slot.kept = True, None
        return True

    def _of_all(self, pairs: Sequence[_Pair]) -> list[list[Tensor | None]]:
        outputs, reached = [], []
        for group, update in zip(self.groups, self.updates):
            lefts, rights = zip(*(pairs[i] for i in group))
            # what is contiguous is the transpose of a left factor
            reached += [_joined([g if g is None else g.mT for g in lefts], update.left.mT).mT]
            reached += [_joined(rights, update.right)]
            outputs += [update.left, update.right]
        leaves = [tensor for stack in self.stacks for tensor in stack.tensors]
        learning = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(outputs, learning, reached, retain_graph=True, allow_unused=True)
        by_leaf = {id(leaf): grad.unbind() for leaf, grad in zip(learning, found) if grad is not None}
        unbound = [[by_leaf.get(id(leaf)) for leaf in stack.tensors] for stack in self.stacks]
        places = [self.position[i] for i in range(len(pairs))]
        return [[None if grad is None else grad[j] for grad in unbound[group]] for group, j in places]

    def _differentiable(self, used: Sequence[int], pairs: Sequence[_Pair]) -> list[list[Tensor | None]]:
        """Gradients that can be differentiated again, back to the tensors themselves."""
        outputs, reached, tensors = [], [], []
        for i in used:
            one = self.sources[i]
            if not all(mark.holds() for mark in self.marks[i]):
                raise RuntimeError(
                    "adapter parameters must not change between a forward pass and a backward pass that is "
                    "to be differentiated again (create_graph=True), got changed ones"
                )
            (update,) = _updates(self.method, self.dtype, [_stacked([one])])
            pair = [(f[0], g) for f, g in zip((update.left, update.right), pairs[i]) if g is not None]
            outputs += [factor for factor, _ in pair]
            reached += [grad for _, grad in pair]
            tensors += [tensor for tensor in one.tensors if tensor.requires_grad]
        found = torch.autograd.grad(outputs, tensors, reached, create_graph=True, allow_unused=True)
        by_tensor = dict(zip(map(id, tensors), found))
        return [[by_tensor.get(id(tensor)) for tensor in self.sources[i].tensors] for i in used]


class _Shared(torch.autograd.Function):
    """The autograd node of a batch: from the tensors of all layers to their factors."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.batch = batch
        ctx.set_materialize_grads(False)
        return tuple(batch.compute())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with full_precision(ctx.batch.sources[0].out):
            return None, *ctx.batch.backward(grads)


def _stacked(sources: Sequence[Sources]) -> Sources:
    """Tensors of several layers of one shape, with the layers as first axis."""
    tensors = [None if of_layers[0] is None else torch.stack(of_layers) for of_layers in zip(*sources)]
    return Sources(*tensors)  # type: ignore[arg-type]


def _joined(grads: Sequence[Tensor | None], factor: Tensor) -> Tensor:
    """Gradients of a factor (L, ...) of L layers; zero where there is none."""
    return torch.stack([torch.zeros_like(factor[0]) if grad is None else grad for grad in grads])


def _updates(method: Method, dtype: torch.dtype, stacks: Sequence[Sources]) -> list[LowRank]:
    """The updates (L, ..., m, n) of stacks of L layers."""
    frees = [stack.free() for stack in stacks]
    batches = [free.map(partial(torch.flatten, end_dim=free.out.ndim - 3)) for free in frees]
    updates = method.updates(batches, [stack.radius.flatten() for stack in stacks])
    results = []
    for free, update in zip(frees, updates):
        left, right = (side.unflatten(0, free.out.shape[:-2]) for side in (update.left, update.right))
        results.append(LowRank(*LowRank(left, right).balanced_for(dtype)))
    return results


def _out_of_sight() -> AbstractContextManager[Any]:
    """Saved-tensor hooks, such as those of gradient checkpointing, do not see what is saved meanwhile.

    Detached, since an output that is kept with its node would keep the node, and never be freed.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
