"""Training in several processes. Each case starts two processes of its own on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import tiny_llama, tokens
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from nblora import NBLoraConfig

mode, meeting, rank, size = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
torch.manual_seed(0)
model = get_peft_model(tiny_llama(), NBLoraConfig(r=4, target_modules="all-linear"))
if size == 1:
    wrapped = model
elif mode == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=mode == "fsdp-orig",
        device_id=torch.device("cpu"),
    )
optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=20.0)
batch = tokens(count=4)
with torch.no_grad():
    first = wrapped(input_ids=batch, labels=batch).loss.item()
mine = batch if size == 1 else batch.chunk(size)[rank]
for _ in range(5):
    loss = wrapped(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    final = wrapped(input_ids=batch, labels=batch).loss.item()
if rank == 0:
    print(f"RESULT {first:.6f} {final:.6f}", flush=True)
if size > 1:
    dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly exit
"""


def losses(mode: str, size: int, folder: Path) -> list[float]:
    """The loss before and after five steps in `size` processes, on the same data in all."""
    tests = __file__.rsplit("/", 1)[0]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tests, mode, str(folder / "meeting"), str(rank), str(size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    finished = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), finished[0][1][-3000:]
    return [float(loss) for loss in finished[0][0].split("RESULT")[1].split()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-orig"])
def test_two_processes_learn_what_one_learns(mode: str, tmp_path: Path) -> None:
    """FSDP with PEFT's own wrap policy isolates our leaf modules and must gather them."""
    before, alone = losses("", 1, tmp_path)
    assert alone < before - 0.02
    assert losses(mode, 2, tmp_path) == pytest.approx([before, alone], abs=1e-4)
