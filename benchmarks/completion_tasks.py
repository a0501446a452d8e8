"""The matrices of the completion benchmark: what is observed, and what the completed matrix is judged by.

Each is a function of a seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Index = NDArray[np.int32]


@dataclass(frozen=True)
class Entries:
    """Some entries of a matrix: the one at rows[e], cols[e] is values[e]."""

    rows: Index  # (e,)
    cols: Index  # (e,)
    values: Vector  # (e,)

    def __len__(self) -> int:
        return len(self.values)

    def where(self, mask: NDArray[np.bool_]) -> Entries:
        return Entries(self.rows[mask], self.cols[mask], self.values[mask])


@dataclass(frozen=True)
class Task:
    """A matrix to complete."""

    shape: tuple[int, int]
    observed: Entries
    test: Entries

    def validation(self, seed: int, share: float = 0.1) -> Task:
        """The observed entries alone, a share of them, drawn at random, as the test."""
        held = np.zeros(len(self.observed), dtype=bool)
        held[_random(seed, 99).permutation(len(held))[: round(share * len(held))]] = True
        return replace(self, observed=self.observed.where(~held), test=self.observed.where(held))


def synthetic(seed: int, shape: tuple[int, int] = (1000, 800), rank: int = 10, share: float = 0.2) -> Task:
    """T1: normal factors, entries of variance 1, noise of 0.1; judged by the noise-free rest."""
    random = _random(seed, 1)
    left, right = (random.standard_normal((size, rank)) for size in shape)
    truth = left @ right.T / np.sqrt(rank)
    seen = random.random(shape) < share
    noisy = truth + 0.1 * random.standard_normal(shape)
    return Task(shape, _entries(noisy, seen), _entries(truth, ~seen))


def picture(seed: int, share: float = 0.3) -> Task:
    """T2: scikit-learn's photograph of a temple in grey, 427 × 640; judged by the other pixels."""
    from sklearn.datasets import load_sample_image

    grey = load_sample_image("china.jpg").mean(axis=2) / 255
    seen = _random(seed, 2).random(grey.shape) < share
    return Task(grey.shape, _entries(grey, seen), _entries(grey, ~seen))


def ratings(
    seed: int, shape: tuple[int, int] = (6000, 4000), observed: int = 1_000_000, test: int = 100_000
) -> Task:
    """T3: ratings from 1 to 5, of people and things whose popularity follows a power law.

    Biases, a part whose singular values decay as slowly as those of real ratings, and noise; test entries are
    drawn like the observed ones, and are as noisy.
    """
    random = _random(seed, 3)
    rows, cols = _popular(random, shape, observed + test)
    strength = np.arange(1.0, 65.0) ** -0.5
    strength *= 0.5 / np.linalg.norm(strength)
    left, right = (random.standard_normal((size, len(strength))).astype(np.float32) for size in shape)
    left *= strength
    row_bias, col_bias = 0.4 * random.standard_normal(shape[0]), 0.5 * random.standard_normal(shape[1])
    values = 3.5 + row_bias[rows] + col_bias[cols] + 0.522 * random.standard_normal(len(rows))
    values += _products(left, right, rows, cols)
    every = Entries(rows, cols, np.clip(values, 1, 5).astype(np.float32))
    first = np.arange(len(every)) < observed
    return Task(shape, every.where(first), every.where(~first))


