"""DeepSpeed's ZeRO stages, in one process on a CPU: what they learn is what plain PyTorch learns."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from conftest import tiny_llama, tokens
from nblora import NBLoraConfig, certify

pytestmark = [
    pytest.mark.slow,  # its first run compiles DeepSpeed's extension for minutes
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed needs a C++ compiler"),
]

PROGRAM = """
import os, sys, warnings
warnings.filterwarnings("ignore")
tests, folder, stage = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, tests)
import deepspeed
from test_deepspeed import *

model = adapted()
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
    config={
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0, "torch_adam": True},
        },
    },
)
for _ in range(STEPS):
    loss = engine(input_ids=tokens(), labels=tokens()).loss
    engine.backward(loss)
    engine.step()
    print("RESULT", loss.item(), flush=True)
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    model.save_pretrained(folder)
os._exit(0)
"""
STEPS, CLIP = 4, 0.015


def adapted() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), NBLoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_zero_stage_learns_what_pytorch_learns(stage: int, tmp_path: Path) -> None:
    alone = adapted()
    trained = [parameter for parameter in alone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0)
    losses = []
    for _ in range(STEPS):
        loss = alone(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trained, CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path), str(stage)],
        capture_output=True,
        text=True,
        env={**os.environ, **place, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("RESULT")]
    assert found == pytest.approx(losses, abs=1e-4)
    certificate = certify(tmp_path)
    assert certificate.holds
    assert max(layer.share for layer in certificate.layers) > 0.01
    saved = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    for name, value in get_peft_model_state_dict(alone).items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=3e-4)
