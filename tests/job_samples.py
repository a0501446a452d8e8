"""Small models and data for the tests of whole jobs, on disk as a user has them."""

from __future__ import annotations

import csv
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

from test_tasks import SIZES, byte_tokenizer, named

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

WORDS = ("cold", "warm", "late", "kind", "dull", "calm", "rude", "neat", "slow")


def sentence(index: int, label: str) -> str:
    """Words that follow from the index, and one that tells the class."""
    words = [WORDS[(index * step) % len(WORDS)] for step in (1, 2, 5)][: 1 + index % 3]
    return " ".join([*words, label])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def reviews(first: int, count: int, labels: tuple[str, ...] = ("bad", "good")) -> list[dict[str, Any]]:
    chosen = [(i, labels[i % len(labels)]) for i in range(first, first + count)]
    return [{"text": sentence(i, label), "label": label} for i, label in chosen]


def review_folder(folder: Path, labels: tuple[str, ...] = ("bad", "good"), first: int = 0) -> str:
    """Splits of 24, 10 and 17 rows, so that no evaluation fills its batches."""
    write_csv(folder / "train.csv", reviews(first, 24, labels))
    write_csv(folder / "validation.csv", reviews(first + 24, 10, labels))
    write_csv(folder / "test.csv", reviews(first + 34, 17, labels))
    return str(folder)


def classifier(folder: Path, *labels: str, dropout: float = 0.1) -> str:
    """A BERT with dropout whose head has classes, and far from uniform predictions."""
    set_seed(5)
    model = BertForSequenceClassification(
        BertConfig(
            **SIZES,
            vocab_size=260,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **named(*labels),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
    model.save_pretrained(folder)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    byte_tokenizer(closed=True, sep_token="<end>", model_input_names=inputs).save_pretrained(folder)
    return str(folder)


def forked(work: Callable[[], object], log: Path) -> int:
    """The exit status of work in a process of its own, or minus the signal that ended it."""
    return status_of(fork(work, log))


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fork(work: Callable[[], object], log: Path) -> int:
    """Start work in a process of its own, much faster than in a new interpreter; it prints to `log`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        process = os.fork()
    if process == 0:
        status = 1
        signal.alarm(300)  # ends it, should it hang
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    return process
