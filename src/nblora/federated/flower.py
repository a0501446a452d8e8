"""Federated rounds in Flower's simulation and deployment engines (`pip install 'nblora[flower]'`).

    # server                                               # client
    app = ServerApp()                                      app = client_app(make_model, train, rank=8)

    @app.main()
    def main(grid, context):
        plan = FederationPlan.for_model(make_model(), config, rounds=3, n_total=5, budget=budget)
        NBLoraStrategy(plan, "folder").start(grid)

Written against Flower's Message API (`flwr.serverapp`, `flwr.clientapp`) of flwr 1.42. Messages carry arrays
and JSON, no pickles.

Note [One client's reply]. Flower's `Grid.send_and_receive` fails as a whole if one reply cannot be inflated,
and `FedAvg` fails as a whole if one reply has other keys than the rest. Here every reply is pulled, decoded
and refused by itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nblora.checkpoints.storage import PathLike
from nblora.federated.client import FederatedClient, Task
from nblora.federated.plan import FederationPlan
from nblora.federated.server import ClientMessage, Federation, Refused, Round
from nblora.federated.updates import Updates, pack, unpack

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy
except ImportError as error:
    raise ImportError(
        "nblora.federated.flower needs Flower 1.42 or newer (Python 3.11 or newer): "
        "pip install 'nblora[flower]'"
    ) from error

_LOG = logging.getLogger(__name__)
_ARRAYS, _CONFIG = "arrays", "config"
_PLAN, _ROUND = "nblora-plan", "server-round"
_HEADER = 4096  # bytes of a .npy header, at most
_POLL = 0.5  # seconds
_RAISED = 2  # Flower's CLIENT_APP_RAISED_EXCEPTION


# --------------------------------------------------------------------------------------- arrays


def to_arrays(updates: Updates) -> ArrayRecord:
    """Updates as Flower's arrays (`nblora.federated.pack`)."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in pack(updates).items()})


def from_arrays(arrays: ArrayRecord) -> dict[str, Any]:
    """The updates that `to_arrays` made arrays of.

    Raises:
        ValueError: if they are none.
    """
    return unpack({name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})


# --------------------------------------------------------------------------------------- client


