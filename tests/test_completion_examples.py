"""The examples of matrix completion run, small."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples" / "completion"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def number(text: str, what: str) -> float:
    found = re.search(rf"{what}: ([\d.]+)", text)
    assert found, text
    return float(found[1])


@pytest.mark.parametrize("own", [False, True], ids=["china.jpg", "own picture"])
def test_image(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[object] = ["--width", 48, "--rank", 8, "--out", tmp_path / "out", "--missing", 0.4]
    if own:
        y, x = np.mgrid[:60, :80] / 80
        Image.fromarray(np.uint8(255 * np.abs(np.sin(3 * x + y)))).save(tmp_path / "grey.jpg")
        arguments += ["--picture", tmp_path / "grey.jpg"]
    run("image.py", monkeypatch, *arguments)
    text = capsys.readouterr().out
    assert number(text, "on the removed pixels") < 0.8 * number(text, "column means")
    for name in ("holes", "completed", "before-after"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width >= 48
    with (
        Image.open(tmp_path / "out" / "holes.png") as holes,
        Image.open(tmp_path / "out" / "completed.png") as done,
    ):
        before, after = np.asarray(holes), np.asarray(done)
    kept = before[:, :, 3] > 0
    assert kept.mean() == pytest.approx(0.6, abs=0.05)
    assert np.array_equal(before[kept][:, :3], after[kept])


def test_ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("ratings.py", monkeypatch, "--people", 80, "--films", 50, "--out", tmp_path / "out")
    text = capsys.readouterr().out
    assert number(text, "on the wanted ratings") < 0.9 * number(text, "column means")
    wanted, predicted = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("wanted", "predicted"))
    assert predicted[["user", "item"]].equals(wanted)
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 10_000
