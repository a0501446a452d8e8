"""The command line: each command is one call of a public function, with its result printed."""

from __future__ import annotations

import importlib.util
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import nblora

if TYPE_CHECKING:
    from nblora.certificate import Certificate
    from nblora.checkpoints import CutReport
    from nblora.privacy import Plan

app = typer.Typer(
    name="nblora",
    help="Norm-bounded low-rank adaptation: fine-tuning whose updates cannot grow too large.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

UNREADABLE = 2  # exit status for input that cannot be read, as for wrong options
BROKEN = 1  # exit status for a broken bound
STOPPED = 130  # exit status after Ctrl-C, as shells have it


def _version(value: bool) -> None:
    if value:
        typer.echo(f"nblora {nblora.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command()
def certify(
    path: Annotated[
        str,
        typer.Argument(
            help="A saved NB-LoRA adapter, or a plain LoRA that `nblora export` wrote: a folder or a hub "
            "repository."
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Measure every update of an adapter against its bound.

    Exit status: 0 if every bound holds, 1 if one is broken, 2 if the adapter can't be read.
    """
    with _crashes_apart(), _one_line_errors():
        certificate = nblora.certify(path)
        if json:
            typer.echo(certificate.to_json())
        else:
            styles = [None if layer.holds else "bold red" for layer in certificate.layers]
            _print_rows(certificate.rows(), f"Certificate of {path}", styles)
            _print_summary(certificate)
    raise typer.Exit(0 if certificate.holds else BROKEN)


_Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
_Lora = Annotated[
    str,
    typer.Argument(
        help="A LoRA: a safetensors file (of PEFT, diffusers or kohya's scripts), a folder, or a hub "
        "repository.",
        show_default=False,
    ),
]
_Norm = Annotated[str, typer.Option(help="spectral, frobenius, nuclear, ky-fan-q or a number p >= 1.")]
_Base = Annotated[
    Path | None,
    typer.Option(help="The base model: a folder with safetensors files, or one such file. Only read."),
]
_RELATIVE_HELP = "The bound is times the spectral norm of each layer's base weight; needs --base."


@app.command()
def export(
    path: Annotated[str, typer.Argument(help="A saved NB-LoRA adapter: a folder or a hub repository.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the plain LoRA to.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or float64; the bound holds after rounding.")
    ] = "float32",
    layout: Annotated[
        str, typer.Option(help="peft (for PEFT and serving engines), diffusers or kohya.")
    ] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="Of all layers. Default: the largest of the adapter.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="unet, transformer, text_encoder, ...: what of a pipeline the adapted model is."),
    ] = None,
    json: _Json = False,
) -> None:
    """Write an NB-LoRA adapter as a plain LoRA, exactly, and say which serving engines take it.

    Not for convolutions with groups, dilation or padding other than with zeros, which PEFT's LoRA does not
    have: a saved adapter does not tell of them.

    Exit status: 0 if done, 2 for input that cannot be used; nothing is written then.
    """
    with _one_line_errors():
        with _layers_bar("Exporting") as advance:
            nblora.export_lora(
                path,
                out,
                dtype=dtype,
                layout=cast(Any, layout),
                rank=rank,
                component=component,
                advance=advance,
            )
        from nblora.checkpoints import exported_file

        written = exported_file(out, cast(Any, layout))
        certificate, engines = nblora.certify(written), nblora.check_engines(written)
    if json:
        typer.echo(_joined(certificate=certificate, engines=engines))
        return
    typer.echo(f"Wrote a plain LoRA in {dtype} to {out}. {certificate.summary}")
    if layout == "peft":
        _print_rows(engines.rows(), "Serving engines")


@app.command(name="import")
def import_(
    path: _Lora,
    out: Annotated[Path, typer.Argument(help="Folder to write the NB-LoRA adapter to.")],
    bound: Annotated[float, typer.Option(help="On the norm of every update.", show_default=False)],
    norm: _Norm = "frobenius",
    relative: Annotated[bool, typer.Option("--relative/--absolute", help=_RELATIVE_HELP)] = True,
    base: _Base = None,
    parametrization: Annotated[str, typer.Option(help="joint, svd or radial.")] = "joint",
    component: Annotated[
        str | None, typer.Option(help="Which component of a pipeline, where the file has several.")
    ] = None,
    json: _Json = False,
) -> None:
    """Turn a trained LoRA into an NB-LoRA adapter, which loads with PEFT and continues training.

    Updates inside their bound are the same; of others the nearest update inside is taken.

    Exit status: 0 if done, 2 for input that cannot be used; nothing is written then.
    """
    with _one_line_errors(), _layers_bar("Importing") as advance:
        report = nblora.import_lora(
            path,
            out,
            norm=_norm(norm),
            bound=bound,
            bound_kind="relative" if relative else "absolute",
            base=base,
            parametrization=cast(Any, parametrization),
            component=component,
            advance=advance,
        )
    _print_report(report, json, f"What was cut of {path}", f"Wrote an NB-LoRA adapter to {out}.")


@app.command()
def clip(
    path: _Lora,
    bound: Annotated[float, typer.Option(help="On the norm of every update.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Argument(help="File or folder to write; without it, in place of the LoRA.", show_default=False),
    ] = None,
    norm: _Norm = "spectral",
    relative: Annotated[bool, typer.Option("--relative/--absolute", help=_RELATIVE_HELP)] = False,
    base: _Base = None,
    json: _Json = False,
) -> None:
    """Cap the size of every update of a LoRA and write a LoRA of the same layout.

    Exit status: 0 if done, 2 for input that cannot be used; nothing is written then.
    """
    with _one_line_errors(), _layers_bar("Clipping") as advance:
        if out is None and not Path(path).exists():
            raise ValueError(f"OUT must be given where the LoRA is no path here, got {path!r}")
        report = nblora.clip_lora(
            path,
            path if out is None else out,
            norm=_norm(norm),
            bound=bound,
            bound_kind="relative" if relative else "absolute",
            base=base,
            advance=advance,
        )
    _print_report(report, json, f"What was cut of {path}", f"Wrote {path if out is None else out}.")


@app.command()
def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="LoRA or NB-LoRA adapters: safetensors files (of PEFT, diffusers or kohya's scripts), "
            "folders, hub repositories.",
            show_default=False,
        ),
    ],
    base: _Base = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra to this PNG, PDF or SVG file.")] = None,
    json: _Json = False,
) -> None:
    """Show spectrum, norms and stable rank of every update, the most dangerous first.

    Danger is the spectral norm; with --base, over the spectral norm of the layer's base weight. Of a PEFT
    LoRA also which serving engines take it.

    Exit status: 0 if done, 2 for input that cannot be used.
    """
    with _one_line_errors():
        if plot is not None:
            _needs("A plot", "matplotlib", extra="plots")
        inspections = []
        for path in paths:
            with _layers_bar("Inspecting") as advance:
                inspections.append(nblora.inspect_lora(path, base=base, advance=advance))
        if plot is not None:
            from nblora.checkpoints.figures import plot_spectra

            plot_spectra(inspections, plot)
    if json:
        from nblora.checkpoints.tables import json_text

        typer.echo(json_text([inspection.content() for inspection in inspections]))
        return
    for inspection in inspections:
        _print_rows(inspection.rows(), inspection.source)
        typer.echo(inspection.summary)
        if inspection.engines is not None and inspection.layout == "peft":
            _print_rows(inspection.engines.rows(), "Serving engines")


@app.command()
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="NB-LoRA adapters and LoRAs, mixed as wanted: folders, safetensors files, hub repositories; "
            "of a private merge only paths, one for each client that was invited.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    weights: Annotated[
        str | None, typer.Option(help="With commas, one for each adapter. Default: the mean.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Largest rank of a layer; with a point (0.99) the share of the squared Frobenius norm to "
            "keep. Default: all of it. Of a private merge: the rank of the adapter; without it the base "
            "weights are written with the merged update added."
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            help="On the norm of every merged update; of a private merge on that of every client's, in place "
            "of the bounds that files note."
        ),
    ] = None,
    norm: _Norm = "frobenius",
    relative: Annotated[bool, typer.Option("--relative/--absolute", help=_RELATIVE_HELP)] = False,
    base: _Base = None,
    method: Annotated[
        str | None,
        typer.Option(help="exact, ties, dare_linear, dare_ties or magnitude_prune. Default: exact."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that a method other than exact keeps.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what DARE drops. Default: 0.")] = None,
    layout: Annotated[str, typer.Option(help="peft, diffusers or kohya.")] = "peft",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: float32.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Which component of a pipeline (unet, transformer, text_encoder, ...)."),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="Add noise that hides each client; needs the three options below."),
    ] = False,
    epsilon: Annotated[float | None, typer.Option(help="Of the guarantee.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of the guarantee, as 1e-5.")] = None,
    adjacency: Annotated[
        str | None, typer.Option(help="add-remove (a client more or less) or replace-one (another client).")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(help="The public denominator of the mean. Default: the number of adapters listed."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A public adapter, as it was handed out: its layers, shapes, ranks and bounds are expected, "
            "and what does not fit counts as zero. Without it all configurations are taken as public."
        ),
    ] = None,
    on_excess: Annotated[
        str | None,
        typer.Option(help="reject or project clients that are over their bound. Default: reject."),
    ] = None,
    project: Annotated[
        bool | None,
        typer.Option(
            "--project/--no-project",
            help="Project the noised update onto the ball of the merged one. Default: do.",
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="File of the privacy budget, to which this is charged; started if there is none."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Epsilon of a ledger that is started. Default: that of this merge.")
    ] = None,
    sampling_probability: Annotated[
        float | None, typer.Option(help="With which each client was drawn, secretly; needs --clients.")
    ] = None,
    seed_noise: Annotated[
        int | None, typer.Option(help="Reproducible noise, for studies: NOTHING IS PRIVATE then.")
    ] = None,
    json: _Json = False,
) -> None:
    """Merge adapters into one: exactly, or with noise that hides every client.

    The mean or weighted sum of the updates, as one plain LoRA. With --private differentially private: every
    adapter is measured against its bound, noise is added to the dense update, and the ledger is charged
    before that. What is printed on standard output may be published; what the guard found of each client
    goes to standard error and may not.

    Exit status: 0 if done; 2 for input that cannot be used and for a budget that does not suffice, when
    nothing is spent or written; 1 if writing failed after the budget was spent; 130 if stopped.
    """
    for_private = _given(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency,
        clients=clients,
        reference=reference,
        on_excess=on_excess,
        project=project,
        ledger=ledger,
        budget=budget,
        sampling_probability=sampling_probability,
        seed_noise=seed_noise,
    )
    for_plain = _given(method=method, density=density, seed=seed, relative=relative or None)
    common = {
        "bound": bound,
        "norm": _norm(norm),
        "base": base,
        "layout": cast(Any, layout),
        "component": component,
    }
    with _one_line_errors():
        numbers = None if weights is None else [_real("--weights", part) for part in weights.split(",")]
        if not private:
            _refuse_with("--private", for_private, needs=True)
            with _layers_bar("Merging") as advance:
                report = nblora.merge_adapters(
                    adapters,
                    out,
                    weights=numbers,
                    rank=_rank(rank),
                    method=cast(Any, method or "exact"),
                    density=density,
                    seed=seed or 0,
                    bound_kind="relative" if relative else "absolute",
                    dtype=dtype or "float32",
                    advance=advance,
                    **common,
                )
        else:
            _needs("A private merge", "dp_accounting", extra="privacy")
            if method == "exact":
                for_plain.pop("method")
            _refuse_with("--private", for_plain, needs=False)
            _merge_privately(adapters, out, numbers, _rank(rank), dtype, for_private, common, json)
            return
    if json:
        typer.echo(report.to_json())
        return
    _print_rows(report.rows(), f"Merged into {out}")
    typer.echo(f"{report.summary} Wrote a plain LoRA to {out}.")


def _merge_privately(
    adapters: Sequence[str],
    out: Path,
    weights: list[float] | None,
    rank: int | float | None,
    dtype: str | None,
    given: dict[str, Any],
    common: dict[str, Any],
    json: bool,
) -> None:
    """Call the function, print what may be published, and on standard error what may not."""
    from nblora.privacy import BudgetExceeded, ReleaseLost

    if missing := [name for name in ("epsilon", "delta", "adjacency") if name not in given]:
        raise ValueError(f"--private needs --{' and --'.join(missing)}: nothing stands for them by default")
    options = {name: value for name, value in given.items() if name not in ("clients", "seed_noise")}
    try:
        with _one_line_warnings(), _layers_bar("Merging") as advance:
            report = nblora.merge_privately(
                adapters,
                out,
                n_total=given.get("clients"),
                weights=weights,
                rank=cast(Any, rank),
                dtype=dtype,
                rng=given.get("seed_noise"),
                advance=advance,
                **options,
                **common,
            )
    except BudgetExceeded as error:
        _fail(str(error))
    except ReleaseLost as error:
        _fail(" ".join(str(error).split()), BROKEN)
    except KeyboardInterrupt:
        _fail("stopped; nothing is written, and what the ledger counts as spent stays spent", STOPPED)
    _print_rows(report.client_rows(), "PRIVATE, do not publish: what the guard found", error=True)
    typer.echo(f"PRIVATE, do not publish: {report.client_summary}.", err=True)
    if json:
        typer.echo(report.to_json())
        return
    _print_rows(report.rows(), f"Merged privately into {out}")
    if report.started:
        typer.echo(
            f"Started the ledger {report.ledger} with the budget epsilon {report.budget:g} at delta "
            f"{report.delta:g} under {report.adjacency}."
        )
    typer.echo(f"{report.summary} Wrote {out}.")


def _refuse_with(flag: str, given: Mapping[str, Any], *, needs: bool) -> None:
    """Refuse options that need a flag which is not there, or that do not go with it."""
    for name in given:
        option = f"--{name.replace('_', '-')}"
        raise ValueError(f"{option} needs {flag}" if needs else f"{option} must not be given with {flag}")


def _rank(text: str | None) -> int | float | None:
    """An integer is a rank, a number with a point a share."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return _real("--rank", text)


def _real(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{option} must be of numbers, got {text!r}") from error


@app.command()
def privacy(
    epsilon: Annotated[
        str | None, typer.Option(help="Of all rounds together; several with commas.", show_default=False)
    ] = None,
    delta: Annotated[float | None, typer.Option(help="As 1e-5.", show_default=False)] = None,
    clients: Annotated[
        str | None, typer.Option(help="How many; several with commas.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Releases that share the budget.")] = 1,
    adjacency: Annotated[
        str | None,
        typer.Option(
            help="add-remove (a client more or less) or replace-one (another client).", show_default=False
        ),
    ] = None,
    bound: Annotated[
        float | None, typer.Option(help="Absolute, on the norm of every client's update.")
    ] = None,
    norm: _Norm = "frobenius",
    rank: Annotated[
        int | None,
        typer.Option(help="Of clients' updates of this --shape, and to which the merged one is truncated."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="MxN, of a layer; may be repeated.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A public adapter, in place of --shape: layers, ranks and, without --bound, bounds."
        ),
    ] = None,
    component: Annotated[str | None, typer.Option(help="Which component of a pipeline it is of.")] = None,
    sampling_probability: Annotated[
        float, typer.Option(help="With which each client is drawn in each round, secretly.")
    ] = 1.0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw signal-to-noise against clients to this PNG, PDF or SVG file."),
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="Show what of this budget is spent and left.")] = None,
    json: _Json = False,
) -> None:
    """What private merging would cost: noise, sensitivity and signal-to-noise. Spends nothing.

    nblora privacy --epsilon 1,4,8 --delta 1e-5 --clients 100,500 --adjacency add-remove --shape 512x512
    --bound 0.3 --rank 8

    Exit status: 0 if done, 2 for input that cannot be used.
    """
    with _one_line_errors():
        _needs("Planning", "dp_accounting", extra="privacy")
        if plot is not None:
            _needs("A plot", "matplotlib", extra="plots")
        plan_options = _given(
            epsilon=epsilon, delta=delta, clients=clients, adjacency=adjacency, shape=shape or reference
        )
        needed = ("epsilon", "delta", "clients", "adjacency", "shape")
        missing = [name for name in needed if name not in plan_options]
        if missing and (ledger is None or plan_options or plot is not None):
            names = " and --".join(missing).replace("shape", "shape or --reference")
            raise ValueError(f"a plan needs --{names}")
        plans: list[Plan] = []
        if not missing:
            bounds, shapes = _expected(shape, reference, bound, norm, rank, component)
            from nblora.privacy import plan_release

            plans = [
                plan_release(
                    bounds=bounds,
                    shapes=shapes,
                    adjacency=cast(Any, adjacency),
                    epsilon=_real("--epsilon", each),
                    delta=cast(float, delta),
                    clients=_integer("--clients", count),
                    rounds=rounds,
                    sampling_probability=sampling_probability,
                    rank=rank,
                )
                for each in str(epsilon).split(",")
                for count in str(clients).split(",")
            ]
        if plot is not None:
            from nblora.merging.figures import plot_plans

            plot_plans(plans, plot)
        account = None
        if ledger is not None:
            from nblora.privacy import account_of

            account = account_of(ledger)
    if json:
        from nblora.checkpoints.tables import json_text

        whole = {"plans": [plan.content() for plan in plans], "ledger": account and asdict(account)}
        typer.echo(json_text(whole))
        return
    if plans:
        _print_plans(plans)
    if plot is not None:
        typer.echo(f"Drew {plot}.")
    if account is not None:
        typer.echo(f"{ledger}: {account.summary}")


def _expected(
    shapes: list[str] | None,
    reference: str | None,
    bound: float | None,
    norm: str,
    rank: int | None,
    component: str | None,
) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """What clients' Frobenius norms are at most, and the shapes of layers."""
    if reference is not None:
        if shapes:
            raise ValueError(f"--shape must not be given with --reference, got --shape {shapes[0]}")
        from nblora.merging import public_layers

        public = public_layers(reference, bound=bound, norm=_norm(norm), component=component)
        return public.frobenius, public.shapes
    if bound is None:
        raise ValueError("--shape needs --bound")
    from nblora.bounds import parse_norm
    from nblora.privacy import frobenius_bound

    bounds, sizes = {}, {}
    for number, text in enumerate(shapes or (), start=1):
        sides = text.lower().replace("×", "x").split("x")
        if len(sides) != 2:
            raise ValueError(f"--shape must be MxN, got {text!r}")
        m, n = (_integer("--shape", side) for side in sides)
        sizes[f"{number}"] = (m, n)
        most = min(m, n) if rank is None else min(rank, m, n)
        bounds[f"{number}"] = frobenius_bound(parse_norm(_norm(norm)), bound, most)
    return bounds, sizes


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{option} must be of integers, got {text!r}") from error


def _print_plans(plans: Sequence[Plan]) -> None:
    from nblora.privacy import SNR_IN_WORDS
    from nblora.privacy.planning import layer_rows, plan_rows

    first = plans[0]
    sampled = first.sampling_probability < 1
    _print_rows(
        plan_rows(plans),
        f"Private mean under {first.adjacency}, delta {first.delta:g}, of {len(first.layers)} layers"
        + (f", each client drawn with probability {first.sampling_probability:g}" if sampled else ""),
    )
    if len(plans) == 1 and len(first.layers) > 1:
        _print_rows(layer_rows(first), "Layer by layer")
    typer.echo(SNR_IN_WORDS)
    if sampled:
        typer.echo("The denominator is the expected number of clients that are drawn.")


@app.command()
def complete(
    source: Annotated[
        Path,
        typer.Argument(
            help="A table with missing entries: .csv, .tsv, .parquet, .npy, .npz or a picture.",
            metavar="INPUT",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; its ending says the format.")],
    layout: Annotated[
        str, typer.Option(help="wide (blanks for what is missing), long (row id, column id, value) or auto.")
    ] = "auto",
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="Whether the first line names columns. Default: look."),
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="Column of a wide table with row ids; may be repeated. Default: look."),
    ] = None,
    no_index: Annotated[bool, typer.Option("--no-index", help="A wide table has no row ids.")] = False,
    row: Annotated[str | None, typer.Option(help="Column of a long table with row ids.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of a long table with column ids.")] = None,
    value: Annotated[str | None, typer.Option(help="Column of a long table with values.")] = None,
    missing: Annotated[
        list[str] | None,
        typer.Option(
            help="What else stands for a missing entry; of a picture a colour (0, 255,0,255 or #ff00ff), "
            "beside transparent pixels. May be repeated."
        ),
    ] = None,
    predict: Annotated[
        Path | None,
        typer.Option(help="File with pairs of row id and column id; only they are predicted, one a line."),
    ] = None,
    out_layout: Annotated[str | None, typer.Option(help="wide or long. Default: that of INPUT.")] = None,
    replace_observed: Annotated[
        bool, typer.Option("--replace-observed", help="Write predictions in place of observed entries too.")
    ] = False,
    duplicates: Annotated[
        str, typer.Option(help="error, or mean of the values that one pair of a row and a column is given.")
    ] = "error",
    rank: Annotated[int | None, typer.Option(help="Largest rank. Default: 20.")] = None,
    bound: Annotated[
        str | None,
        typer.Option(
            help="On the norm, in units of the values, or auto: by held-out entries. Default: auto."
        ),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(help="nuclear, frobenius, spectral, ky-fan-q or a number p >= 1. Default: nuclear."),
    ] = None,
    parametrization: Annotated[str | None, typer.Option(help="joint or svd. Default: joint.")] = None,
    rank_selection: Annotated[
        str | None, typer.Option(help="two-stage: also try a smaller rank; none. Default: two-stage.")
    ] = None,
    bias: Annotated[
        str | None, typer.Option(help="joint: learn row and column biases too; none. Default: joint.")
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(help="popularity, for ratings: bound the matrix weighted by it; none. Default: none."),
    ] = None,
    max_iter: Annotated[int | None, typer.Option(help="Most iterations of a fit. Default: 200.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64. Default: float32.")] = None,
    seed: Annotated[int, typer.Option(help="Of the entries that are held out.")] = 0,
    test_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the entries that is held out from a fit of its own with the same options, for an "
            "error that no choice has seen. 0: no such fit, half the time."
        ),
    ] = 0.1,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw to this PNG, PDF or SVG file: before and after of a picture or a matrix without ids, "
            "else the spectrum."
        ),
    ] = None,
    json: _Json = False,
) -> None:
    """Fill in the missing entries of a table or a picture by a matrix of low rank and bounded norm.

    Rank and bound are chosen on held-out entries. Prints them, and the root mean squared error on other
    entries, which the fit for it has not seen, beside that of the column means. Observed entries stay as
    they are. A wide table comes back wide; a long one with blank values comes back with the blanks filled,
    and one without becomes the list of all entries that are missing.

    Exit status: 0 if done, 2 for input that cannot be used, 130 if stopped; nothing is written then.
    """
    with _one_line_errors():
        _needs("Completion", "sklearn", "scipy", "pandas", "pyarrow", "PIL", extra="completion")
        if plot is not None:
            _needs("A plot", "matplotlib", extra="completion")
        if index and no_index:
            raise ValueError(f"--no-index must not be given with --index, got --index {index[0]}")
        from nblora.completion.job import complete_file

        options = _given(
            rank=rank,
            bound=None if bound is None else _norm(bound),
            norm=None if norm is None else _norm(norm),
            parametrization=parametrization,
            max_iter=max_iter,
            device=device,
            dtype=dtype,
        )
        for name, text in (("rank_selection", rank_selection), ("bias", bias), ("weighting", weighting)):
            if text is not None:
                options[name] = None if text == "none" else text
        with _one_line_warnings(), _stage_bar() as on_progress:
            try:
                report = complete_file(
                    source,
                    out,
                    layout=layout,
                    header=header,
                    index=() if no_index else index,
                    row=row,
                    column=column,
                    value=value,
                    missing=missing or (),
                    predict=predict,
                    out_layout=out_layout,
                    replace_observed=replace_observed,
                    duplicates=duplicates,
                    test_fraction=test_fraction,
                    plot=plot,
                    seed=seed,
                    on_progress=on_progress,
                    **options,
                )
            except KeyboardInterrupt:
                _fail("stopped; nothing is written", STOPPED)
    if json:
        typer.echo(report.to_json())
        return
    if report.held_out:
        _print_rows(report.rows(), f"Error on {report.held_out:,} entries held out")
    drawn = "" if plot is None else f" and {plot}"
    typer.echo(f"{report.summary} Wrote {out}{drawn}: {report.predicted:,} entries are predicted.")


