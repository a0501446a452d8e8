"""Training in several processes: what two of them learn is what one learns, and what they save is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.nn.parallel import DistributedDataParallel

from conftest import tiny_llama, tokens
from job_samples import fork, status_of
from nblora import NBLoraConfig, certify
from nblora.tuner import nblora_layers
from test_factors import inputs, mixed

STEPS = 4
CLIP = 0.015  # below every norm of the gradient that these runs have


def adapted(dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(dtype), NBLoraConfig(r=4, target_modules="all-linear"))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work` returns in each of two processes."""
    folder.mkdir(exist_ok=True)
    results = [folder / f"result-{rank}" for rank in range(2)]

    def process(rank: int) -> None:
        os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
        os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"))
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate warns without it, as torchrun sets it
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
        torch.save(work(rank), f"{results[rank]}-unfinished")
        Path(f"{results[rank]}-unfinished").rename(results[rank])
        while not all(result.exists() for result in results):  # gloo fails where the other has left
            time.sleep(0.02)

    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = [fork(lambda rank=rank: process(rank), log) for rank, log in enumerate(logs)]
    statuses = [status_of(one) for one in processes]
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(result) for result in results]


# --- torch's own wrappers ---------------------------------------------------------------------------


def wrap(model: PeftModel, mode: str) -> nn.Module:
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),  # isolates our leaf modules
        use_orig_params=mode == "fsdp-orig",
        device_id=torch.device("cpu"),
    )


