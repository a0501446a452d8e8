"""The README's promises that can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import tiny_llama
from nblora import certify

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_python_blocks_run_as_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/model")
    exec(blocks[number], {})
    if number == 0:
        assert "All 14 layers keep their bound" in capsys.readouterr().out
        assert certify("adapter").holds
        assert certify("lora").holds


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@\w+@", README)


def test_pictures_and_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_map_of_the_code_is_complete() -> None:
    """Every room is in the README's picture."""
    picture = re.search(r"```\nsrc/nblora/\n(.*?)```", README, flags=re.DOTALL)[1]
    for path in (ROOT / "src" / "nblora").iterdir():
        if path.name.startswith(("_", "py.typed", ".")):
            continue
        assert path.name in picture, f"{path.name} is missing in the README's picture of the code"
