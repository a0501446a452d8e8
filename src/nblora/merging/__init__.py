"""One adapter from several: exact sums of updates, truncated and bounded where asked for, also privately."""

from __future__ import annotations

from nblora.merging.guard import Guarded
from nblora.merging.merge import merge_adapters
from nblora.merging.private import merge_privately
from nblora.merging.public import PublicLayers, public_layers
from nblora.merging.report import Merged, MergeReport, PrivateMergeReport, Released

__all__ = [
    "Guarded",
    "MergeReport",
    "Merged",
    "PrivateMergeReport",
    "PublicLayers",
    "Released",
    "merge_adapters",
    "merge_privately",
    "public_layers",
]
