"""Federated rounds in Flower: the strategy with Flower's own types, and the engines with real processes.

Runs in an environment that has Flower: `make test` and `make test-all` set it up (`.venv/flower`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TwoLayers

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # Flower's processes tell their makers of each run otherwise
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
pytest.importorskip("flwr", reason="needs Flower, see `make test` or pip install 'nblora[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from nblora import NBLoraConfig
from nblora.federated import Budget, Federation, FederationPlan, apply_updates, pack
from nblora.federated.flower import (
    InProcessGrid,
    NBLoraStrategy,
    client_app,
    from_arrays,
    to_arrays,
)
from nblora.lowrank import LowRank
from nblora.privacy import PrivacyLedger

BUDGET = Budget(8.0, 1e-5, "add-remove")
RANKS = (2, 4, 4, 8, 8)
EXAMPLE = Path(__file__).parent.parent / "examples" / "federated"


def base_model(*_: Any) -> nn.Module:
    torch.manual_seed(0)
    return TwoLayers()


def plan(**options: Any) -> FederationPlan:
    config = NBLoraConfig(r=8, bound=0.5, target_modules="all-linear")
    return FederationPlan.for_model(base_model(), config, **{"rounds": 3, "n_total": 5} | options)


def fit(model: nn.Module, context: Any, index: int) -> None:
    generator = torch.Generator().manual_seed(100 * context.node_id + index)
    x = torch.randn(32, 12, generator=generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def rank_of(context: Any) -> int:
    return RANKS[int(context.node_config["partition-id"])]


NODES = [{"partition-id": index} for index in range(5)]


class Watched(InProcessGrid):
    """Keeps what went through it; `change` says what becomes of a node's reply."""

    def __init__(self, change: Mapping[int, Callable[[Message], Any]] | None = None) -> None:
        super().__init__(client_app(base_model, fit, rank=rank_of), NODES)
        self.change = change or {}
        self.sent: list[Message] = []
        self.replies: dict[int, Message] = {}

    def push_messages(self, messages: Any) -> Any:
        self.sent += messages
        return super().push_messages(messages)

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        reply = super()._reply(message)
        self.replies[node] = reply
        changed = self.change.get(node, lambda reply: reply)(reply)
        return reply if changed is None else changed  # type: ignore[no-any-return]


def updates_of(reply: Message) -> dict[str, Any]:
    return from_arrays(reply.content["arrays"])


# --- rounds ---


def test_three_rounds_of_five_clients_with_ranks_of_their_own(tmp_path: Path) -> None:
    grid = Watched()
    strategy = NBLoraStrategy(plan(), tmp_path, min_nodes=5)
    seen = []
    result = strategy.start(grid, evaluate_fn=lambda done, arrays: seen.append((done, len(arrays))))
    assert [done for done, _ in seen] == [0, 1, 2, 3]
    assert [int(m.content["config"]["server-round"]) for m in grid.sent] == [1] * 5 + [2] * 5 + [3] * 5
    assert all(client.status == "accepted" for client in strategy.federation.clients.values())
    total = {name: torch.zeros(layer.shape) for name, layer in plan().layers.items()}
    for node, reply in grid.replies.items():  # of the last round
        sent = updates_of(reply)
        for name, one in sent.items():
            assert isinstance(one, LowRank)
            assert one.rank == min(RANKS[node - 1], *one.shape)
            total[name] += one.dense() / 5
    before = from_arrays(grid.sent[-1].content["arrays"])
    after = from_arrays(result.arrays)
    for name, value in total.items():
        assert torch.allclose(after[name], before[name] + value, atol=1e-6)
    x = torch.randn(200, 12)
    error = [
        (apply_updates(base_model(), plan(), updates)(x) - 1).square().mean().item()
        for updates in ({}, before, after)
    ]
    assert error[2] < error[1] < error[0]
    assert dict(result.train_metrics_clientapp[3]) == {"rounds-left": 0}


def test_updates_become_arrays_and_come_back() -> None:
    updates: dict[str, Any] = {"a": LowRank(torch.randn(3, 1), torch.randn(1, 4)), "b": torch.randn(2, 2)}
    again = from_arrays(to_arrays(updates))
    assert {name: tensor.tolist() for name, tensor in pack(again).items()} == {
        name: tensor.tolist() for name, tensor in pack(updates).items()
    }
    assert from_arrays(to_arrays({})) == {}


