"""Train the public base model on upright digits: python prepare.py --out base.safetensors"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from federated_digits.task import accuracy, new_model, split, train
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("base.safetensors"))
    out = parser.parse_args().out
    upright, test, _ = split()
    torch.manual_seed(0)
    model = new_model()
    train(model, upright, epochs=40, learning_rate=0.003)
    save_file(model.state_dict(), out)
    print(f"{out}: {accuracy(model, upright):.3f} on upright digits, {accuracy(model, test):.3f} on rotated")


if __name__ == "__main__":
    main()
