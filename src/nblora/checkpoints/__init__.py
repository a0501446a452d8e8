"""Adapters on disk: NB-LoRA, and plain LoRA in the layouts of PEFT, diffusers and kohya's scripts."""

from __future__ import annotations

from nblora.checkpoints.adapter import Adapter, BoundedLayer, read_adapter
from nblora.checkpoints.clipping import CutReport, clip_lora
from nblora.checkpoints.engines import EngineReport, check_engines
from nblora.checkpoints.exporting import export_lora
from nblora.checkpoints.importing import import_lora
from nblora.checkpoints.inspection import Inspection, inspect_lora
from nblora.checkpoints.lora import LoraFile, open_lora
from nblora.checkpoints.storage import AdapterError, PathLike, atomic_file, atomic_folder
from nblora.checkpoints.writing import exported_file

__all__ = [
    "Adapter",
    "AdapterError",
    "BoundedLayer",
    "CutReport",
    "EngineReport",
    "Inspection",
    "LoraFile",
    "PathLike",
    "atomic_file",
    "atomic_folder",
    "check_engines",
    "clip_lora",
    "export_lora",
    "exported_file",
    "import_lora",
    "inspect_lora",
    "open_lora",
    "read_adapter",
]
