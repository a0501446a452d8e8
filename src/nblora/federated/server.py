"""The server's side of federated rounds: guard, mean, noise, ledger, checkpoint; no engine in it.

Note [What a crash costs]. A round has one point of no return: `private_mean` writes the release into the
ledger, on the disk, before its noise is drawn. After it the merged update is written to a file of its own,
forced to the disk, and then `state.json`, which names that file and the release, takes the place of the old
one in one step. So at any moment `state.json` tells of whole rounds only. A release in the ledger that it
does not tell of was paid for, and may have been seen or not: opening the folder again writes it down as a
lost round, whose update nobody uses, and goes on with the next one. Its budget stays spent, and it is never
drawn again: a second draw with the same updates would halve the noise.

Note [What is public]. `state.json` and the tensors are made of what was released and of the plan. Who came,
who was refused and why depends on the clients: that goes to the log and `Federation.clients` only.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nblora.checkpoints.storage import PathLike, TensorFile, TensorWriter, atomic_file, read_json
from nblora.federated.plan import Budget, FederationPlan
from nblora.federated.updates import Updates, add_updates, pack, unpack
from nblora.lowrank import LowRank
from nblora.privacy import ClientReport, PrivacyLedger, private_mean, sample_clients
from nblora.privacy.ledger import replace_file
from nblora.privacy.release import Update

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_NO_NOISE = 1e15
"""mu without a budget: `private_mean` then draws noise far below half a step of its grid, so none, and the
mean is exact to 2^-32 of the bounds. One guard and one sum for both cases."""


@dataclass(frozen=True)
class Refused:
    """In the place of an update that could not even be read.

    Attributes:
        reason: in words. Private, as it depends on the client.
    """

    reason: str


ClientMessage = Mapping[str, Any] | Refused | None
"""What came from one client: {layer: LowRank or dense Tensor}, something that is no update, or nothing."""


@dataclass(frozen=True)
class Round:
    """One round that is over. Public.

    Attributes:
        index: 1 for the first.
        status: "released", or "lost": it was paid for, and its update was not saved.
        release: identifier in the ledger, None without privacy.
        tau: standard deviation of the noise on each entry of a layer's mean, without privacy 0.
        tensors: name of the file with the global update after it, None if lost.
    """

    index: int
    status: Literal["released", "lost"]
    release: str | None = None
    tau: Mapping[str, float] = field(default_factory=dict)
    tensors: str | None = None


class Federation:
    """A federation's folder: `state.json`, one safetensors file a round, and, with privacy, `ledger.json`.

    Opens what is there, or starts anew. Only one server has it open at a time. POSIX only, and a local disk,
    as for `PrivacyLedger`.

    Args:
        folder: made if it is missing.
        plan: of a new federation; of one that is there it must be the same.

    Attributes:
        plan: what is public.
        updates: the global update after all rounds so far, to be added to the base weights. Public.
        rounds: all rounds so far. Public.
        clients: what the guard found in the last round, by client. Private; empty after opening.
        ledger: None without privacy.

    Raises:
        ValueError: if the folder holds another plan, or is damaged.
        RuntimeError: if another server has it open.
    """

    def __init__(self, folder: PathLike, plan: FederationPlan) -> None:
        self.folder, self.plan = Path(folder).resolve(), plan
        _ = plan.mu  # what fails, fails now
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, _locked(self.folder / "server.lock"))
        try:
            self.ledger: PrivacyLedger | None = None
            self.rounds: tuple[Round, ...] = ()
            self.updates: dict[str, Any] = {}
            self.clients: dict[Hashable, ClientReport] = {}
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another server open the folder."""
        self._unlock()

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def next_round(self) -> int | None:
        """The index of the round to come; None after the last."""
        return len(self.rounds) + 1 if len(self.rounds) < self.plan.rounds else None

    def spent(self) -> float:
        """Epsilon of all releases so far, at the plan's delta; infinite without privacy."""
        return float("inf") if self.ledger is None else self.ledger.spent().epsilon

    def sample(self, clients: Sequence[Any]) -> list[Any]:
        """Those of the clients that are there who take part in a round. Secret, see `sample_clients`."""
        if self.plan.sampling_probability == 1 or not clients:
            return list(clients)
        chosen = sample_clients(len(clients), probability=self.plan.sampling_probability)
        return [clients[index] for index in chosen]

    def finish_round(self, messages: Mapping[Any, ClientMessage]) -> Round:
        """Guard, average, noise, charge, add to the global update and save.

        Args:
            messages: what came, by client. A client counts at most once, so the keys must tell clients apart.
                Whatever is wrong with one counts as zero and is reported in `clients`.

        Raises:
            BudgetExceeded: if the ledger cannot pay; nothing is released. That takes releases which somebody
                else has charged to it.
            RuntimeError: after the last round.
            ReleaseLost, OSError: if anything fails after that, such as the disk; the round is then lost.
        """
        self._write_down_lost_rounds()  # of a call that failed
        index = self.next_round
        if index is None:
            raise RuntimeError(f"the federation has all of its {self.plan.rounds} rounds, got one more")
        plan = self.plan
        checked = {name: self._limited(message) for name, message in messages.items()}
        updates: list[Update | None] = [
            None if isinstance(message, Refused) else message for message in checked.values()
        ]
        mean = private_mean(
            updates,
            bounds=plan.frobenius_bounds(),
            shapes={name: layer.shape for name, layer in plan.layers.items()},
            adjacency=plan.budget.adjacency if plan.budget else "add-remove",
            delta=plan.budget.delta if plan.budget else 0.5,
            mu=_NO_NOISE if plan.mu is None else plan.mu,
            n_total=plan.n_total,
            on_excess=plan.on_excess,
            sampling_probability=plan.sampling_probability if plan.budget else 1.0,
            rank=plan.release_rank,
            project=self._ball() if plan.project else None,
            ledger=self.ledger,
        )
        self.clients = {
            name: _in_words(report, message) for (name, message), report in zip(checked.items(), mean.clients)
        }
        self._report(index)
        tau = mean.tau if plan.budget else dict.fromkeys(plan.layers, 0.0)
        done = Round(index, "released", mean.release, dict(tau), f"round-{index:04d}.safetensors")
        self._save(done, add_updates(self.updates, mean.updates))
        return done

    # ------------------------------------------------------------------------------- guard

    def _limited(self, message: ClientMessage) -> ClientMessage:
        """A client's update, unless its factors are of a larger rank than was agreed: that costs memory."""
        most = self.plan.max_rank
        if not isinstance(message, Mapping):
            return message
        try:
            ranks = {str(n): u.rank for n, u in message.items() if isinstance(u, LowRank) and u.rank > most}
        except Exception as error:  # Note [Nothing that clients do stops a release] in release.py
            return Refused(f"{type(error).__name__}: {error}")
        return Refused(f"ranks must be at most {most}, got {ranks}") if ranks else message

    def _ball(self) -> tuple[Any, dict[str, float]]:
        return self.plan.parsed_norm, {name: layer.radius for name, layer in self.plan.layers.items()}

    def _report(self, index: int) -> None:
        for name, client in self.clients.items():
            if client.status not in ("accepted", "absent"):
                _LOG.warning("round %d, client %s: %s: %s", index, name, client.status, client.reason)

    # ---------------------------------------------------------------------------- checkpoint

    def _open(self) -> None:
        state, ledger = self.folder / "state.json", self.folder / "ledger.json"
        if state.exists():
            self._load(state)
        if self.plan.budget is not None:
            self.ledger = self._open_ledger(ledger, self.plan.budget)
        elif ledger.exists():
            raise ValueError(f"a plan without a budget must have no ledger, got {ledger}")
        if not state.exists():
            self._write_state()
        self._write_down_lost_rounds()

    def _load(self, file: Path) -> None:
        try:
            content = read_json(file, "the state of a federation")
            if content["format"] != _FORMAT:
                raise ValueError(f"format must be {_FORMAT}, got {content['format']!r}")
            plan = FederationPlan.from_json(json.dumps(content["plan"]))
            rounds = tuple(Round(**entry) for entry in content["rounds"])
            saved = [entry.tensors for entry in rounds if entry.tensors is not None]
            updates = self._read(saved[-1]) if saved else {}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the state of a federation must be whole and valid, got {file}: "
                f"{type(error).__name__}: {error}"
            ) from error
        given = FederationPlan.from_json(self.plan.to_json())  # as it would have been read
        if plan != given:
            old, new = asdict(plan), asdict(given)
            changed = {key: (old[key], new[key]) for key in old if old[key] != new[key]}
            raise ValueError(
                f"the plan must be that of the federation in {self.folder}, which is fixed before its first "
                f"round, got others (there, here): {changed}"
            )
        self.rounds, self.updates = rounds, updates

    def _read(self, name: str) -> dict[str, Any]:
        file = TensorFile(self.folder / Path(name).name)
        updates = unpack({key: file.read(key) for key in file.entries})
        shapes = {name: tuple(update.shape) for name, update in updates.items()}
        if shapes != {name: tuple(layer.shape) for name, layer in self.plan.layers.items()}:
            raise ValueError(f"the update must have the shapes of the plan, got {shapes}")
        return updates

    def _open_ledger(self, path: Path, budget: Budget) -> PrivacyLedger:
        known = {entry.release for entry in self.rounds if entry.release is not None}
        if not path.exists() and not known:
            return PrivacyLedger.create(path, **asdict(budget))
        ledger = PrivacyLedger(path)
        found = Budget(ledger.epsilon, ledger.delta, ledger.adjacency)
        if found != budget:
            raise ValueError(f"the ledger's budget must be the plan's, {budget}, got {found} in {path}")
        if forgotten := known - {release.identifier for release in ledger.releases}:
            raise ValueError(
                f"the ledger must tell of every round, got none for {sorted(forgotten)} in {path}"
            )
        return ledger

    def _write_down_lost_rounds(self) -> None:
        """Note [What a crash costs]."""
        known = {entry.release for entry in self.rounds}
        releases = [] if self.ledger is None else self.ledger.releases
        lost = [release.identifier for release in releases if release.identifier not in known]
        for identifier in lost:
            index = len(self.rounds) + 1
            _LOG.warning("round %d was paid for and not saved: it is lost, and its budget spent", index)
            self.rounds = (*self.rounds, Round(index, "lost", identifier))
        if lost:
            self._write_state()

    def _save(self, done: Round, updates: Updates) -> None:
        assert done.tensors is not None
        tensors = pack(updates)
        entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        with (
            atomic_file(self.folder / done.tensors) as file,
            TensorWriter(file, entries, {"format": "pt"}) as writer,
        ):
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        before = self.rounds
        self.rounds = (*before, done)
        try:
            self._write_state()
        except BaseException:
            self.rounds = before
            raise
        self.updates = dict(updates)

    def _write_state(self) -> None:
        content = {
            "format": _FORMAT,
            "plan": json.loads(self.plan.to_json()),
            "rounds": [asdict(entry) for entry in self.rounds],
        }
        replace_file(self.folder / "state.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def _in_words(report: ClientReport, message: ClientMessage) -> ClientReport:
    """What the guard says of one client, in the words of whoever refused it first."""
    if isinstance(message, Refused):
        return replace(report, status="refused", reason=message.reason)
    return report


def _locked(path: Path) -> int:
    """A file descriptor that holds the lock until it is closed, or its process dies."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError("a federation needs the file locks of a POSIX system") from error
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RuntimeError(
            f"a federation must be open in one server at a time, got another on {path.parent}"
        ) from error
    return descriptor
