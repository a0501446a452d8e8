"""The report of a comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nblora.checkpoints import PathLike
from nblora.reporting.answers import answer_sentence, columns_and_findings, further_sentences
from nblora.reporting.comparison_plots import curve_plot, trade_off_plot
from nblora.reporting.page import TASKS, reproducing_snippets, write_page
from nblora.reporting.sweep import (
    HeatMap,
    available_methods,
    both_text,
    has_kept,
    heat_cell,
    heat_ends,
    label_of,
    scales_of,
    setting_text,
    shared_maps,
    styles,
)
from nblora.reporting.words import (
    Scale,
    Score,
    epochs_text,
    finite_number,
    fixed_text,
    levels,
    listed,
    look_up,
    plural,
    rate_labels,
    rate_text,
)


def _meanings(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the columns of the main table say, with their units."""
    shown, kept, where = scales_of(comparison), has_kept(comparison), _reference_text(comparison)
    if comparison["metric"] == "accuracy":
        unit = "Accuracies are in per cent of the test samples."
    else:
        unit = "Nats per token of test data: gained on the target (higher is better)"
        unit += " and lost on kept (lower is better) against the model before training." if kept else "."
    seeds = len({run.get("seed") for run in comparison["runs"]})
    spread = f"; ± is the standard deviation over {seeds} seeds." if seeds > 1 else "; one seed."
    bound = " and bound" if any(run.get("bound") is not None for run in comparison["runs"]) else ""
    tolerance = shown["target"].lost(comparison.get("tolerance"))
    corner = [finite_number(score) for score in comparison.get("hypervolume_corner") or []]
    meanings = [
        ("Scores", unit),
        (
            "(a)",
            f"At {where}, with the learning rate{bound} that did best on the target's validation data, as a "
            f"user would pick{spread}",
        ),
        (
            "(b)",
            "Mean and worst run over every learning rate, rank, epoch count and bound: what carelessness "
            "costs. A diverged run counts with the worst score of all runs.",
        ),
        (
            "(c)",
            f"Per cent of the settings within {tolerance} of the method's own best"
            + (" on the target, and in the mean of target and kept." if kept else " on the target."),
        ),
        (
            "(d)",
            f"What was picked at {where}, reused at the other ranks and epoch counts: the most that this "
            f"loses on the target against picking again there{', and the worst kept score' if kept else ''}.",
        ),
    ]
    if not any(entry.get("transfer") for entry in available_methods(comparison)):
        meanings.pop()
    if kept:
        meaning = "The area of target and kept score that the front of a seed's runs dominates"
        if None not in corner and len(corner) == 2:
            words = both_text(corner, shown)
            meaning += f", measured from {words}"
        meanings.append(("(e)", f"{meaning}. Higher is better{', ± as above' if seeds > 1 else ''}."))
    meanings.append(("(f)", f"Of a run at {where}: training time and peak memory, medians."))
    return meanings


def _reference_text(comparison: Mapping[str, Any]) -> str:
    reference = comparison["reference"]
    return f"rank {reference['rank']} and {epochs_text(reference['epochs'])}"


