"""The PEFT door: importing this registers NB-LoRA as a PEFT method."""

from __future__ import annotations

from nblora.tuner.attention import NBLoraMultiheadAttention
from nblora.tuner.config import NBLoraConfig, NBLoraType
from nblora.tuner.conv import NBLoraConv
from nblora.tuner.embedding import NBLoraEmbedding
from nblora.tuner.gradient_start import start_at_gradient
from nblora.tuner.layer import NBLoraLayer, RunawayWarning, nblora_layers
from nblora.tuner.linear import NBLoraLinear
from nblora.tuner.model import NBLoraModel
from nblora.tuner.parameter import ParamWrapper

__all__ = [
    "NBLoraConfig",
    "NBLoraConv",
    "NBLoraEmbedding",
    "NBLoraLayer",
    "NBLoraLinear",
    "NBLoraModel",
    "NBLoraMultiheadAttention",
    "NBLoraType",
    "ParamWrapper",
    "RunawayWarning",
    "nblora_layers",
    "register",
    "start_at_gradient",
]


def register() -> None:
    """Make PEFT know NB-LoRA: `PeftModel.from_pretrained` and `get_peft_model` then work with it.

    `peft.utils.register_peft_method` refuses names outside `PeftType`, so the mappings that it would
    write are written here. Safe to call again.

    Raises:
        RuntimeError: if PEFT already has another method of that name.
    """
    from peft import PeftType
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    name = NBLoraType.NBLORA
    known: object = PEFT_TYPE_TO_CONFIG_MAPPING.get(name, NBLoraConfig)
    if name.value in PeftType.__members__ or known is not NBLoraConfig:
        raise RuntimeError(
            "the installed PEFT must not have a method named NBLORA of its own, got one: use it "
            "instead of nblora, or install the PEFT version that nblora's README names"
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = NBLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = NBLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = NBLoraModel.prefix


register()