@contextmanager
def _stage_bar() -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error with the stage of a fit, whose end is not known; what is yielded moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} iterations"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Reading", total=None)
        yield lambda stage, iterations: progress.update(bar, description=stage, completed=iterations)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings about a fit in one line on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **others: typer.echo(
            f"nblora: {' '.join(str(message).split())}", err=True
        )
        yield


@contextmanager
def _layers_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over layers on standard error; what is yielded moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _print_report(report: CutReport, json: bool, title: str, done: str) -> None:
    if json:
        typer.echo(report.to_json())
        return
    _print_rows(report.rows(), title)
    typer.echo(f"{report.summary} {done}")


def _print_rows(
    rows: Sequence[tuple[str, ...]],
    title: str,
    styles: Sequence[str | None] | None = None,
    *,
    error: bool = False,
) -> None:
    """A table; aligned plain text where the output is a file or a pipe.

    Args:
        styles: of the rows below the heading.
        error: whether to print on standard error.
    """
    console = Console(stderr=error)
    if not console.is_terminal:
        from nblora.checkpoints.tables import text_table

        typer.echo(f"{title}\n\n{text_table(rows)}\n", err=error)
        return
    heading, *others = rows
    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in heading:
        folds = name in ("layer", "why", "adapter")
        table.add_column(name, overflow="fold", no_wrap=not folds, min_width=16 if folds else None)
    for row, style in zip(others, styles or [None] * len(others), strict=True):
        table.add_row(*map(escape, row), style=style)
    console.print(table)