def _table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The main table, with the best of each column."""
    (columns, findings), looks = columns_and_findings(comparison), styles(comparison)
    rows: dict[str, list[tuple[str, bool]]] = {method: [] for method in findings}
    for column in columns:
        values = {
            method: column.better * value
            for method, found in findings.items()
            if (value := column.value(found)) is not None
        }
        best = max(values.values()) if column.better and len(set(values.values())) > 1 else None
        for method, found in findings.items():
            rows[method].append((column.text(found), best is not None and values.get(method) == best))
    groups: list[list[Any]] = []
    firsts = []
    for index, column in enumerate(columns, start=1):
        if not groups or groups[-1][0] != column.group:
            groups.append([column.group, 0])
            firsts.append(index)
        groups[-1][1] += 1
    return {
        "groups": groups,
        "firsts": firsts,
        "heading": ["method", *(column.heading for column in columns)],
        "rows": [(looks[method], cells) for method, cells in rows.items()],
        "meanings": _meanings(comparison),
    }


def _heat_family(comparison: Mapping[str, Any], along: str) -> dict[str, Any] | None:
    """All maps along one setting, with shared colours."""
    shown, found, looks = scales_of(comparison), shared_maps(comparison, along), styles(comparison)
    if not found:
        return None
    ends = {score: heat_ends(maps, shown[score]) for score, maps in found.items()}
    columns = sorted({rate for maps in found.values() for heat_map in maps for rate in heat_map.columns})
    methods: dict[str, dict[str, Any]] = {}
    for score, maps in found.items():
        for heat_map in maps:
            row = methods.setdefault(heat_map.style.method, {"style": heat_map.style, "maps": []})
            rows = _heat_rows(heat_map, columns, shown[score], ends[score])
            row["maps"].append({"title": shown[score].title, "rows": rows})
    reference = comparison["reference"]
    fixed = {
        "rank": epochs_text(reference["epochs"]),
        "epochs": f"rank {reference['rank']}",
        "bound": _reference_text(comparison),
    }[along]
    others = listed([style.label for method, style in looks.items() if method not in methods])
    caption = (
        f"At {fixed}. Columns are learning rates, cells means over the seeds: ✗ where every run was lost, "
        "* where some were. The same colour is the same score for all methods."
    )
    if others:
        caption += f" Without a {along} to vary: {others}."
    return {
        "along": along,
        "title": f"{along.capitalize()} × learning rate",
        "caption": caption,
        "columns": rate_labels(columns),
        "scales": [
            {
                "title": shown[score].title,
                "worst": fixed_text(worst, shown[score].digits),
                "best": fixed_text(best, shown[score].digits),
            }
            for score, (worst, best) in ends.items()
        ],
        "methods": list(methods.values()),
    }


def _heat_rows(
    heat_map: HeatMap, columns: Sequence[float], scale: Scale, ends: tuple[float, float]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, cells) of each row of a map, with a cell for each of `columns`."""
    rows = []
    for name, row in zip(heat_map.rows, heat_map.cells):
        by_rate = dict(zip(heat_map.columns, row))
        cells = []
        for rate in columns:
            setting = by_rate.get(rate)
            level, text = heat_cell(setting, heat_map.score, scale, ends)
            words = "did not run"
            if setting is not None:
                spread = setting.score(heat_map.score)
                parts = (setting_text(setting), spread and scale.phrase(spread.mean), setting.lost_in_words)
                words = "; ".join(part for part in parts if part)
                text += "*" if spread and setting.lost_in_words else ""
            cells.append({"level": level, "text": text, "title": words})
        rows.append((rate_text(name), cells))
    return rows