def test_only_public_figures_come_out_and_the_budget_is_kept(tmp_path: Path) -> None:
    strategy = NBLoraStrategy(plan(budget=BUDGET), tmp_path)
    result = strategy.start(Watched({2: lambda reply: Message(Error(2, "private!"), reply_to=reply)}))
    figures = {index: dict(record) for index, record in result.train_metrics_clientapp.items()}
    assert [set(record) for record in figures.values()] == [{"epsilon", "delta", "rounds-left"}] * 3
    epsilons = [float(record["epsilon"]) for record in figures.values()]  # type: ignore[arg-type]
    assert epsilons == sorted(epsilons)
    assert 0.999 * 8 <= epsilons[-1] <= 8
    assert len(PrivacyLedger(tmp_path / "ledger.json").releases) == 3
    assert not result.evaluate_metrics_clientapp
    assert "private!" not in (tmp_path / "state.json").read_text()


def test_clients_are_not_evaluated(tmp_path: Path) -> None:
    """That would be a release without noise."""
    strategy = NBLoraStrategy(plan(), tmp_path)
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), Watched())) == []
    assert strategy.aggregate_evaluate(1, []) is None


def test_flowers_own_loop_runs_it_too(tmp_path: Path) -> None:
    """`configure_train` and `aggregate_train` by themselves, as a workflow of one's own would call them."""
    grid = Watched()
    strategy = NBLoraStrategy(plan(), tmp_path)
    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord({"more": 1}), grid))
    assert all(message.content["config"]["more"] == 1 for message in messages)
    replies = list(grid.send_and_receive(messages))
    stranger = Message(replies[0].content, reply_to=messages[0])
    stranger.metadata.__dict__["_src_node_id"] = 77  # was not asked
    arrays, _ = strategy.aggregate_train(1, [*replies, replies[0], stranger])
    expected = {name: torch.zeros(layer.shape) for name, layer in plan().layers.items()}
    for reply in replies:
        for name, one in updates_of(reply).items():
            expected[name] += one.dense() / 5
    assert arrays is not None
    for name, value in from_arrays(arrays).items():
        assert torch.allclose(value, expected[name], atol=1e-6)
    assert set(strategy.federation.clients) == {1, 2, 3, 4, 5}


def test_rounds_left_are_resumed(tmp_path: Path) -> None:
    made = plan(budget=BUDGET)
    first = NBLoraStrategy(made, tmp_path)
    first.start(Watched(), num_rounds=1)
    arrays = first.arrays
    first.federation.close()  # as the end of its process would
    again, grid, seen = NBLoraStrategy(made, tmp_path), Watched(), []
    assert again.arrays == arrays
    result = again.start(grid, evaluate_fn=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    assert sorted(result.train_metrics_clientapp) == [2, 3]
    assert int(grid.sent[0].content["config"]["server-round"]) == 2
    assert grid.sent[0].content["arrays"] == arrays
    assert again.start(Watched()).arrays == result.arrays  # nothing is left
    with pytest.raises(RuntimeError, match="has all of its 3 rounds"):
        again.configure_train(4, ArrayRecord(), ConfigRecord(), grid)


def test_clients_are_sampled_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Federation, "sample", lambda self, nodes: nodes[1:3])
    grid = Watched()
    strategy = NBLoraStrategy(plan(), tmp_path)
    strategy.start(grid, num_rounds=1)
    assert [message.metadata.dst_node_id for message in grid.sent] == [2, 3]
    monkeypatch.setattr(Federation, "sample", lambda self, nodes: [])
    strategy.start(grid, num_rounds=1)  # an empty sample is a round like any other
    assert len(grid.sent) == 2
    assert [entry.status for entry in strategy.federation.rounds] == ["released"] * 2


# --- clients that lie, fail, or stay away ---


def with_arrays(change: Callable[[dict[str, Array]], Any]) -> Callable[[Message], Message]:
    def changed(reply: Message) -> Message:
        arrays = dict(reply.content["arrays"].items())
        arrays = change(arrays) or arrays
        return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=reply)

    return changed


def content(**records: Any) -> Callable[[Message], Message]:
    return lambda reply: Message(RecordDict(records), reply_to=reply)


def pickled() -> Array:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was loaded",)

    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([[Trap()]], dtype=object), allow_pickle=True)
    return Array(dtype="float32", shape=(20, 1), stype="numpy.ndarray", data=buffer.getvalue())