def client_app(
    make_model: Callable[[Context], nn.Module],
    train: Callable[[nn.Module, Context, int], object],
    *,
    rank: int | Callable[[Context], int],
    **options: Any,
) -> ClientApp:
    """A ClientApp that trains a bounded adapter and sends plain thin factors.

    Args:
        make_model: builds the public base model, on the device to train on.
        train: trains the adapted model in place, called with it, the context (`node_config` tells clients
            apart) and the number of the round.
        rank: of the client's adapter, or a function of its context; cut to the plan's `max_rank`.
        options: of `NBLoraConfig`: parametrization, temperature, dropout.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def fit(message: Message, context: Context) -> Message:
        config = message.content[_CONFIG]
        task = Task(
            round=int(config[_ROUND]),
            plan=FederationPlan.from_json(str(config[_PLAN])),
            updates=from_arrays(message.content[_ARRAYS]),
        )
        client = FederatedClient(
            lambda: make_model(context),
            lambda model, index: train(model, context, index),
            rank=rank(context) if callable(rank) else rank,
            **options,
        )
        return Message(RecordDict({_ARRAYS: to_arrays(client.fit(task))}), reply_to=message)

    return app


# --------------------------------------------------------------------------------------- server


class NBLoraStrategy(Strategy):
    """Guards, averages over a fixed denominator, adds noise, keeps the ledger, saves and resumes.

    Clients' metrics and evaluations are not asked for: they would be releases without noise. Evaluate on
    public data with `evaluate_fn`.

    Args:
        plan: what is public.
        folder: of the `Federation`, opened or made. Constructed again after a crash, the strategy goes on
            with the round after the last one that was paid for.
        min_nodes: how many nodes to wait for before a round.
        wait: seconds to wait for them at most. Then those that are there are asked, once there is one: the
            denominator is fixed, so a client that left changes neither the noise nor its meaning.

    Attributes:
        federation: the state, with the private reports on clients.

    Raises:
        ValueError, RuntimeError: as `Federation`.
    """

    def __init__(
        self, plan: FederationPlan, folder: PathLike, *, min_nodes: int = 1, wait: float = 600.0
    ) -> None:
        if not min_nodes >= 1:
            raise ValueError(f"min_nodes must be at least 1, got min_nodes={min_nodes!r}")
        if not wait >= 0:
            raise ValueError(f"wait must be seconds, not negative, got wait={wait!r}")
        self.federation = Federation(Path(folder), plan)
        self.min_nodes, self.wait = min_nodes, wait
        self._asked: list[int] = []

    @property
    def arrays(self) -> ArrayRecord:
        """The global update so far."""
        return to_arrays(self.federation.updates)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each node that takes part. Round and arrays are the federation's, not Flower's."""
        self._asked = self.federation.sample(self._nodes(grid))
        config = ConfigRecord({**config, _ROUND: self._next_round(), _PLAN: self.federation.plan.to_json()})
        content = RecordDict({_ARRAYS: self.arrays, _CONFIG: config})
        return [Message(content, dst_node_id=node, message_type="train") for node in self._asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The global update after the round, and its public figures. Of a node's replies the first counts."""
        messages: dict[int, Any] = {}
        for reply in replies:
            messages.setdefault(int(reply.metadata.src_node_id), reply)
        self._finish(messages)
        return self.arrays, self._figures()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        plan, done = self.federation.plan, self.federation.rounds
        _LOG.info(
            "%d layers, ranks up to %d, %d rounds of which %d are done (%d lost), n_total=%d, %s",
            len(plan.layers),
            plan.max_rank,
            plan.rounds,
            len(done),
            sum(entry.status == "lost" for entry in done),
            plan.n_total,
            plan.budget or "no privacy",
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left.

        Args:
            grid: Flower's.
            initial_arrays, evaluate_config: not used; the state is the folder's.
            num_rounds: at most this many now, without it all that are left.
            timeout: seconds to wait for the replies of a round; later ones count as zero.
            train_config: further entries for the clients.
            evaluate_fn: called with the number of rounds so far and the global update (`from_arrays`,
                `apply_updates`), first before any round. For public data only.

        Returns:
            Flower's result, with rounds counted from the federation's first.

        Raises:
            BudgetExceeded, OSError: as `Federation.finish_round`. Nothing that a client does.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, got timeout={timeout!r}")
        self.summary()
        result = Result()
        result.arrays = self.arrays
        self._evaluate(result, evaluate_fn)
        left = math.inf if num_rounds is None else num_rounds
        while self.federation.next_round is not None and left > 0:
            config = ConfigRecord() if train_config is None else train_config
            asked = self.configure_train(self._next_round(), self.arrays, config, grid)
            done = self._finish(_exchange(grid, list(asked), timeout))
            result.arrays = self.arrays
            result.train_metrics_clientapp[done.index] = self._figures()
            self._evaluate(result, evaluate_fn)
            left -= 1
        return result

    # ------------------------------------------------------------------------------- parts

    def _nodes(self, grid: Grid) -> list[int]:
        end, said = time.monotonic() + self.wait, 0.0
        while True:
            nodes = sorted(grid.get_node_ids())
            now = time.monotonic()
            if len(nodes) >= self.min_nodes or (nodes and now >= end):
                return nodes
            if now - said > 30:
                _LOG.info("waiting for nodes: %d of %d", len(nodes), self.min_nodes)
                said = now
            time.sleep(_POLL)

    def _next_round(self) -> int:
        index = self.federation.next_round
        if index is None:
            raise RuntimeError(
                f"the federation has all of its {self.federation.plan.rounds} rounds, got one more"
            )
        return index

    def _finish(self, replies: Mapping[int, Any]) -> Round:
        """Decode each reply by itself; those who were not asked don't count."""
        messages: dict[int, ClientMessage] = {
            node: None if (reply := replies.get(node)) is None else self._decoded(reply)
            for node in self._asked
        }
        self._asked = []
        return self.federation.finish_round(messages)

    def _decoded(self, reply: Any) -> ClientMessage:
        if isinstance(reply, Refused):
            return reply
        try:
            if reply.has_error():
                return Refused(f"an error in place of an update: {reply.error.reason}")
            records = dict(reply.content.array_records)
            if set(records) != {_ARRAYS}:
                raise ValueError(
                    f"a reply must have one record of arrays, {_ARRAYS!r}, got {sorted(records)}"
                )
            return unpack({name: self._tensor(name, array) for name, array in records[_ARRAYS].items()})
        except Exception as error:  # whatever a client can provoke
            return Refused(f"{type(error).__name__}: {error}")

    def _tensor(self, name: str, array: Any) -> Tensor:
        """One array of a reply, unless it is larger than any that was agreed on."""
        plan = self.federation.plan
        layer = plan.layers.get(name.rpartition(".")[0])
        if layer is None:
            raise ValueError(f"arrays must belong to layers of the plan, got {name!r}")
        entries = max(math.prod(layer.shape), plan.max_rank * max(layer.shape))
        if len(array.data) > 8 * entries + _HEADER:
            raise ValueError(f"{name} must have at most {entries} numbers, got {len(array.data)} bytes")
        values = array.numpy()  # Flower's, which refuses pickles
        if values.dtype.name not in ("float16", "float32", "float64"):
            raise ValueError(f"{name} must be of real floating-point numbers, got {values.dtype}")
        return torch.from_numpy(values.copy())

    def _figures(self) -> MetricRecord:
        federation = self.federation
        figures: dict[str, int | float] = {"rounds-left": federation.plan.rounds - len(federation.rounds)}
        if (budget := federation.plan.budget) is not None:
            figures |= {"epsilon": federation.spent(), "delta": budget.delta}
        return MetricRecord(figures)

    def _evaluate(
        self, result: Result, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None
    ) -> None:
        if evaluate_fn is None:
            return
        index = len(self.federation.rounds)
        figures = evaluate_fn(index, self.arrays)
        if figures is not None:
            result.evaluate_metrics_serverapp[index] = figures


def _exchange(grid: Grid, messages: list[Message], timeout: float) -> dict[int, Any]:
    """The reply of every node that sent one in time, `Refused` where it cannot even be inflated.

    Note [One client's reply].
    """
    end = time.monotonic() + timeout
    pushed = set(grid.push_messages(messages)) if messages else set()
    if messages and not pushed & {m.metadata.message_id for m in messages}:
        raise RuntimeError("messages must reach the SuperLink, got none through: see Flower's log")
    waiting = {m.metadata.message_id: int(m.metadata.dst_node_id) for m in messages}
    waiting = {identifier: node for identifier, node in waiting.items() if identifier in pushed}
    replies: dict[int, Any] = {}
    while waiting:
        for identifier, node in list(waiting.items()):
            try:
                found = list(grid.pull_messages([identifier]))
            except Exception as error:
                if _is_of_the_network(error):
                    raise
                found = [Refused(f"{type(error).__name__}: {error}")]
            if found:
                replies[node] = found[0]
                del waiting[identifier]
        if not waiting or time.monotonic() >= end:
            break
        time.sleep(_POLL)
    return replies


class InProcessGrid(Grid):
    """A grid of nodes in this very process, for studies and tests: clients train when their reply is pulled.

    Args:
        app: what every node runs. As in Flower's engines an exception in it becomes an error reply.
        nodes: the `node_config` of each node; the first has the ID 1.
    """

    def __init__(self, app: ClientApp, nodes: Sequence[Mapping[str, Any]]) -> None:
        from flwr.supercore.task_identity import TaskIdentity

        # engines do this before an app runs; messages cannot be made without
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, 0
        self.app = app
        self.contexts = {
            node: Context(run_id=0, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in enumerate(nodes, start=1)
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            self._sent += 1
            identifiers.append(str(self._sent))
            message.metadata.__dict__["_message_id"] = identifiers[-1]  # as Flower's own grids do
            self._waiting[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._reply(self._waiting.pop(name)) for name in list(message_ids) if name in self._waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message) -> Message:
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(_RAISED, reason), reply_to=message)


def _is_of_the_network(error: Exception) -> bool:
    """Whether it tells of the SuperLink and not of one reply: Flower's connections are httpx's or gRPC's."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(roots & {"httpx", "httpcore", "grpc"})
