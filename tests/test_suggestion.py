"""Suggestions: the probe's choice follows from its own table, and the table from the probes alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForSequenceClassification

from job_samples import classifier, review_folder
from nblora import suggestion as module
from nblora.suggestion import Probe, Suggestion, choose_bound, suggest
from test_training import LABELS, accuracy, contents


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three classes, of which the model knows two, so that a head is trained too."""
    folder = tmp_path_factory.mktemp("job")
    return {
        "model": classifier(folder / "model", "bad", "good"),
        "data": review_folder(folder / "data", ("bad", "good", "odd")),
        "keep": review_folder(folder / "keep", ("good", "bad"), first=7),
        "task": "seq-cls",
        "adapter": {"r": 2, "bound": 0.7},
        "train": {"use_cpu": True, "per_device_train_batch_size": 4, "learning_rate": 5.0},
    }


@pytest.fixture(scope="session")
def found(job: dict[str, Any]) -> Suggestion:
    return suggest(job, steps=5, learning_rates=(1e-3, 1e-1), bounds=(1.0, 0.3))


def scores(probes: tuple[Probe, ...]) -> list[tuple[float, float | None]]:
    return [(probe.target, probe.kept) for probe in probes]


def test_choice_follows_from_the_table(found: Suggestion) -> None:
    assert (found.metric, found.steps) == ("accuracy", 5)
    assert [probe.learning_rate for probe in found.rates] == [1e-3, 1e-1]
    assert {probe.bound for probe in found.rates} == {module.BOUND_OF_RATES}
    best = max(found.rates, key=lambda probe: probe.target)
    assert found.learning_rate == best.learning_rate
    assert [probe.bound for probe in found.bounds] == [0.3, 1.0]
    assert {probe.learning_rate for probe in found.bounds} == {best.learning_rate}
    assert found.bounds[0] is best, "what was measured is not measured again"
    assert found.bound == max(found.bounds, key=lambda probe: probe.target + (probe.kept or 0)).bound
    assert len(set(scores((found.before, *found.rates, *found.bounds)))) > 2, "the probes must differ"


def test_before_is_the_base_model(found: Suggestion, job: dict[str, Any]) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(job["model"])
    assert found.before.bound == 0
    assert found.before.kept == pytest.approx(accuracy(base, job["keep"], "validation", LABELS)["accuracy"])


def test_no_probe_depends_on_those_before_it(found: Suggestion, job: dict[str, Any]) -> None:
    alone = suggest(job, steps=5, learning_rates=(1e-1,), bounds=(1.0,))
    assert scores(alone.rates) == scores(found.rates[1:])
    assert alone.before.kept == found.before.kept
    if found.learning_rate == 1e-1:
        assert scores(alone.bounds) == scores(found.bounds[1:])


def test_nothing_is_written_and_progress_ends_at_its_total(job: dict[str, Any]) -> None:
    before = contents(Path(job["model"])) | contents(Path(job["data"]))
    seen: list[tuple[int, int]] = []
    suggest(
        {**job, "keep": None},
        steps=1,
        learning_rates=(1e-2,),
        bounds=(0.1, 0.3),
        advance=lambda step, last: seen.append((step, last)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert contents(Path(job["model"])) | contents(Path(job["data"])) == before


@pytest.mark.parametrize("part", ["target", "keep"])
def test_scores_that_are_no_numbers_are_never_chosen(
    part: str, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: set[float] = {1e-2}

    class Trainer(module.BoundedTrainer):
        def train(self, *args: Any, **kwargs: Any) -> None: ...

        def measure(self, which: str) -> dict[str, dict[str, float] | None]:
            scores = {name: {"score": 0.1} for name in ("target", "keep")}
            scores[part]["score"] = math.nan if self.args.learning_rate in broken else 0.1
            return {**scores}

    monkeypatch.setattr(module, "BoundedTrainer", Trainer)
    found = suggest(job, steps=1, learning_rates=(1e-2, 1e-1))
    assert found.learning_rate == 1e-1
    broken.add(1e-1)
    with pytest.raises(ValueError, match="every learning rate of the probe gave scores that are not numbers"):
        suggest(job, steps=1, learning_rates=(1e-2, 1e-1))


def table(*rows: tuple[float, float | None]) -> list[Probe]:
    return [Probe(0.01, bound, *row) for bound, row in zip((0.1, 0.2, 0.3, 0.6), rows)]


def chosen(before: tuple[float, float | None], *rows: tuple[float, float | None]) -> float:
    return choose_bound(Probe(0.01, 0.0, *before), table(*rows))


def test_bound_with_kept_data_has_the_best_mean() -> None:
    assert chosen((0.1, 0.9), (0.5, 0.9), (0.7, 0.85), (0.8, 0.6)) == 0.2
    assert chosen((-3.0, -1.0), (-2.0, -1.1), (-1.5, -1.2), (-1.4, -2.0)) == 0.2, "nats"
    assert chosen((0.1, 0.9), (0.5, 0.5), (0.25, 0.75)) == 0.1, "the smallest of equal ones"
    assert chosen((0.1, 0.9), (math.nan, 0.9), (0.9, math.nan), (0.2, 0.2)) == 0.3


def test_bound_without_kept_data_has_nearly_the_whole_gain() -> None:
    assert chosen((0.1, None), (0.5, None), (0.88, None), (0.9, None), (0.9, None)) == 0.2
    assert chosen((-3.0, None), (-2.0, None), (-1.06, None), (-1.0, None)) == 0.2, "nats"
    assert chosen((0.1, None), (0.5, None), (0.5, None)) == 0.1, "the smallest of equal ones"
    assert chosen((0.5, None), (0.5, None), (0.5, None)) == 0.1, "nothing gained"
    assert chosen((0.5, None), (0.2, None), (0.4, None), (0.3, None)) == 0.2, "the least that is lost"
    assert chosen((0.1, None), (math.nan, None), (0.5, None)) == 0.2


def test_bounds_without_any_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="every bound of the probe gave scores that are not numbers"):
        chosen((0.5, None), (math.nan, None), (-math.inf, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"learning_rates": ()}, "learning rates must be positive numbers, at least one"),
        ({"learning_rates": (math.nan,)}, "learning rates must be positive numbers"),
        ({"bounds": (0.0,)}, "bounds must be positive numbers"),
        ({"settings": {"adapter": {"bound_kind": "absolute"}}}, "one relative bound; bound_kind and"),
        ({"settings": {"adapter": {"bound_pattern": {"query": 1.0}}}}, "one relative bound; bound_kind and"),
        ({"settings": {"train": {"learning_rat": 1}}}, "did you mean 'learning_rate'"),
        ({"settings": {"task": "seq-clf"}}, "did you mean 'seq-cls'"),
        ({"settings": {"load": {"dtpye": "bfloat16"}}}, "load must have arguments of from_pretrained"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], message: str, job: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        suggest({**job, **options.pop("settings", {})}, **options)