def header_of(shape: tuple[int, ...]) -> Array:
    """Of far more numbers than there are."""
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return Array(dtype="float64", shape=shape, stype="numpy.ndarray", data=buffer.getvalue())


def times(factor: float) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda arrays: {name: Array(factor * array.numpy()) for name, array in arrays.items()}


LIES: dict[str, Callable[[Message], Any]] = {
    "error": lambda reply: Message(Error(2, "boom"), reply_to=reply),
    "no arrays": content(),
    "metrics only": content(arrays=MetricRecord({"x": 1.0})),
    "two records": content(arrays=ArrayRecord(), more=ArrayRecord()),
    "another name": content(weights=ArrayRecord()),
    "extra array": with_arrays(lambda arrays: arrays | {"third.left": Array(np.zeros((2, 2)))}),
    "extra part": with_arrays(lambda arrays: arrays | {"first.middle": Array(np.zeros((2, 2)))}),
    "one factor": with_arrays(lambda arrays: arrays.pop("first.left") and None),
    "factors that do not fit": with_arrays(
        lambda arrays: arrays | {"first.left": Array(np.zeros((20, 3), np.float32))}
    ),
    "transposed": with_arrays(lambda arrays: {k: Array(a.numpy().T.copy()) for k, a in arrays.items()}),
    "NaN": with_arrays(times(float("nan"))),
    "norm": with_arrays(times(100.0)),
    "integers": with_arrays(lambda arrays: arrays | {"first.left": Array(np.zeros((20, 2), np.int64))}),
    "text": with_arrays(lambda arrays: arrays | {"first.left": Array(np.array([["x"]]))}),
    "pickle": with_arrays(lambda arrays: arrays | {"first.left": pickled()}),
    "another format": with_arrays(
        lambda arrays: arrays | {"first.left": Array("float32", (20, 2), "pickle", b"cposix\n")}
    ),
    "garbage": with_arrays(
        lambda arrays: arrays | {"first.left": Array("float32", (20, 2), "numpy.ndarray", b"PK\x03\x04....")}
    ),
    "short": with_arrays(lambda arrays: arrays | {"first.left": header_of((20, 2))}),
    "endless": with_arrays(lambda arrays: arrays | {"first.left": header_of((10**9, 10**9))}),
    "large": with_arrays(lambda arrays: arrays | {"first.left": Array(np.zeros((20, 5000)))}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_client_counts_as_zero_and_stops_nothing(lie: str, tmp_path: Path) -> None:
    grid = Watched({3: LIES[lie]})
    strategy = NBLoraStrategy(plan(budget=None), tmp_path)
    result = strategy.start(grid, num_rounds=1)
    reports = strategy.federation.clients
    assert [reports[node].status for node in (1, 2, 4, 5)] == ["accepted"] * 4
    assert reports[3].status in ("refused", "rejected")
    assert reports[3].reason
    expected = {name: torch.zeros(layer.shape) for name, layer in plan().layers.items()}
    for node in (1, 2, 4, 5):
        for name, one in updates_of(grid.replies[node]).items():
            expected[name] += one.dense() / 5
    for name, value in from_arrays(result.arrays).items():
        assert torch.allclose(value, expected[name], atol=1e-6)


def test_a_client_that_raises_counts_as_zero(tmp_path: Path) -> None:
    def broken(model: nn.Module, context: Any, index: int) -> None:
        if context.node_id == 2:
            raise FloatingPointError("no luck")
        fit(model, context, index)

    strategy = NBLoraStrategy(plan(), tmp_path)
    strategy.start(InProcessGrid(client_app(base_model, broken, rank=4), NODES), num_rounds=1)
    assert strategy.federation.clients[2].status == "refused"
    assert "no luck" in strategy.federation.clients[2].reason
    assert strategy.federation.clients[1].status == "accepted"


class Failing(Watched):
    """Pulling one node's reply raises, as Flower's grids do where a reply cannot be inflated."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def pull_messages(self, message_ids: Any) -> Any:
        names = list(message_ids)
        if any(self._waiting[name].metadata.dst_node_id == 4 for name in names if name in self._waiting):
            raise self.error
        return super().pull_messages(names)


def test_a_reply_that_cannot_be_pulled_costs_only_its_own(tmp_path: Path) -> None:
    strategy = NBLoraStrategy(plan(), tmp_path)
    strategy.start(Failing(ValueError("Unexpected set of children")), num_rounds=1)
    statuses = {node: client.status for node, client in strategy.federation.clients.items()}
    assert statuses == {1: "accepted", 2: "accepted", 3: "accepted", 4: "refused", 5: "accepted"}


def test_a_superlink_that_is_gone_ends_the_run_and_spends_nothing(tmp_path: Path) -> None:
    import httpx

    strategy = NBLoraStrategy(plan(budget=BUDGET), tmp_path)
    with pytest.raises(httpx.ConnectError):
        strategy.start(Failing(httpx.ConnectError("refused")), num_rounds=1)
    assert PrivacyLedger(tmp_path / "ledger.json").releases == ()
    assert strategy.federation.next_round == 1


def test_who_does_not_answer_in_time_is_absent(tmp_path: Path) -> None:
    class Slow(Watched):
        def pull_messages(self, message_ids: Any) -> Any:
            keep = [i for i in message_ids if self._waiting[i].metadata.dst_node_id != 5]
            return super().pull_messages(keep)

    strategy = NBLoraStrategy(plan(), tmp_path)
    strategy.start(Slow(), num_rounds=1, timeout=1.0)
    assert strategy.federation.clients[5].status == "absent"
    assert strategy.federation.clients[4].status == "accepted"


def test_messages_that_nobody_could_get_spend_nothing(tmp_path: Path) -> None:
    class Full(Watched):
        def push_messages(self, messages: Any) -> Any:
            return []

    strategy = NBLoraStrategy(plan(budget=BUDGET), tmp_path)
    with pytest.raises(RuntimeError, match="messages must reach the SuperLink"):
        strategy.start(Full(), num_rounds=1)
    assert PrivacyLedger(tmp_path / "ledger.json").releases == ()


def test_a_round_does_not_wait_for_ever_for_nodes(tmp_path: Path) -> None:
    strategy = NBLoraStrategy(plan(), tmp_path, min_nodes=99, wait=0.6)
    strategy.start(Watched(), num_rounds=1)
    assert len(strategy.federation.clients) == 5


@pytest.mark.parametrize("options", [{"min_nodes": 0}, {"wait": -1.0}, {"wait": float("nan")}])
def test_options_outside_their_rules_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_nodes|wait"):
        NBLoraStrategy(plan(), tmp_path, **options)


def test_a_client_needs_no_accounting_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = NBLoraStrategy(plan(budget=BUDGET), tmp_path)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    strategy.start(Watched(), num_rounds=1)
    assert all(client.status == "accepted" for client in strategy.federation.clients.values())


def test_the_app_is_flowers() -> None:
    assert isinstance(client_app(base_model, fit, rank=2), ClientApp)


# --- engines, with real processes ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """A SuperLink of its own, and what runs on it; everything below one folder."""

    def __init__(self, folder: Path, app: Path) -> None:
        self.folder, self.app, self.port = folder, app, free_port()
        self.bin = Path(sys.executable).parent
        (folder / "home").mkdir(parents=True)
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(self.bin / program), "--insecure", "--host", "127.0.0.1", *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            )

    def superlink(self, *arguments: str) -> None:
        install = "--disable-runtime-dependency-installation"
        self.start("superlink", "flower-superlink", "--port", str(self.port), install, *arguments)
        wait_for(lambda: is_open(self.port), 120)

    def supernode(self, index: int, **config: int) -> None:
        node = " ".join(f"{key.replace('_', '-')}={value}" for key, value in config.items())
        address = ("--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()))
        self.start(f"node{index}", "flower-supernode", *address, "--node-config", node)

    def run(self, *arguments: str, **config: Any) -> subprocess.Popen[str]:
        settings = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in config.items())
        command = ["flwr", "run", ".", "here", "--stream", "--run-config", settings, *arguments]
        return subprocess.Popen(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.app,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log"))

    def stop(self) -> None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                with_group(process.pid, kind)
            end = time.monotonic() + 10
            while any(p.poll() is None for p in self.processes) and time.monotonic() < end:
                time.sleep(0.1)


def with_group(pid: int, kind: int) -> None:
    """Signal a process and those it has started: each was made the leader of a group."""
    with suppress(ProcessLookupError):
        os.killpg(pid, kind)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def rounds_in(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / "state.json").read_text())["rounds"]  # type: ignore[no-any-return]
    except FileNotFoundError:
        return []


LIAR = """

# --- added by the test: a client that lies, and a note of the ranks of all ---
from flwr.app import Array, ArrayRecord, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

honest, app = app, ClientApp()


@app.train()
def lie(message, context):
    reply = honest(message, context)
    arrays = reply.content["arrays"]
    with open(f"{context.run_config['folder']}-ranks.txt", "a") as file:
        file.write(f"{index(context)} {arrays['0.left'].numpy().shape[1]}\\n")
    if context.node_config.get("lies"):
        more = {name: Array(array.numpy() * float("nan")) for name, array in arrays.items()}
        return Message(RecordDict({"arrays": ArrayRecord(more)}), reply_to=message)
    return reply
"""


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    app = folder / "app"
    shutil.copytree(EXAMPLE, app, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    with (app / "federated_digits" / "client_app.py").open("a") as file:
        file.write(LIAR)
    made = Engine(folder / "engine", app)
    subprocess.run(
        [sys.executable, "prepare.py", "--out", str(folder / "base.safetensors")],
        cwd=app,
        env=made.environment,
        check=True,
        capture_output=True,
    )
    try:
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        made.stop()


def accuracies(output: str) -> dict[int, float]:
    found = re.findall(r"after (\d+) rounds: accuracy ([\d.]+)", output)
    return {int(done): float(score) for done, score in found}


@pytest.mark.slow
def test_deployment_with_a_liar_and_a_server_that_is_killed(tmp_path: Path) -> None:
    """Five client processes with ranks of their own, three rounds; SIGKILL for the server in the second."""
    state = tmp_path / "state"
    with engine(tmp_path) as made:
        made.superlink()
        for index in range(5):
            made.supernode(index, partition_id=index, num_partitions=5, lies=int(index == 4))
        # an epsilon that lets through what was learnt: the noise is there and accounted for
        config = {"base": str(tmp_path / "base.safetensors"), "folder": str(state), "epsilon": 2000.0}
        first = made.run(**config)
        wait_for(lambda: len(rounds_in(state)) == 1, 400)
        server = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit()
            and (command := command_of(path))
            and "flwr-serverapp" in command
            and str(made.port) in command
        ]
        assert server, "no process of the server"
        for pid in server:
            os.kill(pid, signal.SIGKILL)
        ledger = PrivacyLedger(state / "ledger.json")
        spent = ledger.spent().epsilon
        first.terminate()
        before = first.communicate(timeout=120)[0]
        saved = rounds_in(state)
        again = made.run(**config)
        after = again.communicate(timeout=500)[0]
    rounds = rounds_in(state)
    assert rounds[: len(saved)] == saved
    assert [entry["index"] for entry in rounds] == [1, 2, 3]
    assert [entry["status"] for entry in rounds] == ["released"] * 3
    assert [release.identifier for release in ledger.releases] == [entry["release"] for entry in rounds]
    assert 0 < spent < ledger.spent().epsilon <= 2000
    scores = accuracies(before) | accuracies(after)
    assert list(accuracies(after)) == [1, 2, 3]  # it went on where it was
    assert scores[0] < 0.2
    assert scores[3] > 0.6
    assert "client" in after
    assert "refused: entries must be finite" in after
    ranks = {tuple(map(int, line.split())) for line in Path(f"{state}-ranks.txt").read_text().splitlines()}
    assert ranks == set(enumerate(RANKS))


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_simulation(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with engine(tmp_path) as made:
        made.superlink("--simulation")
        run = made.run(
            "--federation-config",
            "num-supernodes=5",
            base=str(tmp_path / "base.safetensors"),
            folder=str(state),
        )
        scores = accuracies(run.communicate(timeout=500)[0])
    assert [entry["status"] for entry in rounds_in(state)] == ["released"] * 3
    assert scores[0] < 0.2
    assert scores[3] > 0.85
    ranks = {tuple(map(int, line.split())) for line in Path(f"{state}-ranks.txt").read_text().splitlines()}
    assert ranks == set(enumerate(RANKS))


@pytest.mark.slow
def test_comparison_runs(tmp_path: Path) -> None:
    command = [sys.executable, "compare.py", "--clients", "5", "--epsilon", "0", "8", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--tune", "1", "--json", str(tmp_path / "rows.json")],
        cwd=EXAMPLE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(len(row["scores"]) == 2 for row in rows)
    assert done.stdout.count("\n|") == 6
