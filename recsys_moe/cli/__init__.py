"""The command line. The one folder that may open every room; it imports them when a command runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from recsys_moe.cli import llm_serve, llm_train
from recsys_moe.cli.data import data_app
from recsys_moe.cli.llm import llm_app
from recsys_moe.cli.models import models_app
from recsys_moe.cli.serving import serving_app
from recsys_moe.cli.settings import Json, Overrides, compose
from recsys_moe.cli.training import training_app
from recsys_moe.errors import UserError
from recsys_moe.process import interrupt_once

# Before Ray, MLflow or torch are imported anywhere below.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# OpenMP threads that spin at a barrier starve each other once another process wants a core; not spinning at all costs a run
# that is alone 30 % (docs/decisions.md has the figures).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="""Examples:

    recsys-moe train data=census_full model=mmoe train.seed=1

    recsys-moe evaluate models:/census_full@candidate

    recsys-moe serve models:/census_full@candidate

    recsys-moe data synth runs/feed_synth --rows 1000000""",
)
runs_app = typer.Typer(no_args_is_help=True, help="What training runs left behind.", epilog="Example: `recsys-moe runs sync`")
bench_app = typer.Typer(
    no_args_is_help=True,
    help="Time the project's parts beside what people would use instead.",
    epilog="Example: `recsys-moe bench kernels layer loop --json`",
)
for part in (training_app, models_app, serving_app):
    app.add_typer(part)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(bench_app, name="bench")
app.add_typer(llm_app, name="llm")
llm_app.command(epilog=llm_serve.EXAMPLES)(llm_serve.serve)
llm_app.command(epilog=llm_train.EXAMPLES)(llm_train.train)


@app.callback()
def root() -> None:
    """Multi-task recommendation with mixtures of experts: train, compare and serve on one road."""


@runs_app.command(epilog="Example: `recsys-moe runs sync`")
def sync(
    run: Annotated[str | None, typer.Argument(help="One run: its folder, its name or MLflow's run id [default: all].")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Tell MLflow what it missed while it was away: metrics, bundles, how runs ended."""
    from recsys_moe.console import print_json, stdout
    from recsys_moe.pipelines.drive import sync as tell

    if run is not None and "=" in run:
        overrides, run = [run, *(overrides or [])], None
    config = compose(overrides, needs_data=False)
    told = tell(Path(config["runs_dir"]).absolute(), run)
    if json:
        print_json({"runs": told})
        return
    for row in told:
        stdout.print(f"{row['run']}: {row['status']}, run {row['run_id']}, {row['version'] or 'no bundle'}", soft_wrap=True)
    if not told:
        stdout.print("MLflow knows every run whole")


@bench_app.command("kernels", epilog="Example: `recsys-moe bench kernels layer loop --json`")
def bench_kernels(
    cases: Annotated[list[str] | None, typer.Argument(help="layer, loop, home, scaling, price; all if none is named.")] = None,
    peers: Annotated[Path | None, typer.Option(help="The folder of the peers' scripts [default: $RECSYS_MOE_PEERS].")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw cost against tokens and experts into this PNG.")] = None,
    json: Json = False,
) -> None:
    """Time the expert kernels beside transformers' layer and module lists, in the same minutes, against measured ceilings."""
    from recsys_moe.bench import CASES, as_dicts, plot_scaling
    from recsys_moe.bench import bench as measure
    from recsys_moe.console import print_json, stderr, stdout

    rows = []
    for row in measure(tuple(cases or CASES), peers):
        rows.append(row)
        beside = "" if row.ratio is None else f"   {row.peer} {row.peer_ms:.3f}   {row.ratio:.2f}×"
        shares = "" if row.of_read is None else f"   {row.of_read:.2f} of read   {row.of_matrix:.2f} of matrix"
        (stderr if json else stdout).print(
            f"{row.case:46s} {row.backend:14s} {row.ms:9.3f}{beside}{shares}", soft_wrap=True, highlight=False
        )
    if figure:
        plot_scaling(rows, figure)
    if json:
        print_json({"rows": as_dicts(rows)})


@app.command(epilog="Example: `recsys-moe demo --rows 200000`")
def demo(
    rows: Annotated[int, typer.Option(min=10_000, help="Synthetic log rows.")] = 200_000,
    folder: Annotated[Path, typer.Option(help="Everything the demo makes goes here.")] = Path("runs/demo"),
    json: Json = False,
) -> None:
    """From nothing to a served score: synthesise, prepare, train two models, compare, register, serve, draw."""
    from recsys_moe.console import print_json
    from recsys_moe.demo import run_demo

    summary = run_demo(folder, rows)
    if json:
        print_json(summary)


def main() -> None:
    """Entry point: a mistake is one sentence on standard error and exit code 2, an interrupt one word and 130."""
    interrupt_once()
    message = ""
    try:
        # Typer ends an interrupted command with 130, and `--help` with 0.
        code = app(standalone_mode=False) or 0
        if code == 130:
            print(message := "interrupted", file=sys.stderr)
    except UserError as error:
        code, message = 2, str(error)
        print(f"error: {message}", file=sys.stderr)
    except typer.TyperException as error:  # an option or an argument is wrong; without any, the help has been shown
        code, message = error.exit_code, error.format_message()
        context = getattr(error, "ctx", None)
        if message:
            message = message.rstrip(".") + (f"; see {context.command_path} --help" if context else "")
            print(f"error: {message}", file=sys.stderr)
    if code and "--json" in sys.argv:
        import json

        print(json.dumps({"error": message}), flush=True)
    sys.exit(code)
