"""Norm-bounded low-rank adaptation (NB-LoRA): fine-tuning with updates that cannot grow too large.

    from peft import get_peft_model
    from nblora import NBLoraConfig

    model = get_peft_model(model, NBLoraConfig(r=16, target_modules="all-linear"))

Importing this package is light: PEFT and transformers load when a name that needs them is used, and
NB-LoRA registers itself with PEFT as soon as both are there, in whichever order they are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nblora import _registration

if TYPE_CHECKING:
    from nblora.callbacks import BoundUseWarning as BoundUseWarning
    from nblora.callbacks import NBLoraCallback as NBLoraCallback
    from nblora.certificate import Certificate as Certificate
    from nblora.certificate import certify as certify
    from nblora.checkpoints import check_engines as check_engines
    from nblora.checkpoints import clip_lora as clip_lora
    from nblora.checkpoints import export_lora as export_lora
    from nblora.checkpoints import import_lora as import_lora
    from nblora.checkpoints import inspect_lora as inspect_lora
    from nblora.comparison import compare as compare
    from nblora.merging import merge_adapters as merge_adapters
    from nblora.merging import merge_privately as merge_privately
    from nblora.suggestion import suggest as suggest
    from nblora.training import finetune as finetune
    from nblora.tuner import NBLoraConfig as NBLoraConfig
    from nblora.tuner import NBLoraModel as NBLoraModel
    from nblora.tuner import RunawayWarning as RunawayWarning
    from nblora.tuner import start_at_gradient as start_at_gradient

__version__ = "0.1.0"

_HOMES = {
    "BoundUseWarning": "nblora.callbacks",
    "Certificate": "nblora.certificate",
    "NBLoraCallback": "nblora.callbacks",
    "certify": "nblora.certificate",
    "check_engines": "nblora.checkpoints",
    "clip_lora": "nblora.checkpoints",
    "compare": "nblora.comparison",
    "export_lora": "nblora.checkpoints",
    "finetune": "nblora.training",
    "import_lora": "nblora.checkpoints",
    "inspect_lora": "nblora.checkpoints",
    "merge_adapters": "nblora.merging",
    "merge_privately": "nblora.merging",
    "suggest": "nblora.suggestion",
    "NBLoraConfig": "nblora.tuner",
    "NBLoraModel": "nblora.tuner",
    "RunawayWarning": "nblora.tuner",
    "start_at_gradient": "nblora.tuner",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nblora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_registration.when_peft_is_imported()
