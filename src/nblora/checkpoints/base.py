"""Spectral norms of base weights, for bounds that are relative to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nblora.bounds import spectral_norm
from nblora.checkpoints.layouts import LoraLayer
from nblora.checkpoints.lora import LoraFile
from nblora.checkpoints.storage import AdapterError, PathLike, TensorFile


class BaseWeights:
    """The weights that a LoRA is added to, from a model or from its files, read one at a time.

    Args:
        base: a model; a safetensors file; or a folder with safetensors files, or with such folders named
            after the components of a pipeline.
        component: which component of a pipeline.

    Raises:
        AdapterError: if there are no weights.
    """

    def __init__(self, base: nn.Module | PathLike, component: str | None = None) -> None:
        self.tensors: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        if isinstance(base, nn.Module):
            self.source = type(base).__name__
            for name, parameter in base.named_parameters(remove_duplicate=False):
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                self.tensors[name] = (tuple(parameter.shape), parameter.detach)
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

    def module_name(self, file: LoraFile, layer: LoraLayer) -> str:
        """The name of a layer's module in the base, also where the layout flattens names."""
        return self._weights(file, layer)[0].rpartition(".")[0]

    def norms(self, file: LoraFile, layer: LoraLayer) -> list[float]:
        """The spectral norm of a layer's base weight, one for each expert.

        Raises:
            AdapterError: if there is no such weight, or it does not fit the layer.
        """
        key, load = self._weights(file, layer)
        weight = load()
        try:
            if not weight.is_floating_point():
                raise ValueError(f"got {weight.dtype}")
            matrices = [weight.flatten(1)] if layer.experts is None else list(weight)
            return [spectral_norm(matrix).item() for matrix in matrices]
        except ValueError as error:
            raise AdapterError(
                f"{self.source} must have finite floating-point weights, at {key!r}: {error}"
            ) from error

    def _weights(self, file: LoraFile, layer: LoraLayer) -> tuple[str, Callable[[], Tensor]]:
        name = re.sub(r"(\.base_layer)+$", "", layer.name)
        parameters = {"weight"}
        if layer.experts is not None and file.config is not None:
            parameters = {key.rpartition(".")[2] for key in file.config.target_parameters or ()}
        found = [
            key
            for key in self.tensors
            if key.rpartition(".")[2] in parameters and self._same(key.rpartition(".")[0], name, file.layout)
        ]
        exact = [key for key in found if key.rpartition(".")[0] == name]
        fitting = [key for key in exact or found if self._fits(self.tensors[key][0], layer)]
        if len(fitting) != 1:
            seen = [f"{key} {self.tensors[key][0]}" for key in exact or found]
            raise AdapterError(
                f"{self.source} must have one weight of shape {layer.shape} for layer {layer.labels[0]!r} of "
                f"{file.tensors.path}, got {', '.join(seen) or 'none'}: is it the base model of this LoRA?"
            )
        return fitting[0], self.tensors[fitting[0]][1]

    @staticmethod
    def _same(module: str, name: str, layout: str) -> bool:
        """Whether two names mean the same module; one may have a prefix that the other lacks."""
        if layout == "kohya":
            return module.replace(".", "_") == name
        return module == name or module.endswith(f".{name}") or name.endswith(f".{module}")

    @staticmethod
    def _fits(shape: tuple[int, ...], layer: LoraLayer) -> bool:
        """Whether a weight has the shape of the update or, as in embeddings, of its transpose."""
        m, n = layer.shape
        if layer.experts is not None:
            return len(shape) == 3 and shape[0] == layer.experts and set(shape[1:]) == {m, n}
        rows, columns = shape[0] if shape else 0, torch.Size(shape[1:]).numel()
        return (rows, columns) in ((m, n), (n, m)) and len(shape) >= 2
