"""Small models under the names that PEFT's tests load from the hub, made here from configurations.

They are written as huggingface_hub's own cache lays them out, so that everything loads them offline as
if they had been downloaded. Weights are random, from a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT = hashlib.sha1(b"made from a configuration").hexdigest()
VOCABULARY = 1024  # at least 256 bytes and some of the ids that tests write out
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<mask>")
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, **IDS}


def tokenizer() -> Any:
    """A tokenizer whose tokens are single bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<image>"],
        model_max_length=128,
    )


def _model(kind: str, config_name: str, /, **options: Any) -> Callable[[Path], None]:
    """What writes a model of a class of transformers, and a tokenizer, into a folder."""

    def write(folder: Path) -> None:
        import torch
        import transformers

        config = getattr(transformers, config_name)(**options)
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    return write


def _opt(hidden: int = 16, layers: int = 5, inner: int = 64) -> Callable[[Path], None]:
    return _model(
        "OPTForCausalLM",
        "OPTConfig",
        **TEXT,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
    )


def _gpt2() -> Callable[[Path], None]:
    return _model(
        "GPT2LMHeadModel",
        "GPT2Config",
        **TEXT,
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
    )


def _decoder(name: str, config: str | None = None, **options: Any) -> Callable[[Path], None]:
    """A decoder with the field names of Llama."""
    common = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return _model(name, config or name.replace("ForCausalLM", "Config"), **TEXT, **{**common, **options})


def _encoder(name: str, config: str, **options: Any) -> Callable[[Path], None]:
    """An encoder with the field names of BERT."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    return _model(name, config, **TEXT, **{**common, **options})


def _t5(**options: Any) -> Callable[[Path], None]:
    return _model(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=5,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **options,
    )


def _bart() -> Callable[[Path], None]:
    return _model(
        "BartForConditionalGeneration",
        "BartConfig",
        **TEXT,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=4 * 16,
        decoder_ffn_dim=4 * 16,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=512,
        decoder_start_token_id=2,
        init_std=0.2,
    )


def _resnet(folder: Path) -> None:
    import torch
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=10,
        hidden_sizes=[10, 20, 30, 40],
        depths=[1, 1, 2, 1],
        num_labels=3,
        layer_type="bottleneck",
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)


def _qwen_vision(folder: Path) -> None:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 4,
            "out_hidden_size": 16,
        },
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _clip_text_config(**options: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **TEXT,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=77,
        **options,
    )


def _clip_text(folder: Path) -> None:
    import torch
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    CLIPTextModel(_clip_text_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _stable_diffusion(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = folder / "words"
    words.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (words / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=2,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(_clip_text_config()),
        tokenizer=CLIPTokenizer.from_pretrained(words, model_max_length=77),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    shutil.rmtree(words)


MODELS: dict[str, Callable[[Path], None]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt(),
    "peft-internal-testing/opt-125m": _opt(hidden=768, layers=12),
    "facebook/opt-125m": _opt(hidden=768, layers=12),
    "gpt2": _gpt2(),
    "hf-internal-testing/tiny-random-gpt2": _gpt2(),
    "peft-internal-testing/tiny-random-gpt2": _gpt2(),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2(),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _model(
        "GPTJForCausalLM",
        "GPTJConfig",
        **TEXT,
        n_embd=32,
        n_layer=5,
        n_head=4,
        rotary_dim=4,
        n_positions=512,
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": _model(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        **TEXT,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": _model(
        "BloomForCausalLM", "BloomConfig", **TEXT, hidden_size=32, n_layer=5, n_head=4
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _decoder("LlamaForCausalLM"),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _decoder("LlamaForCausalLM"),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _decoder("LlamaForCausalLM"),
    "hf-internal-testing/tiny-random-MistralForCausalLM": _decoder("MistralForCausalLM"),
    "peft-internal-testing/tiny-dummy-qwen2": _decoder("Qwen2ForCausalLM"),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": _decoder("Qwen3ForCausalLM", head_dim=4),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _decoder(
        "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=4, sliding_window=32, tie_word_embeddings=True
    ),
    "hf-internal-testing/Mixtral-tiny": _decoder("MixtralForCausalLM", num_local_experts=4),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": _decoder(
        "Qwen3MoeForCausalLM", head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": _decoder(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        head_dim=4,
        intermediate_size_mlp=32,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        attention_chunk_size=64,
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": _decoder(
        "GptOssForCausalLM", head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _decoder(
        "LlamaForSequenceClassification", "LlamaConfig"
    ),
    "google/flan-t5-small": _t5(),
    "peft-internal-testing/tiny-random-t5": _t5(),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _t5(),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5(),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart(),
    "bert-base-uncased": _encoder("BertModel", "BertConfig"),
    "peft-internal-testing/tiny-random-BertModel": _encoder("BertModel", "BertConfig"),
    "hf-internal-testing/tiny-random-BertModel": _encoder("BertModel", "BertConfig"),
    "peft-internal-testing/tiny-random-RobertaModel": _encoder("RobertaModel", "RobertaConfig"),
    "peft-internal-testing/tiny-random-DebertaModel": _encoder("DebertaModel", "DebertaConfig"),
    "peft-internal-testing/tiny-random-DebertaV2Model": _encoder("DebertaV2Model", "DebertaV2Config"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _encoder(
        "BertForSequenceClassification", "BertConfig"
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _encoder(
        "RobertaForSequenceClassification", "RobertaConfig"
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _resnet,
    "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration": _qwen_vision,
    "peft-internal-testing/tiny-clip-text-2": _clip_text,
    "hf-internal-testing/tiny-sd-pipe": _stable_diffusion,
}


# adapters, which there are LoRA's: name, revision
ADAPTERS = {("peft-internal-testing/tiny-opt-lora-revision", "test")}


def _adapter(folder: Path) -> None:
    from nblora import NBLoraConfig

    NBLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(folder)


def make(home: Path) -> None:
    """Write every model that is not there yet into HF_HOME `home`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    recipes = {(name, "main"): write for name, write in MODELS.items()}
    for (name, revision), write in (recipes | dict.fromkeys(ADAPTERS, _adapter)).items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        if (repository / "refs" / revision).exists():
            continue
        snapshot = repository / "snapshots" / COMMIT
        shutil.rmtree(repository, ignore_errors=True)
        snapshot.mkdir(parents=True)
        write(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(COMMIT, encoding="utf-8")


def load_dataset(name: str, *args: Any, **options: Any) -> Any:
    """What `datasets.load_dataset` would give, for the data sets that PEFT's tests use."""
    if "english_quotes" in name:
        return _quotes()
    if name == "huggingface/cats-image":
        return {"test": {"image": [_photograph()]}}
    raise FileNotFoundError(f"the data set must be one that is made here, got {name!r}")


def _quotes() -> Any:
    """A data set with the columns of the quotes that PEFT's tests train on."""
    from datasets import Dataset, DatasetDict

    texts = [f"{number} bounded steps make a long walk, said the {number}th hill." for number in range(256)]
    columns = {"quote": texts, "author": ["nobody"] * len(texts), "tags": [["steps", "hills"]] * len(texts)}
    return DatasetDict(train=Dataset.from_dict(columns))


def _photograph() -> Any:
    """An image in place of the photograph that PEFT's tests download."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
