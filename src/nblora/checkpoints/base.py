"""Spectral norms of base weights, for bounds that are relative to them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from nblora.checkpoints.storage import AdapterError, PathLike, TensorFile, one_line, read_json
from nblora.spectral import spectral_norm


@dataclass(frozen=True)
class Place:
    """How the base weight of an adapted layer is recognised.

    Attributes:
        name: of the layer in the adapter.
        shape: (m, n) of its update.
        experts: E, None for one matrix.
        parameters: what the weight may be called in its module.
        flattened: whether "_" in the name stands for "." too.
        file: the adapter, for errors.
    """

    name: str
    shape: tuple[int, int]
    experts: int | None
    parameters: frozenset[str]
    flattened: bool
    file: str

    @property
    def depth(self) -> int:
        """How many wrappers of other parameters of the module are around this one."""
        return self.name.count(".base_layer")

    @property
    def module(self) -> str:
        """The name without what PEFT adds where it nests wrappers."""
        return re.sub(r"(\.base_layer)+$", "", self.name)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight has the shape of the update or, as in embeddings, of its transpose."""
        if self.experts is not None:
            return len(shape) == 3 and shape[0] == self.experts and set(shape[1:]) == set(self.shape)
        return len(shape) >= 2 and (shape[0], math.prod(shape[1:])) in (self.shape, self.shape[::-1])


class _Index:
    """Which weights may be of a module; its name or theirs may have a prefix that the other lacks.

    Args:
        keys: names of weights.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self.exact: dict[str, list[str]] = {}
        self.longer: dict[str, list[str]] = {}
        self.flattened: dict[str, list[str]] = {}
        for key in keys:
            module = key.rpartition(".")[0]
            self.exact.setdefault(module, []).append(key)
            self.flattened.setdefault(module.replace(".", "_"), []).append(key)
            for end in _ends(module):
                self.longer.setdefault(end, []).append(key)

    def of(self, module: str, flattened: bool) -> list[str]:
        """Names of the weights that a module may have.

        Args:
            flattened: whether "_" in its name stands for "." too.
        """
        if flattened:
            return self.flattened.get(module, [])
        return [
            *self.exact.get(module, []),
            *self.longer.get(module, []),
            *(key for end in _ends(module) for key in self.exact.get(end, [])),
        ]


def _ends(name: str) -> Iterator[str]:
    """What follows each of the dots of a name."""
    return (name[match.end() :] for match in re.finditer(r"\.", name))


class BaseWeights:
    """The weights that a LoRA is added to, from a model or from its files, read one at a time.

    transformers may give the weights in a file other names than the modules of its model have. Then the
    model of a folder is loaded after all.

    Args:
        base: a model; a safetensors file; or a folder with safetensors files, or with such folders named
            after the components of a pipeline.
        component: which component of a pipeline.

    Raises:
        AdapterError: if there are no weights.
    """

    def __init__(self, base: nn.Module | PathLike, component: str | None = None) -> None:
        self.tensors: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        self.files: dict[str, TensorFile] = {}
        self.in_order = False
        self.loadable: Path | None = None
        self.index = _Index()
        if isinstance(base, nn.Module):
            self.source = type(base).__name__
            self._use(base)
            return
        path = Path(base)
        if component is not None and (path / component).is_dir():
            path = path / component
        self.source = str(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise AdapterError(
                f"the base must be a model, a safetensors file or a folder with them, got {path}"
            )
        for tensors in map(TensorFile, files):
            for key, entry in tensors.entries.items():
                self.tensors[key] = (entry.shape, partial(tensors.read, key))
                self.files[key] = tensors
        self.index = _Index(self.tensors)
        if (path / "config.json").is_file():
            self.loadable = path

    def _use(self, model: nn.Module) -> None:
        self.in_order = True  # which the tensors in a file are not
        for name, parameter in model.named_parameters(remove_duplicate=False):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            self.tensors.pop(name, None)  # which would keep the order of a file
            self.tensors[name] = (tuple(parameter.shape), parameter.detach)
        self.index = _Index(self.tensors)

    def _load(self) -> bool:
        """Whether a folder has a transformers model; its parameters are there then."""
        folder, self.loadable = self.loadable, None
        if folder is None:
            return False
        import transformers

        name = (read_json(folder / "config.json", "a model's configuration").get("architectures") or [""])[0]
        model_class = getattr(transformers, str(name), None)
        if model_class is None:
            return False
        try:
            self._use(model_class.from_pretrained(folder, dtype="auto"))
        except Exception as error:  # whatever a model's code raises
            raise AdapterError(f"{folder} must be a model that loads: {one_line(error)}") from error
        return True

    def module_name(self, place: Place) -> str:
        """The name of a layer's module in the base, also where the layout flattens names."""
        return self._weights(place)[0].rpartition(".")[0]

    def stored(self, place: Place) -> tuple[TensorFile, str]:
        """The file that has a layer's base weight, and the name of the weight there.

        Raises:
            AdapterError: if there is no such weight, it does not fit the layer, or its file has it under
                another name or not as a tensor of its own.
        """
        key = self._weights(place)[0]
        if key not in self.files:
            raise AdapterError(
                f"{self.source} must have the weight of layer {place.name!r} in a file of its own under the "
                f"name that it has in the model, got no {key!r}"
            )
        return self.files[key], key

    def norms(self, place: Place) -> list[float]:
        """The spectral norm of a layer's base weight, one for each expert.

        Raises:
            AdapterError: if there is no such weight, or it does not fit the layer.
        """
        key, load = self._weights(place)
        weight = load()
        try:
            if not weight.is_floating_point():
                raise ValueError(f"got {weight.dtype}")
            matrices = weight.flatten(1)[None] if place.experts is None else weight
            norms: list[float] = spectral_norm(matrices).tolist()
            return norms
        except ValueError as error:
            raise AdapterError(
                f"{self.source} must have finite floating-point weights, at {key!r}: {error}"
            ) from error

    def _weights(self, place: Place) -> tuple[str, Callable[[], Tensor]]:
        found = [
            key
            for key in self.index.of(place.module, place.flattened)
            if key.rpartition(".")[2] in place.parameters
        ]
        exact = [key for key in found if key.rpartition(".")[0] == place.module]
        if self.in_order and len(exact) > 1:
            # PEFT nests wrappers in the order of the parameters, the last one outermost
            exact = exact[::-1][place.depth : place.depth + 1]
        fitting = [key for key in exact or found if place.fits(self.tensors[key][0])]
        if len(fitting) != 1:
            if self._load():
                return self._weights(place)
            seen = [f"{key} {self.tensors[key][0]}" for key in exact or found]
            raise AdapterError(
                f"{self.source} must have one weight of shape {place.shape} for layer {place.name!r} of "
                f"{place.file}, got {', '.join(seen) or 'none'}: is it the base model of this adapter?"
            )
        return fitting[0], self.tensors[fitting[0]][1]
