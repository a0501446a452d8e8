"""What serving engines demand of a LoRA, and whether one meets it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from nblora.checkpoints.layouts import PEFT_PREFIX
from nblora.checkpoints.lora import LoraFile, open_lora
from nblora.checkpoints.storage import PathLike
from nblora.checkpoints.tables import json_text, text_table

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
_VLLM_DEFAULT_RANK = 16
# fields of LoraConfig that no engine reads
_UNKNOWN_OPTIONS = {
    "alora_invocation_tokens": "the update is only of the tokens after these, and would be of all",
    "layer_replication": "names are those of a deeper model",
}


@dataclass(frozen=True)
class Verdict:
    """Whether one engine serves a LoRA as it was trained.

    Attributes:
        engine: "vLLM", "SGLang" or "llama.cpp".
        problems: why not; none where it does.
        notes: what has to be said to the engine.
    """

    engine: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepts(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


@dataclass(frozen=True)
class EngineReport:
    """The verdicts of all engines on one LoRA."""

    verdicts: tuple[Verdict, ...]

    @property
    def summary(self) -> str:
        """One sentence."""
        return ", ".join(f"{v.engine}: {'yes' if v.accepts else 'NO'}" for v in self.verdicts) + "."

    def rows(self) -> list[tuple[str, ...]]:
        """A heading and a row of text for each engine."""
        return [
            ("engine", "accepts", "why"),
            *(
                (
                    verdict.engine,
                    "yes" if verdict.accepts else "NO",
                    "; ".join(verdict.problems + verdict.notes),
                )
                for verdict in self.verdicts
            ),
        ]

    def to_table(self) -> str:
        """A plain-text table."""
        return text_table(self.rows())

    def to_json(self) -> str:
        """All of it as JSON."""
        return json_text([asdict(verdict) | {"accepts": verdict.accepts} for verdict in self.verdicts])


def check_engines(source: PathLike) -> EngineReport:
    """Check a LoRA against what vLLM, SGLang and llama.cpp demand of names, fields and ranks.

    The rules are those of the sources in 2026: vLLM's `lora/peft_helper.py`, `lora_model.py`, `utils.py` and
    `config/lora.py`, SGLang's `srt/lora/lora_config.py` and `lora.py`, llama.cpp's
    `convert_lora_to_gguf.py`. That the base model has layers of these names is not checked.

    Args:
        source: a folder or hub repository with a LoRA, or a file.

    Raises:
        AdapterError: if it cannot be read, or is no plain LoRA.
    """
    return judge(open_lora(source))


def judge(file: LoraFile) -> EngineReport:
    """`check_engines` of an open LoRA."""
    if file.config is None:
        problem = f"it needs a PEFT adapter with adapter_config.json, not the {file.layout} layout"
        return EngineReport(tuple(Verdict(engine, (problem,)) for engine in ("vLLM", "SGLang", "llama.cpp")))
    return EngineReport((_vllm(file), _sglang(file), _llama_cpp(file)))


def _shared(file: LoraFile) -> list[str]:
    """What no engine serves."""
    assert file.config is not None
    problems = []
    for field, effect in _UNKNOWN_OPTIONS.items():
        if getattr(file.config, field, None):
            problems.append(f"{field} must be null, for {effect}")
    if file.config.modules_to_save:
        problems.append(f"modules_to_save must be null, got {file.config.modules_to_save}")
    if file.config.bias != "none":
        problems.append(f"bias must be 'none', got {file.config.bias!r}")
    if file.others and not problems:
        problems.append(f"all tensors must be LoRA factors, got {file.others[0]!r}")
    if convolution := next((layer for layer in file.layers if _kernel(file, layer.down)), None):
        problems.append(f"layers must be linear, got the convolution {convolution.name!r}")
    if not file.config.target_modules and not file.config.target_parameters:
        problems.append("target_modules must name the adapted layers")
    return problems


def _kernel(file: LoraFile, key: str) -> bool:
    return len(file.tensors.entries[key].shape) > 2


def _vllm(file: LoraFile) -> Verdict:
    config = file.config
    assert config is not None
    problems, notes = _shared(file), []
    problems += _one_scale(file, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
    rank = max(config.r, *(layer.rank for layer in file.layers))
    if rank > _VLLM_RANKS[-1]:
        problems.append(f"ranks must be at most {_VLLM_RANKS[-1]}, got {rank}")
    elif rank > _VLLM_DEFAULT_RANK:
        notes.append(f"start it with --max-lora-rank {min(r for r in _VLLM_RANKS if r >= rank)}")
    if any(layer.experts is not None for layer in file.layers):
        notes.append("experts in one parameter need a version and a model that have them so")
    return Verdict("vLLM", tuple(problems), tuple(notes))


def _sglang(file: LoraFile) -> Verdict:
    config = file.config
    assert config is not None
    problems, notes = _shared(file), []
    targets = config.target_modules
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        problems.append(f"target_modules must be a list of names, got the expression {targets!r}")
    if config.use_rslora:
        problems.append("use_rslora is ignored, so the update would have the wrong size")
    else:
        problems += _one_scale(file, config.lora_alpha / config.r)
    if any(layer.rank != config.r for layer in file.layers):
        problems.append("rank_pattern must be empty, got layers of several ranks")
    if any(layer.experts is not None for layer in file.layers):
        problems.append("experts must have factors of their own, not one pair for all")
    if any("lora_embedding_" in layer.down for layer in file.layers):
        notes.append("embeddings need a version that adapts embed_tokens and lm_head")
    return Verdict("SGLang", tuple(problems), tuple(notes))


def _llama_cpp(file: LoraFile) -> Verdict:
    config = file.config
    assert config is not None
    problems, notes = _shared(file), []
    # it divides lora_alpha by the rank of each tensor
    for layer in file.layers:
        if not math.isclose(layer.scale, config.lora_alpha / layer.rank, rel_tol=1e-6):
            problems.append(
                f"every scale must be lora_alpha over the tensor's rank, {config.lora_alpha / layer.rank:g}, "
                f"got {layer.scale:g} at {layer.name!r} (use_rslora or alpha_pattern)"
            )
            break
    if any(layer.experts is not None for layer in file.layers):
        problems.append("experts must have factors of their own, not one pair for all")
    if not all(layer.down.startswith(PEFT_PREFIX) for layer in file.layers):
        notes.append(f"names without {PEFT_PREFIX!r} must be those of the base model's checkpoint")
    if not config.base_model_name_or_path:
        notes.append("convert_lora_to_gguf.py needs --base, since base_model_name_or_path is not set")
    return Verdict("llama.cpp", tuple(problems), tuple(notes))


def _one_scale(file: LoraFile, scale: float) -> list[str]:
    """A problem where a layer has another scale than the configuration gives to all."""
    for layer in file.layers:
        if not math.isclose(layer.scale, scale, rel_tol=1e-6):
            return [
                f"the scale of all layers must be {scale:g}, which lora_alpha and r say, got {layer.scale:g} "
                f"at {layer.name!r} (rank_pattern or alpha_pattern)"
            ]
    return []
