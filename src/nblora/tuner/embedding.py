"""NB-LoRA on embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nblora.lowrank import LowRank
from nblora.tuner.layer import NBLoraLayer


class NBLoraEmbedding(NBLoraLayer):
    """NB-LoRA on nn.Embedding: as a linear layer of one-hot inputs, so m = embedding_dim, n = num_embeddings.

    Dropout has no effect here, since there is nothing of an index to drop. The row of a padding index moves
    with the others, since all of them are rows of one low-rank matrix.
    """

    in_name: ClassVar[str] = "nblora_embedding_in"
    out_name: ClassVar[str] = "nblora_embedding_out"
    adapter_layer_names = ("nblora_embedding_in", "nblora_embedding_out", "nblora_angle", "nblora_scale")

    def _check_base_layer(self, layer_name: str) -> None:
        base: Any = self.get_base_layer()
        if not self.weight.is_floating_point():
            raise TypeError(
                f"embedding {layer_name!r} must have a floating-point weight, got {self.weight.dtype}"
            )
        if base.max_norm is not None:
            raise TypeError(
                f"embedding {layer_name!r} must have max_norm=None, since shortening rows of the base weight "
                f"would move what the update is added to, got max_norm={base.max_norm}"
            )

    @property
    def out_in_features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.embedding_dim, base.num_embeddings

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _dense(self, update: LowRank) -> Tensor:
        return update.dense().mT

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        return x

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        return self.weight.dtype

    def _apply_update(self, update: LowRank, x: Tensor) -> Tensor:
        added = nn.functional.linear(nn.functional.embedding(x, update.right.mT), update.left)
        scale = self._get_embed_scale()  # some models multiply what they look up
        return added if scale is None else added * scale.to(added.dtype)