def _transfer(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of what was picked at the reference, at other ranks and epoch counts."""
    shown, looks = scales_of(comparison), styles(comparison)
    entries = [entry for entry in available_methods(comparison) if entry.get("transfer")]
    places = sorted(
        {(found["epochs"], found.get("rank")) for entry in entries for found in entry["transfer"]},
        key=lambda place: (place[1] is None, place[0], place[1] or 0),
    )
    rows = []
    for entry in entries:
        by_place = {(found["epochs"], found.get("rank")): found for found in entry["transfer"]}
        rates = {rate_text(found.get("learning_rate")) for found in entry["transfer"]}
        cells = [_transfer_cell(by_place.get(place), shown) for place in places]
        rows.append((looks[entry["method"]], ", ".join(sorted(rates)), cells))
    titles = [shown["target"].title, *([shown["kept"].title] if has_kept(comparison) else [])]
    return {
        "columns": [
            f"{'no rank' if rank is None else f'rank {rank}'}, {epochs_text(epochs)}"
            for epochs, rank in places
        ],
        "rows": rows,
        "caption": f"Picked at {_reference_text(comparison)}, used elsewhere. A cell has "
        f"{' / '.join(titles)}, and below how much is lost on the target against picking again there.",
    }


def _transfer_cell(found: Mapping[str, Any] | None, shown: Mapping[Score, Scale]) -> tuple[str, str]:
    """Scores, and what was lost."""
    if found is None:
        return "", ""
    scores = [
        shown[score].text(look_up(found, score, "mean"))
        for score in ("target", "kept")
        if score == "target" or found.get(score)
    ]
    lost = finite_number(found.get("target_lost"))
    return " / ".join(scores), "" if lost is None else f"lost {shown['target'].lost(lost)}"


def _lost_runs(comparison: Mapping[str, Any]) -> dict[str, Any]:
    labels = {entry["method"]: label_of(entry) for entry in comparison["methods"]}
    lost = [run for run in comparison["runs"] if run["status"] in ("failed", "diverged")]
    total = len(comparison["runs"])
    diverged = sum(run["status"] == "diverged" for run in lost)
    parts = [
        f"{count} {word}"
        for count, word in ((diverged, "diverged"), (len(lost) - diverged, "failed"))
        if count
    ]
    return {
        "heading": ("method", "learning rate", "rank", "epochs", "bound", "seed", "what happened"),
        "caption": f"Of {plural(total, 'run')} {listed(parts)}. "
        "A diverged run counts with the worst score of all runs, a failed one not at all.",
        "rows": [
            (
                labels.get(run["method"], str(run["method"])),
                *(rate_text(run.get(name)) for name in ("learning_rate", "rank", "epochs", "bound", "seed")),
                f"{run['status']}: {run['error']}" if run.get("error") else run["status"],
            )
            for run in lost
        ],
    }


def _extent(comparison: Mapping[str, Any]) -> str:
    """How much was tried."""
    grid = comparison.get("grid") or {}
    parts = [plural(len(available_methods(comparison)), "method")]
    for name, word in (
        ("learning_rates", "learning rate"),
        ("ranks", "rank"),
        ("bounds", "bound"),
        ("seeds", "seed"),
    ):
        if grid.get(name):
            parts.append(plural(len(grid[name]), word))
    if grid.get("epochs"):
        parts.append(plural(len(grid["epochs"]), "epoch count"))
    return f"{listed(parts)}, {plural(len(comparison['runs']), 'run')}"


def _comparison_facts(comparison: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    grid, task = comparison.get("grid") or {}, str(comparison["task"])
    facts = [
        ("Model", str(comparison["model"]), True),
        ("Task", TASKS.get(task, (task,))[0], False),
        ("Data to learn", str(comparison["data"]), True),
    ]
    if comparison.get("keep"):
        facts.append(("Data to keep", str(comparison["keep"]), True))
    for name, word in (
        ("learning_rates", "Learning rates"),
        ("ranks", "Ranks"),
        ("epochs", "Epochs"),
        ("bounds", "Bounds"),
        ("seeds", "Seeds"),
    ):
        if grid.get(name):
            labels = rate_labels(grid[name]) if name == "learning_rates" else map(rate_text, grid[name])
            facts.append((word, ", ".join(labels), False))
    return facts


def _before_in_words(comparison: Mapping[str, Any]) -> str:
    scale, before = levels(comparison["metric"]), comparison.get("before") or {}
    parts = [
        f"{name} {scale.measure(before[key])}"
        for key, name in (("target", "target"), ("kept", "kept"))
        if finite_number(before.get(key)) is not None
    ]
    per = " per token" if comparison["metric"] == "nats" else ""
    return f"Before training: {listed(parts)}{per}." if parts else ""


def comparison_report(comparison: Mapping[str, Any], out: PathLike) -> Path:
    """Write the report of a comparison.

    Args:
        comparison: as `comparison.json` holds it; "command" and "config" are shown where they are there.
        out: the HTML file, in the folder of the comparison.

    Returns:
        The file.

    Raises:
        ImportError: without plotly or jinja2.
        OSError: if the file cannot be written; one that was there stays whole.
    """
    curves = [plot for score in ("target", "kept") if (plot := curve_plot(comparison, score))]
    trade_off = trade_off_plot(comparison)
    folder = Path(out).parent
    again = None
    if (folder / "config.yaml").is_file():
        arguments = ["--config", str(folder / "config.yaml"), "--out", f"{folder}-again"]
        again = shlex.join(["nblora", "compare", *arguments])
    families = [_heat_family(comparison, along) for along in ("rank", "epochs", "bound")]
    return write_page(
        out,
        "comparison.html",
        title=f"Comparison of methods: {comparison['model']}",
        answer=answer_sentence(comparison),
        model=str(comparison["model"]),
        data=str(comparison["data"]),
        keep=comparison.get("keep"),
        extent=_extent(comparison),
        short=further_sentences(comparison),
        before=_before_in_words(comparison),
        table=_table(comparison),
        styles=list(styles(comparison).values()),
        plots={"trade_off": trade_off, "curves": curves} if curves or trade_off else None,
        heat_maps=[family for family in families if family],
        transfer=_transfer(comparison),
        lost_runs=_lost_runs(comparison),
        unavailable=[
            (label_of(entry), str(entry.get("reason") or "no reason given"))
            for entry in comparison["methods"]
            if not entry.get("available", True)
        ],
        facts=_comparison_facts(comparison),
        reproducing=reproducing_snippets(comparison, again),
    )