def _popular(random: np.random.Generator, shape: tuple[int, int], size: int) -> tuple[Index, Index]:
    """Different places (size,), (size,), in random order; the k-th row or column weighs 1 / (50 + k)."""
    weights = [random.permutation(1 / (50.0 + np.arange(count))) for count in shape]
    found = np.empty(0, dtype=np.int64)
    while len(found) < size:
        rows, cols = (random.choice(len(w), max(size // 2, 1), p=w / w.sum()) for w in weights)
        found = np.unique(np.concatenate([found, rows * shape[1] + cols]))
    found = random.permutation(found)[:size]
    return (found // shape[1]).astype(np.int32), (found % shape[1]).astype(np.int32)


def large(
    seed: int, shape: tuple[int, int] = (100_000, 100_000), observed: int = 10_000_000, test: int = 100_000
) -> Task:
    """Rank 20, entries of variance 1, noise of 0.1, places uniform; judged by noise-free other entries."""
    random = _random(seed, 4)
    left, right = (random.standard_normal((size, 20)).astype(np.float32) for size in shape)
    left /= np.float32(np.sqrt(20))
    found = np.unique(random.integers(shape[0] * shape[1], size=round(1.01 * (observed + test))))
    found = random.permutation(found)[: observed + test]
    rows, cols = (found // shape[1]).astype(np.int32), (found % shape[1]).astype(np.int32)
    every = Entries(rows, cols, _products(left, right, rows, cols))
    first = np.arange(len(every)) < observed
    noisy = every.where(first)
    noisy.values[:] += 0.1 * random.standard_normal(observed, dtype=np.float32)
    return Task(shape, noisy, every.where(~first))


@dataclass(frozen=True)
class Unseen:
    """Rows that a fit has not seen, against rows that it has.

    Half of the entries of both kinds are taken away. The other half is in the fit for the seen rows, and is
    what the unseen ones are folded in from: nothing else differs.
    """

    task: Task  # without the unseen rows; the test is that of the seen rows
    given: Entries  # of the unseen rows, numbered from 0
    rest: Entries  # what they are judged by


def unseen(task: Task, seed: int, count: int) -> Unseen:
    """Draw `count` unseen and as many seen rows; both are judged by the test entries in them.

    The half that is taken away is thrown away: it is noisy, and noise hides what a poor fold-in would cost.
    """
    random = _random(seed, 5)
    order = random.permutation(task.shape[0])
    number = np.empty(task.shape[0], dtype=np.int32)
    number[order] = np.arange(task.shape[0])  # unseen ones first, then those to compare with
    observed, test = (
        Entries(number[some.rows], some.cols, some.values) for some in (task.observed, task.test)
    )
    kept = (observed.rows >= 2 * count) | (random.random(len(observed)) < 0.5)
    new, judged = observed.rows < count, (test.rows >= count) & (test.rows < 2 * count)
    fit = Task(
        (task.shape[0] - count, task.shape[1]),
        _renumbered(observed.where(kept & ~new), count),
        _renumbered(test.where(judged), count),
    )
    return Unseen(fit, observed.where(kept & new), test.where(test.rows < count))


def _renumbered(entries: Entries, first: int) -> Entries:
    return replace(entries, rows=entries.rows - np.int32(first))


def save(file: Path, shape: tuple[int, int], **parts: Entries) -> None:
    arrays = {f"{name}_{kind}": getattr(part, kind) for name, part in parts.items() for kind in KINDS}
    np.savez(file, shape=np.array(shape), **arrays)


def load(file: Path) -> tuple[tuple[int, int], dict[str, Entries]]:
    with np.load(file) as arrays:
        names = {name.rsplit("_", 1)[0] for name in arrays.files if name != "shape"}
        parts = {name: Entries(*(arrays[f"{name}_{kind}"] for kind in KINDS)) for name in names}
        m, n = arrays["shape"].tolist()
    return (m, n), parts


KINDS = ("rows", "cols", "values")


def _products(left: Vector, right: Vector, rows: Index, cols: Index) -> Vector:
    """left[rows] · right[cols]; in blocks, because all at once is gigabytes."""
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), 100_000):
        part = slice(start, start + 100_000)
        found[part] = np.einsum("er,er->e", left[rows[part]], right[cols[part]])
    return found


def _entries(matrix: NDArray[np.float64], mask: NDArray[np.bool_]) -> Entries:
    rows, cols = np.nonzero(mask)
    return Entries(rows.astype(np.int32), cols.astype(np.int32), matrix[mask].astype(np.float32))


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])
