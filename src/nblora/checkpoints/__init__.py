"""Adapters on disk: NB-LoRA, and plain LoRA in the layouts of PEFT, diffusers and kohya's scripts."""

from __future__ import annotations

from nblora.checkpoints.adapter import TOLERANCE, Adapter, BoundedLayer, read_adapter
from nblora.checkpoints.clipping import clip_lora
from nblora.checkpoints.exporting import export_lora
from nblora.checkpoints.lora import LoraFile, open_lora
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_file, atomic_folder

__all__ = [
    "TOLERANCE",
    "Adapter",
    "AdapterError",
    "BoundedLayer",
    "LoraFile",
    "PathLike",
    "atomic_file",
    "atomic_folder",
    "clip_lora",
    "export_lora",
    "open_lora",
    "read_adapter",
]
