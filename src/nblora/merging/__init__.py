"""One adapter from several: exact sums of updates, truncated and bounded where that is asked for."""

from __future__ import annotations

from nblora.merging.merge import merge_adapters
from nblora.merging.report import Merged, MergeReport

__all__ = ["MergeReport", "Merged", "merge_adapters"]