def unsharded(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model that was wrapped."""
    if isinstance(model, DistributedDataParallel):
        return model.module.state_dict()
    if isinstance(model, FullyShardedDataParallel):  # on a CPU, what is not cloned is freed
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            return {name: value.clone() for name, value in model.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def steps(model: nn.Module, batch: Tensor) -> list[tuple[float, float]]:
    """Steps of gradient descent with clipping; the loss and the norm of the gradient at each."""
    optimizer = torch.optim.SGD(trained(model), lr=20.0)
    history = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if isinstance(model, FullyShardedDataParallel):
            norm = model.clip_grad_norm_(CLIP)
        else:
            norm = nn.utils.clip_grad_norm_(trained(model), CLIP)
        history.append((loss.item(), float(getattr(norm, "full_tensor", lambda norm=norm: norm)())))
        optimizer.step()
        optimizer.zero_grad()
    return history


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: name + text
        )


# whether each process leaves the last layer out, step by step
SKIPS = [(False, False), (True, True), (False, True), (False, False), (True, False)]


def skipping_steps(model: nn.Module, inner: PeftModel, processes: list[int]) -> list[Tensor]:
    """Two micro-batches a step; the parameters after each step."""
    optimizer = torch.optim.SGD(trained(inner), lr=0.5)
    history = []
    for step, skips in enumerate(SKIPS):
        for micro in range(2):
            last = micro == 1
            waits = nullcontext() if last or model is inner else model.no_sync()
            with waits:
                for process in processes:
                    inner.get_base_model().skips = skips[process]
                    x = inputs(count=8)[4 * process :][:4] * (1 + micro + step)
                    (model(x).square().mean() / len(processes)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.cat([parameter.detach().flatten() for parameter in trained(inner)]))
    return history


def test_layers_that_are_sometimes_unused_learn_under_ddp(tmp_path: Path) -> None:
    """DDP waits for every parameter that an output's graph may reach, and layers share one node."""

    def work(rank: int) -> dict[str, Any]:
        model = mixed()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        history = skipping_steps(wrapped, model, [rank])
        slots = [layer._slots["default"][torch.float32] for layer in nblora_layers(model, "default").values()]
        return {"history": history, "alone": [slot.alone for slot in slots]}

    alone = mixed()
    expected = skipping_steps(alone, alone, [0, 1])
    for found in in_two_processes(work, tmp_path):
        for got, want in zip(found["history"], expected):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert found["alone"] == [False, False, False, False, True]


@pytest.mark.filterwarnings("ignore:FSDP.state_dict_type:FutureWarning")
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("ddp", torch.float32),
        ("fsdp", torch.float32),
        ("fsdp-orig", torch.float32),
        ("fsdp2", torch.float32),
        ("fsdp2", torch.bfloat16),
    ],
)
def test_two_processes_learn_what_one_learns(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With clipping; what they save has the bound, and one process or two go on from it."""
    alone = adapted(dtype)
    batch = tokens(count=4)
    start = get_peft_model_state_dict(alone)
    start = {name: value.clone() for name, value in start.items()}
    history = steps(alone, batch)
    halfway = {name: value.clone() for name, value in get_peft_model_state_dict(alone).items()}
    history += steps(alone, batch)
    assert all(norm > CLIP for _, norm in history)
    assert history[-1][0] < history[0][0] - 0.02
    half = dtype == torch.bfloat16  # its batches are rounded each in its own way

    def work(rank: int) -> Any:
        found = []
        for resumed in (False, True):
            if resumed:
                model = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path / "adapter", is_trainable=True)
            else:
                model = adapted(dtype)
            wrapped = wrap(model, mode)
            found += steps(wrapped, batch.chunk(2)[rank])
            state = unsharded(wrapped)
            if rank == 0:
                whole = adapted(dtype)
                whole.load_state_dict(state)
                whole.save_pretrained(tmp_path / ("end" if resumed else "adapter"))
            dist.barrier()
            if mode in ("ddp", "fsdp2"):  # FSDP1 has no way to read a part of a model
                assert certify(wrapped) == certify(tmp_path / ("end" if resumed else "adapter"))
        return found

    both = torch.tensor(in_two_processes(work, tmp_path / "processes"))
    tolerance = 3e-2 if half else 1e-4
    expected = torch.tensor(history)
    torch.testing.assert_close(both.mean(0)[:, 0], expected[:, 0], rtol=0, atol=tolerance)
    if mode != "ddp":
        torch.testing.assert_close(both[0][:, 1], both[1][:, 1])
    torch.testing.assert_close(both.mean(0)[:, 1], expected[:, 1], rtol=30 * tolerance, atol=0)
    for folder, expected_state in (("adapter", halfway), ("end", get_peft_model_state_dict(alone))):
        certificate = certify(tmp_path / folder)
        assert certificate.holds
        assert max(layer.share for layer in certificate.layers) > 0.05
        saved = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_llama(dtype), tmp_path / folder))
        assert_close(saved, expected_state, atol=5e-2 if half else 2e-4)
    moves = [(expected_state[name] - value).abs().max() for name, value in start.items() if value.ndim == 2]
    assert max(moves) > 0.1  # much more than the tolerance


@pytest.mark.filterwarnings("ignore:FSDP.state_dict_type:FutureWarning")
def test_an_adapter_saves_from_inside_fsdp(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = adapted()
        state = unsharded(wrap(model, "fsdp-orig"))
        if rank == 0:
            model.save_pretrained(tmp_path / "adapter", state_dict=state)

    in_two_processes(work, tmp_path / "processes")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert_close(get_peft_model_state_dict(loaded), get_peft_model_state_dict(adapted()), atol=0)


# --- accelerate -------------------------------------------------------------------------------------


def accelerator(mode: str, **options: Any) -> Accelerator:
    """Accelerate in this process, told that it shards: by itself it shards on accelerators only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if mode == "ddp":
        return Accelerator(cpu=True, **options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT" if mode == "fsdp2-sharded" else "FULL_STATE_DICT",
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin, **options)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return found


def micro_batches(process: int | None) -> list[Tensor]:
    """Four micro-batches of a process, or of one that does the work of both."""
    batches = tokens(count=16).chunk(4)
    return [batch if process is None else batch.chunk(2)[process] for batch in batches]


def accumulate(model: nn.Module, optimizer: Any, accelerator: Accelerator, batches: list[Tensor]) -> None:
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trained(model), CLIP)
                assert float(getattr(norm, "full_tensor", lambda norm=norm: norm)()) > CLIP
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate would use the CUDA device")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-sharded"])
def test_accelerate_accumulates_clips_saves_and_resumes(mode: str, tmp_path: Path) -> None:
    alone = adapted()
    optimizer = torch.optim.AdamW(trained(alone), lr=1e-2, eps=1e-3)
    for both in (micro_batches(None)[:2], micro_batches(None)[2:]):
        for batch in both:
            (alone(input_ids=batch, labels=batch).loss / 2).backward()
        nn.utils.clip_grad_norm_(trained(alone), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def run(rank: int, folder: Path, parts: list[list[Tensor]]) -> None:
        """Save everything after the first part, or go on from what was saved."""
        helper = accelerator(mode, gradient_accumulation_steps=2)
        model = adapted()
        model, optimizer = helper.prepare(model, torch.optim.AdamW(trained(model), lr=1e-2, eps=1e-3))
        if len(parts) == 1:
            helper.load_state(tmp_path / "state")
        for part in parts:
            accumulate(model, optimizer, helper, part)
            if len(parts) == 2 and part is parts[0]:
                helper.save_state(tmp_path / "state")
        whole = helper.get_state_dict(model)
        helper.unwrap_model(model).save_pretrained(
            folder, state_dict=whole, is_main_process=helper.is_main_process, save_function=helper.save
        )

    def process(rank: int) -> None:
        first, second = micro_batches(rank)[:2], micro_batches(rank)[2:]
        run(rank, tmp_path / "whole", [first, second])
        dist.barrier()
        run(rank, tmp_path / "resumed", [second])

    in_two_processes(process, tmp_path / "processes")
    loaded = [PeftModel.from_pretrained(tiny_llama(), tmp_path / name) for name in ("whole", "resumed")]
    whole, resumed = map(get_peft_model_state_dict, loaded)
    assert_close(whole, get_peft_model_state_dict(alone), atol=3e-4)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    certificate = certify(tmp_path / "whole")
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.01