def _print_summary(certificate: Certificate) -> None:
    style = "green" if certificate.holds else "bold red"
    Console().print(certificate.summary, style=style, markup=False, soft_wrap=True)


def _joined(**reports: Any) -> str:
    """Several reports as one JSON object."""
    from nblora.checkpoints.tables import json_text

    return json_text({name: loads(report.to_json()) for name, report in reports.items()})


def _norm(text: str) -> str | float:
    """A norm as a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("nblora-demo"),
    seed: Annotated[int, typer.Option(help="Of the data split and all training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of every adaptation.")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="Of both methods.")] = 8,
    bound: Annotated[
        float, typer.Option(help="On the Frobenius norm of every update, times the weight's spectral norm.")
    ] = 0.566,
) -> None:
    """Adapt a small vision transformer to rotated digits with LoRA and NB-LoRA: two minutes on two cores.

    Prints a table and writes the adapter, its certificate, a plain-LoRA export and a figure.
    """
    with _one_line_errors():
        _needs("The demo", "sklearn", "matplotlib", extra="demo")
    from nblora.demo import Recipe, run_demo, training_steps

    _quiet_libraries()
    recipe = Recipe(seed=seed, epochs=epochs, rank=rank, bound=bound)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with _one_line_errors(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Training", total=training_steps(recipe))
        result = run_demo(out, recipe, advance=lambda: progress.advance(task))
    table = Table(
        "learning rate",
        "method",
        "target accuracy",
        "source accuracy kept",
        "largest ‖ΔW‖_F/‖W0‖₂",
        "bound",
        title="Digits rotated by 90° (target) after upright digits (source)",
        caption=f"before: target {result.target_before:.1%}, source {result.source_before:.1%}; "
        "* chosen on target validation",
    )
    for run in result.runs:
        table.add_row(
            f"{run.learning_rate:g}{' *' if run is result.chosen(run.method) else ''}",
            run.method,
            f"{run.target:.1%}",
            f"{run.source:.1%}",
            f"{run.update:.3f}",
            "none" if run.bound is None else f"{run.bound:g}",
        )
    console.print(table)
    console.print(
        f"Wrote to {out}: adapter/, its certificate.json, lora/ (a plain LoRA for PEFT), tradeoff.png, "
        "results.json",
        highlight=False,
        markup=False,
    )


_JOB_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
_Model = Annotated[str | None, typer.Option(help="Base model: a folder or a hub repository.")]
_Task = Annotated[
    # named, since typer 0.27 takes a metavar of the same letters for the name
    str | None,
    typer.Option("--task", help="causal-lm, seq-cls, token-cls, seq2seq or image-cls.", metavar="TASK"),
]
_Data = Annotated[
    str | None,
    typer.Option(
        help="What to learn: a CSV, JSONL, Parquet or text file, a folder of them or of images, or a data "
        "set of the hub."
    ),
]
_Keep = Annotated[
    str | None, typer.Option(help="Data that stands for what the model must not forget; only evaluated.")
]
_Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="ROLE=NAME: which column of the data is text, label, image, ..."),
]
_KeepColumn = Annotated[list[str] | None, typer.Option("--keep-column", help="The same, of the kept data.")]
_Config = Annotated[
    Path | None, typer.Option(help="YAML file with any of these settings; options given here win.")
]
_MaxLength = Annotated[int | None, typer.Option(help="Tokens of a sample.")]
_MaxTrain = Annotated[int | None, typer.Option(help="Train on only so many samples.")]
_MaxEval = Annotated[int | None, typer.Option(help="Evaluate on only so many samples of each set.")]


@app.command(context_settings=_JOB_OPTIONS)
def finetune(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    model: _Model = None,
    task: _Task = None,
    data: _Data = None,
    keep: _Keep = None,
    norm: Annotated[
        str | None, typer.Option(help="spectral, frobenius, nuclear, ky-fan-q or a number p >= 1.")
    ] = None,
    bound: Annotated[
        float | None, typer.Option(help="On every update's norm, times the weight's spectral norm.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the updates.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="random, or gradient: along the gradient of some training samples."),
    ] = None,
    config: _Config = None,
    column: _Column = None,
    keep_column: _KeepColumn = None,
    max_length: _MaxLength = None,
    max_train_samples: _MaxTrain = None,
    max_eval_samples: _MaxEval = None,
    seed: Annotated[int | None, typer.Option(help="Of the data split, the start and the training.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT; start it if there is none.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
) -> None:
    """Fine-tune a model with bounded updates, and see what it learned and what it kept.

    Further options: --train.NAME VALUE for every field of transformers' TrainingArguments
    (--train.learning_rate 1e-3 --train.num_train_epochs 5), --adapter.NAME VALUE for every field of
    NBLoraConfig (--adapter.parametrization svd), --load.NAME VALUE for from_pretrained (--load.dtype
    bfloat16).

    Writes the adapter, a plain-LoRA export, certificate.json, metrics.json, config.yaml, which reproduces
    the run, and report.html. Ctrl-C leaves a checkpoint. Runs under torchrun and accelerate launch:
    torchrun --nproc_per_node 2 -m nblora finetune ...

    Exit status: 0 if done, 2 for input that cannot be used, 130 if stopped.
    """
    first = os.environ.get("RANK", "0") == "0"
    with _one_line_errors(first):
        _needs("Fine-tuning", "transformers", "accelerate", "datasets", "yaml", extra="train")
        settings = _settings(
            context,
            config,
            model=model,
            task=task,
            data=data,
            keep=keep,
            adapter=_given(norm=_number(norm), bound=bound, r=r),
            columns=_roles("--column", column),
            keep_columns=_roles("--keep-column", keep_column),
            max_length=max_length,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            start=start,
            seed=seed,
        )
        from nblora.training import Interrupted, finetune

        _quiet_libraries()
        columns = (
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=Console(), transient=True, disable=not first)
        with _own_warnings_in_one_line(), bars as progress:
            bar = progress.add_task("Training", total=1)
            try:
                result = finetune(
                    settings,
                    out,
                    resume=resume,
                    report=report,
                    advance=lambda step, last: progress.update(bar, completed=step, total=last),
                )
            except Interrupted as stopped:
                _fail(str(stopped), STOPPED, first)
    if first:
        console = Console()
        console.print(_scores_table(result.metrics))
        _print_summary(result.certificate)
        report_too = " report.html shows it all." if report else ""
        console.print(
            f"Wrote to {out}: adapter/, lora/ (a plain LoRA), certificate.json, metrics.json, config.yaml."
            f"{report_too}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _scores_table(metrics: Mapping[str, Any]) -> Table:
    """Before and after, on the target and the kept data."""
    table = Table("", "before", "after", box=SIMPLE_HEAD)
    for name, title in (("target", "learned: target"), ("keep", "kept: other data")):
        before, after = metrics["before"][name], metrics["after"][name]
        if before is None or after is None:
            continue
        if metrics["metric"] == "accuracy":
            table.add_row(f"{title}, accuracy", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}")
        else:
            shown = ("" if m.get("nats") is None else f"{m['nats']:.4f}" for m in (before, after))
            table.add_row(f"{title}, nats per token (less is better)", *shown)
    return table


@app.command(context_settings=_JOB_OPTIONS)
def compare(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to complete.")],
    model: _Model = None,
    task: _Task = None,
    data: _Data = None,
    keep: _Keep = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="nblora, lora, rslora, dora, pissa, lora+, delora, oft, hra, full; NB-LoRA's variants as "
            "nblora-gradient, nblora-svd, nblora-radial, nblora-spectral, nblora-svd-nuclear, ...; with "
            "commas. Default: nblora,lora.",
        ),
    ] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="With commas. Default: 1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(help="With commas. Default: 8.")] = None,
    epochs: Annotated[str | None, typer.Option(help="With commas. Default: 3.")] = None,
    bounds: Annotated[str | None, typer.Option(help="Of NB-LoRA, with commas. Default: 0.3.")] = None,
    seeds: Annotated[str | None, typer.Option(help="With commas. Default: 0.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="full: every combination. star: ranks at the middle epochs, epochs at the middle rank. "
            "Default: full."
        ),
    ] = None,
    config: _Config = None,
    column: _Column = None,
    keep_column: _KeepColumn = None,
    max_length: _MaxLength = None,
    max_train_samples: _MaxTrain = None,
    max_eval_samples: _MaxEval = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at once. Default: a run on each GPU, or on two cores.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Cores of each run.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Do the runs on the Ray cluster at this address.", metavar="ADDRESS")
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each run on Ray.")] = 0.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed runs again.")] = False,
    report: Annotated[bool, typer.Option(help="Write figures and report.html.")] = True,
) -> None:
    """Which method, which learning rate, which bound, and what did the model forget? On your own task.

    Runs every combination and writes a table, figures and report.html. Stopped, or called again with more
    methods, rates or seeds, it does only the runs that are missing. Further options: --train.NAME VALUE and
    --load.NAME VALUE as for `nblora finetune`. A file for --config may also say `methods` as a mapping from
    names of your own to options: {my-lora: {method: lora, lora_alpha: 16}}.

    Exit status: 0 if done, 2 for input that cannot be used, 130 if stopped.
    """
    with _one_line_errors():
        _needs("A comparison", "transformers", "accelerate", "datasets", "yaml", extra="train")
        settings = _settings(
            context,
            config,
            model=model,
            task=task,
            data=data,
            keep=keep,
            methods=None if methods is None else [name.strip() for name in methods.split(",")],
            learning_rates=_numbers(learning_rates),
            ranks=_numbers(ranks),
            epochs=_numbers(epochs),
            bounds=_numbers(bounds),
            seeds=_numbers(seeds),
            grid=grid,
            columns=_roles("--column", column),
            keep_columns=_roles("--keep-column", keep_column),
            max_length=max_length,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
        )
        from nblora.comparison import compare
        from nblora.executors import LocalExecutor, RayExecutor

        _quiet_libraries()
        executor = RayExecutor(ray, threads or 1, gpus) if ray else LocalExecutor(workers, threads)
        console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("Measuring the base model", total=1.0)
            count = 0

            def show(record: Mapping[str, Any] | None, share: float) -> None:
                nonlocal count
                count += record is not None
                progress.update(bar, completed=share, description=f"{count} runs done")
                if record is not None and record["status"] != "done":
                    progress.console.print(
                        f"{record['method']} at {record['learning_rate']:g}: {record['status']} "
                        f"{record['error'] or ''}",
                        style="yellow",
                        markup=False,
                    )

            try:
                comparison = compare(
                    settings,
                    out,
                    executor=executor,
                    retry_failed=retry_failed,
                    report=report,
                    on_run=show,
                )
            except KeyboardInterrupt:
                _fail(
                    f"stopped after {count} runs, which are kept in {out}; the same command continues",
                    STOPPED,
                )
        from nblora.reporting import comparison_rows

        heading, rows = comparison_rows(comparison, brief=True)
        table = Table(*heading, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(
        f"Wrote to {out}: comparison.json, comparison.csv, runs.csv"
        + (", figures/ and report.html" if report else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command(context_settings=_JOB_OPTIONS)
def suggest(
    context: typer.Context,
    model: _Model = None,
    task: _Task = None,
    data: _Data = None,
    keep: _Keep = None,
    norm: Annotated[
        str | None, typer.Option(help="spectral, frobenius, nuclear, ky-fan-q or a number p >= 1.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the updates.")] = None,
    config: _Config = None,
    column: _Column = None,
    keep_column: _KeepColumn = None,
    max_length: _MaxLength = None,
    max_train_samples: _MaxTrain = None,
    max_eval_samples: _MaxEval = None,
    seed: Annotated[int | None, typer.Option(help="Of the data split, the start and the training.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each short training.")] = 60,
) -> None:
    """Propose a learning rate and a bound for `nblora finetune`, from a short probe.

    Trains a few steps at each of several learning rates, then at several bounds. With --keep the bound
    balances what is learned and what is kept; without it, it is the smallest that hardly limits
    learning. Further options: --train.NAME VALUE, --adapter.NAME VALUE and --load.NAME VALUE as for
    `nblora finetune`. Writes nothing.
    """
    with _one_line_errors():
        _needs("A probe", "transformers", "accelerate", "datasets", "yaml", extra="train")
        settings = _settings(
            context,
            config,
            model=model,
            task=task,
            data=data,
            keep=keep,
            adapter=_given(norm=_number(norm), r=r),
            columns=_roles("--column", column),
            keep_columns=_roles("--keep-column", keep_column),
            max_length=max_length,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            seed=seed,
        )
        from nblora.suggestion import suggest

        _quiet_libraries()
        console = Console()
        columns = TextColumn("Probing"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("Probing", total=1)
            found = suggest(
                settings,
                steps=steps,
                advance=lambda step, last: progress.update(bar, completed=step, total=last),
            )
    title = "accuracy" if found.metric == "accuracy" else "nats per token (less is better)"
    table = Table("learning rate", "bound", f"target {title}", f"kept {title}", box=SIMPLE_HEAD)
    for probe in (found.before, *found.rates, *found.bounds):
        scores = (
            "" if score is None else _shown(score, found.metric) for score in (probe.target, probe.kept)
        )
        before = probe is found.before
        table.add_row(
            "before" if before else f"{probe.learning_rate:g}", "" if before else f"{probe.bound:g}", *scores
        )
    console.print(table)
    console.print(
        f"Suggested after {found.steps} steps each: --bound {found.bound:g} "
        f"--train.learning_rate {found.learning_rate:g}",
        highlight=False,
        soft_wrap=True,
    )


def _shown(score: float, metric: str) -> str:
    return f"{score:.1%}" if metric == "accuracy" else f"{-score:.4f}"


def _settings(context: typer.Context, config: Path | None, **options: Any) -> dict[str, Any]:
    """The settings of a job: a YAML file's, and on top of them the options that the user gave."""
    from nblora.settings import dotted_options, overlay, read_yaml

    groups = ("train", "load", *(["adapter"] if "adapter" in options else []))
    dotted = dotted_options(context.args, groups)
    for name, values in dotted.items():
        options[name] = {**values, **options.get(name, {})}
    return overlay({} if config is None else read_yaml(config), _given(**options))


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _number(text: str | None) -> str | float | None:
    """A norm as a number where it is one."""
    from nblora.settings import parse_yaml

    return text if text is None else parse_yaml(text)


