"""What of a privacy budget is spent: a file that a crash, or a second process, cannot make forget.

Note [Spent first]. A release is written down before its noise is drawn: under a lock, to a temporary file
beside the ledger, forced to the disk, moved over the ledger in one step, and that move forced to the disk as
well. So a process that is killed anywhere has either spent nothing and released nothing, or spent whatever it
may have released. A release that was spent but never confirmed stays spent: nobody can tell whether it got
out.

Note [Public]. A ledger is made of what is public: bounds, noise, the fixed denominator. It never holds what
depends on the clients, such as how many came or were rejected.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nblora.privacy._checks import (
    Adjacency,
    check_adjacency,
    check_delta,
    check_epsilon,
    check_mu,
    check_probability,
)
from nblora.privacy.accounting import compose_subsampled
from nblora.privacy.gaussian import compose

FORMAT = 1


class BudgetExceeded(Exception):
    """A release would take more than is left of the budget; nothing was spent and nothing released."""


@dataclass(frozen=True)
class Release:
    """One entry of a ledger.

    Attributes:
        identifier: random.
        time: when it was spent, UTC, ISO 8601.
        mu: of all layers together, as if there were no sampling.
        sampling_probability: of each client; 1 without sampling.
        secure: whether its noise came from the system's randomness and not from a seed.
        confirmed: whether the release was completed. It is spent in any case.
        details: public facts (tau of each layer, denominator), for people.
    """

    identifier: str
    time: str
    mu: float
    sampling_probability: float
    secure: bool
    confirmed: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_mu(self.mu)
        check_probability(self.sampling_probability)
        for name in ("secure", "confirmed"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Spent:
    """All releases of a ledger together.

    Attributes:
        epsilon: at `delta`, an upper bound.
        delta: of the budget.
        mu: all releases are mu-GDP together; with sampling an upper bound that ignores it.
        releases: how many.
        secure: whether the noise of every one came from the system's randomness. Where it did not, epsilon
            holds only against those who do not know the seed.
    """

    epsilon: float
    delta: float
    mu: float
    releases: int
    secure: bool


@dataclass(frozen=True)
class _Book:
    epsilon: float
    delta: float
    adjacency: Adjacency
    releases: tuple[Release, ...] = ()

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        check_adjacency(self.adjacency)
        if len({release.identifier for release in self.releases}) != len(self.releases):
            raise ValueError("identifiers of releases must differ, got one twice")

    def total(self) -> Spent:
        mus = [release.mu for release in self.releases]
        return Spent(
            epsilon=compose_subsampled(
                mus,
                sampling_probability=[release.sampling_probability for release in self.releases],
                delta=self.delta,
                adjacency=self.adjacency,
            ),
            delta=self.delta,
            mu=compose(mus),
            releases=len(mus),
            secure=all(release.secure for release in self.releases),
        )

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "budget": {"epsilon": self.epsilon, "delta": self.delta, "adjacency": self.adjacency},
            "releases": [asdict(release) for release in self.releases],
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> _Book:
        def no_number(token: str) -> float:
            raise ValueError(f"numbers must be finite, got {token}")

        content = json.loads(text, parse_constant=no_number)
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {content['format']!r}")
        releases = tuple(Release(**release) for release in content["releases"])
        return _Book(**content["budget"], releases=releases)


class PrivacyLedger:
    """A budget (epsilon, delta) and every release that was charged to it, in a JSON file.

    `PrivacyLedger.create` starts one and `PrivacyLedger(path)` opens it again; neither takes a file that is
    missing or damaged for an empty ledger. Threads and processes may use it at once, on one machine: beside
    the file `NAME` lies `NAME.lock`. Whoever can write the file can also forge it: keep it where only the
    server that releases can write, on a local disk (locks and atomic moves of network file systems vary).

    Args:
        path: the file. A symbolic link is followed, so that a link and its target are one ledger.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a whole, valid ledger.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        self._read()

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, epsilon: float, delta: float, adjacency: Adjacency
    ) -> PrivacyLedger:
        """Start a ledger.

        Args:
            path: the file, which must not exist yet.
            epsilon, delta: the budget: no release is let through with which the total would exceed epsilon at
                this delta.
            adjacency: of all its releases.

        Raises:
            FileExistsError: if there is a file: a ledger is never overwritten.
            ValueError: for epsilon that is not positive and finite, delta outside (0, 1), an unknown
                adjacency.
        """
        book = _Book(epsilon=check_epsilon(epsilon), delta=check_delta(delta), adjacency=adjacency)
        ledger = cls.__new__(cls)
        ledger.path = Path(path).resolve()
        with ledger._locked():
            if ledger.path.exists():
                raise FileExistsError(f"a ledger must be new to be created, got the existing {ledger.path}")
            ledger._write(book)
        return ledger

    @property
    def epsilon(self) -> float:
        """The budget at `delta`."""
        return self._read().epsilon

    @property
    def delta(self) -> float:
        return self._read().delta

    @property
    def adjacency(self) -> Adjacency:
        return self._read().adjacency

    @property
    def releases(self) -> tuple[Release, ...]:
        """All that was spent so far, in order."""
        return self._read().releases

    def spent(self) -> Spent:
        """The total so far, by every process."""
        return self._read().total()

    def spend(
        self,
        *,
        mu: float,
        adjacency: Adjacency,
        secure: bool,
        sampling_probability: float = 1.0,
        details: Mapping[str, Any] | None = None,
    ) -> str:
        """Charge a release, before its noise is drawn. It is on the disk when this returns.

        Args:
            mu: of all its layers together, as if there were no sampling.
            adjacency: must be the ledger's.
            secure: whether its noise will come from the system's randomness.
            sampling_probability: of each client, see `compose_subsampled`.
            details: public facts to write down, as JSON can hold them.

        Returns:
            The identifier of the release, for `confirm`.

        Raises:
            BudgetExceeded: if the total would be over the budget, or not a number; nothing is charged.
            ValueError, TypeError: for another adjacency, numbers out of range, details that are not JSON.
        """
        release = Release(
            identifier=uuid.uuid4().hex,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            mu=check_mu(mu),
            sampling_probability=check_probability(sampling_probability),
            secure=secure,
            details=dict(details or {}),
        )
        with self._locked():
            book = self._read()
            if adjacency != book.adjacency:
                raise ValueError(f"adjacency must be the ledger's, {book.adjacency!r}, got {adjacency!r}")
            book = _Book(book.epsilon, book.delta, book.adjacency, (*book.releases, release))
            total = book.total()
            if not total.epsilon <= book.epsilon:
                raise BudgetExceeded(
                    f"the total epsilon must stay within {book.epsilon!r} at delta={book.delta!r}, got "
                    f"{total.epsilon!r} with this release (mu={release.mu!r}, "
                    f"sampling_probability={release.sampling_probability!r}) after {len(book.releases) - 1}"
                )
            self._write(book)
        return release.identifier

    def confirm(self, identifier: str) -> None:
        """Note that a release was completed. Nothing depends on it: it was spent before.

        Raises:
            KeyError: if there is no such release.
        """
        with self._locked():
            book = self._read()
            if identifier not in {release.identifier for release in book.releases}:
                raise KeyError(f"identifier must be of a release in {self.path}, got {identifier!r}")
            releases = tuple(
                Release(**{**asdict(release), "confirmed": True})
                if release.identifier == identifier
                else release
                for release in book.releases
            )
            self._write(_Book(book.epsilon, book.delta, book.adjacency, releases))

    def _read(self) -> _Book:
        text = self.path.read_text(encoding="utf-8")
        try:
            return _Book.from_json(text)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"a ledger must be whole and valid, got {self.path}: {type(error).__name__}: {error}"
            ) from error

    def _write(self, book: _Book) -> None:
        """Replace the file by a whole new one, on the disk when this returns. Only under the lock."""
        replace_file(self.path, book.to_json())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes. The system frees the lock of a process that dies.

        The lock is on a file of its own, which stays: the ledger itself is replaced while it is held.
        """
        try:
            import fcntl
        except ImportError as error:
            raise OSError("a privacy ledger needs the file locks of a POSIX system") from error
        with open(self.path.with_name(f"{self.path.name}.lock"), "a") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield


def replace_file(path: Path, text: str) -> None:
    """Replace a file by a whole new one, on the disk when this returns. Only for who is alone with it."""
    temporary = path.with_name(f".{path.name}.new")  # one that a crash has left is overwritten
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def as_ledger(ledger: PrivacyLedger | str | os.PathLike[str] | Callable[[], PrivacyLedger]) -> PrivacyLedger:
    """A ledger, opened where only its path, or what opens it, was given."""
    if callable(ledger):
        return ledger()
    return ledger if isinstance(ledger, PrivacyLedger) else PrivacyLedger(ledger)