def _numbers(text: str | None) -> list[Any] | None:
    from nblora.settings import parse_yaml

    return None if text is None else [parse_yaml(part) for part in text.split(",")]


def _roles(option: str, given: list[str] | None) -> dict[str, str] | None:
    for text in given or ():
        if not text.partition("=")[2]:
            raise ValueError(f"{option} must be ROLE=NAME, got {text!r}")
    return {role: name for role, _, name in (text.partition("=") for text in given or ())} or None


def _needs(what: str, *modules: str, extra: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}: pip install 'nblora[{extra}]'")


def _quiet_libraries() -> None:
    """No messages of libraries between ours."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PEFT 0.21 asks transformers 5 for a property by its old name
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
    # transformers' default, where there is no GPU
    warnings.filterwarnings("ignore", message=".pin_memory. argument is set", category=UserWarning)


@contextmanager
def _own_warnings_in_one_line() -> Iterator[None]:
    from nblora.callbacks import BoundUseWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def briefly(message: Warning | str, category: type[Warning], *place: Any, **others: Any) -> None:
            if issubclass(category, BoundUseWarning):
                typer.echo(f"nblora: {message}", err=True)
            else:
                show(message, category, *place, **others)

        warnings.showwarning = briefly
        yield


@contextmanager
def _crashes_apart() -> Iterator[None]:
    """The traceback of an error of our own, and exit status 2: Python's 1 would mean a broken bound."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(UNREADABLE) from None


@contextmanager
def _one_line_errors(first: bool = True) -> Iterator[None]:
    """Turn errors about the user's input into one line on standard error and exit status 2.

    Args:
        first: whether this is the first of the processes of a job, which speaks for all. What the system
            refuses may concern one process only, which says so.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        _fail(" ".join(str(error).split()), first=first or isinstance(error, OSError))


def _fail(message: str, status: int = UNREADABLE, first: bool = True) -> NoReturn:
    if first:
        typer.echo(f"nblora: {message}", err=True)
    raise typer.Exit(status)
