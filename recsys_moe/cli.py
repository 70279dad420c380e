"""The command line. The one module that may open every room; it imports them when a command runs."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_moe import cli_llm_serve, cli_llm_train
from recsys_moe.cli_llm import llm_app
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
data_app = typer.Typer(
    no_args_is_help=True,
    help="Describe and prepare log rows, fetch public data sets, or make synthetic rows.",
    epilog="""Examples:

    recsys-moe data describe logs/ --label is_click --output shop.yaml

    recsys-moe data prepare data=custom data.name=shop data.schema=shop.yaml data.source=logs/

    recsys-moe data fetch movielens_1m

    recsys-moe data synth runs/feed_synth --rows 1000000""",
)
app.add_typer(data_app, name="data")
runs_app = typer.Typer(no_args_is_help=True, help="What training runs left behind.", epilog="Example: `recsys-moe runs sync`")
app.add_typer(runs_app, name="runs")
bench_app = typer.Typer(
    no_args_is_help=True,
    help="Time the project's parts beside what people would use instead.",
    epilog="Example: `recsys-moe bench kernels layer loop --json`",
)
app.add_typer(bench_app, name="bench")
app.add_typer(llm_app, name="llm")
llm_app.command(epilog=cli_llm_serve.EXAMPLES)(cli_llm_serve.serve)
llm_app.command(epilog=cli_llm_train.EXAMPLES)(cli_llm_train.train)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on standard output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Configuration overrides: group=NAME or section.key=value.", show_default=False),
]
Model = Annotated[str, typer.Argument(help="A bundle's folder, models:/NAME@alias, models:/NAME/VERSION or runs:/RUN_ID.")]


@app.callback()
def root() -> None:
    """Multi-task recommendation with mixtures of experts: train, compare and serve on one road."""


@app.command(
    epilog="""Examples:

    recsys-moe train data=census_full model=mmoe train.seed=1 train.epochs=4 --json

    recsys-moe train data=custom data.name=shop data.schema=shop.yaml data.source=tuesday/ start=models:/shop@champion"""
)
def train(
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run that was stopped or lost: its folder, its name or MLflow's run id.")
    ] = None,
    json: Json = False,
) -> None:
    """Prepare the data if need be, train a model, track the run in MLflow, leave a bundle.

    `start=models:/NAME@champion` goes on from a registered model (or a bundle's folder) on new rows: its vocabularies grow, old
    ids keep their embeddings, and the best of its own weights and the epochs' is kept.

    With --resume the settings are the run's own; `train.workers`, `train.max_failures`, `train.checkpoint_…` and `ray.…` may
    differ.
    """
    from recsys_moe.config import changes
    from recsys_moe.console import PhaseProgress, number, print_json, print_metrics, progress, qualities, stderr, stdout

    if resume is None:
        job = _job(_compose(overrides))
    else:
        config = _compose(overrides, needs_data=False)
        changed = changes(overrides or [], config)
    from recsys_moe.pipelines.train import resume as resume_job
    from recsys_moe.pipelines.train import train as run_job

    with progress() as display:
        phases = PhaseProgress(display)

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "warning":
                stderr.print(f"warning: {event['message']}", style="yellow", soft_wrap=True)
            elif event["kind"] == "start":
                phases("train", event["step"], event["total_steps"])
            elif event["kind"] == "before":
                mean = number(event["before.mean_quality"])
                stderr.print(f"before: validation {qualities(event['before'])}  mean {mean}", soft_wrap=True)
            elif event["kind"] == "resume":
                stderr.print(f"going on from step {event['step']:,}, in epoch {event['epoch'] + 1}", soft_wrap=True)
            elif event["kind"] in ("step", "epoch"):
                note = f"loss {event['train.loss']:.4f}  {event['train.samples_per_s']:,.0f} samples/s"
                phases("train", event["step"], event["total_steps"], note)
            if event["kind"] == "epoch":
                best = "  *" if event["best"] else ""
                mean = number(event["validation.mean_quality"])
                stderr.print(
                    f"epoch {event['epoch']}: validation {qualities(event['validation'])}  mean {mean}{best}", soft_wrap=True
                )

        if resume is None:
            summary = run_job(job, on_event, phases)
        else:
            job, summary = resume_job(resume, Path(config["runs_dir"]).absolute(), changed, on_event, phases)
    if json:
        print_json(summary)
        return
    print_metrics(f"Test metrics of {job.model.name} on {job.data.name}", summary["test"])
    stdout.print(f"{summary['train']['samples_per_s']:,.0f} samples/s over {summary['train']['epochs']} epochs")
    for name, key in (("bundle", "bundle"), ("registered", "version"), ("run", "run_id")):
        stdout.print(f"{name:10s}  {summary[key]}", soft_wrap=True)
    stdout.print(f"look at it  mlflow ui --backend-store-uri {job.tracking.resolve(Path(job.runs_dir))}", soft_wrap=True)


@app.command(
    epilog="""Examples:

    recsys-moe compare data=census_full models=shared_bottom,mmoe,ple,home seeds=5

    recsys-moe compare data=census_full models=mmoe,home,home+self_gates=false,trees,logistic budget=params baseline=mmoe"""
)
def compare(overrides: Overrides = None, json: Json = False) -> None:
    """Train a grid of models and seeds, and say which is better, by how much and how surely.

    Besides configuration overrides it takes `models=A,B,…` (names of `model=`, `trees`, `logistic`; settings of its own behind
    a `+`), `seeds=N`, `baseline=A`, `budget=params|flops` (networks made equally large), `draws=N` (of the bootstrap) and
    `parallel=N`. With `trials=N` each model is tuned first. The same command again goes on where it was stopped.
    """
    from recsys_moe.comparison import cost_table, table
    from recsys_moe.console import PhaseProgress, print_json, print_table, progress, stderr, stdout
    from recsys_moe.pipelines.compare import CompareConfig, CompareJob, model_of
    from recsys_moe.pipelines.compare import compare as run
    from recsys_moe.typed import dump, parse

    own, rest = _own_keys(overrides, CompareConfig)
    if any(override.startswith(("model=", "model.")) for override in rest):
        raise UserError("compare takes models=A,B,… in place of model=; write a model's own settings as A+key=value")
    if "models" in own:
        own["models"] = re.split(r",(?![^\[]*\])", str(own["models"]))  # not within [64,32]
    grid = parse(CompareConfig, own, "compare")
    config = _compose(rest)
    parts = {key: config[key] for key in ("data", "train", "tracking", "ray", "runs_dir")}
    if config["start"] is not None:
        raise UserError("start is for `train`: models are compared from scratch; leave it out")

    job = parse(
        CompareJob, parts | {"compare": dump(grid), "models": {n: dump(model_of(n)) for n in grid.models}}, "configuration"
    )
    with progress() as display:
        comparison, summary = run(job, lambda message: stderr.print(message, soft_wrap=True), PhaseProgress(display))
    if json:
        print_json(summary)
        return
    print_table(f"Test part of {comparison.data}: {comparison.rows:,} rows", *table(comparison))
    print_table("Cost", *cost_table(comparison))
    stdout.print(f"page  {summary['folder']}/result.html", soft_wrap=True)
    stdout.print(f"run   {summary['run_id']}", soft_wrap=True)


@app.command(
    epilog="""Examples:

    recsys-moe tune data=census_full model=home trials=30

    recsys-moe tune data=feed_synth model=home+self_gates=false seconds=3600 'search.model.experts_per_group=[1,2,4]'"""
)
def tune(overrides: Overrides = None, json: Json = False) -> None:
    """Search a model's settings on the validation part: Optuna's TPE, and ASHA, which stops early what falls behind.

    Besides configuration overrides it takes `model=A` (as `compare` names models), `trials=N`, `seconds=S`, `parallel=N` and
    `search.KEY=…`: a list of choices, a range `{low: 1, high: 9, log: true}`, or `null` to leave a key out; `conf/search` has
    the others. The same command again goes on with the trials that are missing.
    """
    import shlex
    from json import dumps as json_text

    from recsys_moe.config import options, plain_value
    from recsys_moe.console import PhaseProgress, print_json, progress, stdout
    from recsys_moe.pipelines.compare import model_of
    from recsys_moe.pipelines.tune import TuneConfig, TuneJob, default_space, parse_space
    from recsys_moe.pipelines.tune import tune as run
    from recsys_moe.typed import dump, parse

    own, rest = _own_keys(overrides, TuneConfig)
    label = next((o.removeprefix("model=") for o in rest if o.startswith("model=")), "mmoe")
    model = model_of(label)
    searched = {o.partition("=")[0].removeprefix("search."): o.partition("=")[2] for o in rest if o.startswith("search.")}
    changed = {key: plain_value(f"search.{key}", value) for key, value in searched.items()}
    space = parse_space(default_space(model.name) | changed)
    config = _compose([o for o in rest if not o.startswith(("model=", "search."))])
    parts = {key: config[key] for key in ("data", "train", "tracking", "ray", "runs_dir")}
    parts |= {"model": dump(model), "space": dump(space), "tune": own}
    job = parse(TuneJob, parts, "configuration")
    with progress() as display:
        summary = run(job, PhaseProgress(display))
    if json:
        print_json(summary)
        return
    stdout.print(f"{summary['trials']} trials; the best has the mean validation quality {summary['quality']:.4f}")
    settings = " ".join(shlex.quote(f"{key}={json_text(value)}") for key, value in summary["best"].items())
    given = " ".join(shlex.quote(o) for o in rest if not o.startswith("search."))
    if model.name in options("model"):
        stdout.print(f"train with it  recsys-moe train {given} {settings}", soft_wrap=True)
    else:
        stdout.print(settings, soft_wrap=True)
    stdout.print(f"run   {summary['run_id']}", soft_wrap=True)


@data_app.command(
    epilog="""Examples:

    recsys-moe data prepare data=census_full

    recsys-moe data prepare data=custom data.name=shop data.schema=shop.yaml data.source=tuesday/ start=models:/shop@champion"""
)
def prepare(
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="Prepare again even if it is there.")] = False,
    json: Json = False,
) -> None:
    """Fit statistics on the training part and write memory-mappable shards; reused by every later run.

    With `start=` they are a trained model's, whose vocabularies grow by what is new.
    """
    from functools import partial

    from recsys_moe.console import PhaseProgress, print_json, progress, stdout
    from recsys_moe.sources import PARTS, DataConfig
    from recsys_moe.typed import dump

    config = _compose(overrides)
    data: DataConfig = _section(config, "data")
    from recsys_moe.pipelines.cluster import ray_cluster
    from recsys_moe.pipelines.prepare import prepare as run_prepare

    start = None
    if config["start"] is not None:
        from recsys_moe.pipelines.tracking import resolve_model
        from recsys_moe.warm_start import StartBundle

        runs_dir = Path(config["runs_dir"])
        start = StartBundle(resolve_model(config["start"], runs_dir, _section(config, "tracking").resolve(runs_dir)))
    cluster = partial(ray_cluster, _section(config, "ray"))
    with progress() as display:
        prepared = run_prepare(data, Path(config["runs_dir"]).absolute(), PhaseProgress(display), force, start, cluster)
    rows = {part: prepared.manifest.rows(part) for part in PARTS}
    if json:
        counts = dump(prepared.manifest)["counts"]
        print_json({"folder": str(prepared.folder), "digest": prepared.manifest.digest, "rows": rows, "counts": counts})
        return
    stdout.print(f"{prepared.folder}", soft_wrap=True)
    stdout.print("  ".join(f"{part} {n:,} rows" for part, n in rows.items()))


@data_app.command(
    epilog="""Examples:

    recsys-moe data synth runs/feed_synth --rows 1000000 --seed 0

    recsys-moe data synth runs/task_correlation --generator task_correlation p=0.9 --rows 100000"""
)
def synth(
    folder: Annotated[Path, typer.Argument(help="A new folder for logs/, truth/ and synth.json.")],
    numbers: Annotated[
        list[str] | None, typer.Argument(help="Numbers of task_correlation, such as p=0.9 m=5.", show_default=False)
    ] = None,
    generator: Annotated[str, typer.Option(help="short_video, or task_correlation: the MMoE paper's regression pair.")] = (
        "short_video"
    ),
    rows: Annotated[int, typer.Option(min=1, help="How many log rows.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world of users and items.")] = 0,
    json: Json = False,
) -> None:
    """Write synthetic logs whose truth is known: a short-video feed of ten tasks, or two tasks of a given correlation."""
    from recsys_moe.config import options
    from recsys_moe.console import PhaseProgress, number, print_json, progress, stdout
    from recsys_moe.correlated import load_correlated_config, synthesise_correlated
    from recsys_moe.errors import nearest
    from recsys_moe.synth import synthesise

    if generator not in options("synth"):
        raise UserError(f"--generator {generator!r} is unknown; {nearest(generator, options('synth'))}")
    if numbers and generator == "short_video":
        raise UserError(f"{numbers[0]!r}: short_video is frozen and takes no numbers; only task_correlation does")
    with progress() as display:
        phases = PhaseProgress(display)
        if generator == "short_video":
            summary = synthesise(folder, rows, seed, lambda done: phases("rows", done, rows))
        else:
            config = load_correlated_config(numbers or [])
            summary = synthesise_correlated(config, folder, rows, seed, lambda done: phases("rows", done, rows))
    if json:
        print_json(summary)
    elif generator == "short_video":
        stdout.print(f"{folder}: {rows:,} rows, digest {summary['digest'][:12]}", soft_wrap=True)
        for task, values in summary["tasks"].items():
            stdout.print(f"  {task:15s} rate {values['rate']:.4f}  best reachable AUC {number(values['best_auc'])}")
    else:
        stdout.print(f"{folder}: {rows:,} rows", soft_wrap=True)
        stdout.print(f"  cos(w1, w2) {summary['p']:.4f}  correlation of y1 and y2 as measured {number(summary['correlation'])}")


@data_app.command(epilog="Example: `recsys-moe data describe logs.parquet --label is_click --output shop.yaml`")
def describe(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Parquet or CSV, or a folder of such files; a path or an URI.")],
    label: Annotated[
        list[str] | None,
        typer.Option(help="A column that is to be learnt, or NAME=EXPRESSION; repeatable.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A new file for the schema [default: standard output].", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Look at somebody's log rows and propose a schema to train on them with: types, rates, suspected labels and leaks."""
    from recsys_moe.console import PhaseProgress, print_json, print_table, progress, stderr
    from recsys_moe.describe import COLUMN_TITLES
    from recsys_moe.describe import describe as look_at
    from recsys_moe.storage import locate

    if output is not None and output.exists():
        raise UserError(f"--output {str(output)!r} exists already; name a new file or delete it")
    with progress() as display:
        phases = PhaseProgress(display)
        found = look_at(locate(source), label or [], lambda done, total: phases("rows", done, total))
    sampled = "" if found.sampled == found.rows else f", judged by a random sample of {found.sampled:,}"
    print_table(f"{source}: {found.rows:,} rows{sampled}", COLUMN_TITLES, found.table(), stderr)
    if output is not None:
        try:
            output.write_text(found.schema)
        except OSError as error:
            raise UserError(f"--output {str(output)!r} can't be written ({error.strerror}); name another file") from None
    elif not json:
        print(found.schema, end="")
    if not found.tasks:
        stderr.print("no column looks like a label: name one with --label", style="yellow", soft_wrap=True)
    stderr.print(f"go on with  {found.train_command(output)}", soft_wrap=True)
    if json:
        print_json(found.to_json() | {"output": output and str(output), "next": found.train_command(output)})


@data_app.command(epilog="Example: `recsys-moe data fetch movielens_1m`, then `recsys-moe train data=movielens_1m`")
def fetch(
    name: Annotated[str, typer.Argument(help="census_income, kuairand_pure, kuairand_1k or movielens_1m.")],
    folder: Annotated[
        Path | None, typer.Argument(help="A new folder for its files [default: runs/data/NAME].", show_default=False)
    ] = None,
    url: Annotated[str | None, typer.Option(help="A mirror of the official archive; the checks are the same.")] = None,
    json: Json = False,
) -> None:
    """Download a public data set from its official place, check it and convert it to Parquet; goes on where it was stopped."""
    from recsys_moe.console import PhaseProgress, print_json, progress, stdout
    from recsys_moe.fetch import fetch as run_fetch
    from recsys_moe.fetch import load_fetch_config

    config = load_fetch_config(name, url)
    with progress() as display:
        summary = run_fetch(config, folder or Path("runs/data") / name, PhaseProgress(display))
    if json:
        print_json(summary)
        return
    stdout.print(f"{summary['folder']} ({summary['licence']}; {summary['homepage']})", soft_wrap=True)
    for file, rows in summary["files"].items():
        stdout.print(f"  {file:35s} {rows:,} rows")
    source = f" data.source={folder}" if folder else ""
    stdout.print(f"train on it  recsys-moe train data={name}{source}", soft_wrap=True)


@app.command(epilog="Example: `recsys-moe evaluate models:/census_full@candidate data=census_full --part test`")
def evaluate(
    model: Model,
    overrides: Overrides = None,
    file: Annotated[str | None, typer.Option(help="Evaluate all rows of this file instead of a data set's part.")] = None,
    part: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    json: Json = False,
) -> None:
    """Measure a bundle on raw rows with labels: the test part of the data set it was trained on, unless told otherwise."""
    from recsys_moe.console import print_json, print_metrics, stderr
    from recsys_moe.sources import PARTS

    if part not in PARTS:
        raise UserError(f"--part {part!r} is unknown; name train, validation or test")
    folder, config = _resolve(model, overrides)
    from dataclasses import asdict

    from recsys_moe.predictor import Predictor
    from recsys_moe.trainer import undefined_quality_warnings
    from recsys_moe.typed import plain

    predictor = Predictor(folder)
    tables, same_data = _labelled_rows(predictor.bundle, config, file, part)
    measured = predictor.evaluate(tables)
    for message in undefined_quality_warnings(measured, part if file is None else str(file)):
        stderr.print(f"warning: {message}", style="yellow", soft_wrap=True)
    metrics = {task: plain(asdict(m)) for task, m in measured.items()}
    rows = part if file is None else str(file)
    if json:
        print_json({"model": model, "bundle": str(folder), "part": rows, "same_data": same_data, "test": metrics})
    else:
        print_metrics(f"{model} on {rows}", metrics)


@app.command(
    epilog="""Examples:

    recsys-moe inspect models:/census_full@candidate test --output census.html

    recsys-moe inspect models:/shop@champion tuesday.parquet --rows 20000"""
)
def inspect(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(help="Rows with labels: a Parquet or CSV file, or the part (train, validation, test) of its data set."),
    ],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="A new HTML file.")] = Path("inspect.html"),
    rows: Annotated[int, typer.Option(min=2, help="Rows of the sample on which features are permuted.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and the permutations.")] = 0,
    json: Json = False,
) -> None:
    """Look at a model on labelled rows: its experts' health, reliability curves, score histograms, permutation importance.

    One HTML file with everything in it. All rows are scored; what needs them at once is of a random sample.
    """
    from recsys_moe.console import PhaseProgress, print_json, progress, stderr, stdout
    from recsys_moe.sources import PARTS

    if output.exists():
        raise UserError(f"--output {str(output)!r} exists already; name a new file or delete it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {str(output)!r} lies in no folder; make {str(output.absolute().parent)!r} first")
    folder, config = _resolve(model, overrides)
    from recsys_moe.predictor import Predictor
    from recsys_moe.report import inspect as look_at
    from recsys_moe.report import page_of, write_report

    predictor = Predictor(folder)
    part = data if data in PARTS else None
    tables, _ = _labelled_rows(predictor.bundle, config, None if part else data, part or "")
    with progress() as display:
        found = look_at(predictor, tables, model, data, rows, seed, PhaseProgress(display))
        write_report(page_of(found), output)
    for finding in found.findings:
        stderr.print(f"warning: {finding.message}", style="yellow", soft_wrap=True)
    if json:
        print_json({"model": model, "bundle": str(folder), "data": data, "report": str(output), **found.to_json()})
    else:
        stdout.print(f"{output}: {found.rows:,} rows scored, {found.sampled:,} of them looked at closely", soft_wrap=True)


@app.command(epilog="Example: `recsys-moe score models:/census_full@candidate new_rows.parquet scores.parquet`")
def score(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="IN", help="Rows to score: Parquet or CSV with the feature columns.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A Parquet file, one column per task (multiclass: per class).")],
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Score every row of a file; the output has the rows' order, and appears whole or not at all."""
    from recsys_moe.console import PhaseProgress, print_json, progress, stdout

    folder, _ = _resolve(model, overrides)
    from recsys_moe.predictor import score_file
    from recsys_moe.storage import locate

    with progress() as display:
        phases = PhaseProgress(display)
        rows = score_file(folder, locate(source), locate(target), lambda done, total: phases("score", done, total))
    if json:
        print_json({"model": model, "bundle": str(folder), "rows": rows, "out": str(target)})
    else:
        stdout.print(f"{rows:,} rows scored into {target}", soft_wrap=True)


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
    config = _compose(overrides, needs_data=False)
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
    cases: Annotated[list[str] | None, typer.Argument(help="layer, loop, home, scaling; all if none is named.")] = None,
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


@app.command(epilog="Example: `recsys-moe promote models:/census_full/3 --alias champion`")
def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME@alias or models:/NAME/VERSION")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Give a registered version an alias; a service of that alias follows within seconds."""
    from recsys_moe.console import print_json, stdout
    from recsys_moe.pipelines.tracking import promote as move

    config = _compose(overrides, needs_data=False)
    version = move(model, alias, _section(config, "tracking").resolve(Path(config["runs_dir"])))
    if json:
        print_json({"version": version, "alias": alias})
    else:
        stdout.print(f"{version} is now @{alias}", soft_wrap=True)


@app.command(
    epilog="""Examples:

    recsys-moe serve models:/census_full@champion serve.port=8000

    recsys-moe serve models:/shop@champion models:/shop@candidate 'serve.canary={model: shop@candidate, share: 0.05}'"""
)
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL… [OVERRIDES]",
            help="models:/NAME@alias, models:/NAME/VERSION, runs:/RUN_ID or bundles' folders; then section.key=value.",
        ),
    ],
    json: Json = False,
) -> None:
    """Serve models over HTTP on loopback: POST /v1/rank and /v1/score, OpenAPI docs at /docs. Ctrl-C stops it.

    A request names a model as `NAME@alias`; the first one is for those that name none. Where an alias moves in MLflow, the
    service follows within seconds. While MLflow is away it goes on, and starts, with the bundles that it has fetched before.
    """
    from tempfile import TemporaryDirectory

    from recsys_moe.console import print_json, stderr

    with TemporaryDirectory(prefix="recsys-moe-served-") as folder:
        shelf, config = _shelf(models, Path(folder) / "models.json")
        found = shelf.open()
        from recsys_moe.serving.app import serve_forever  # seconds, which a mistake above does not wait for

        def ready(url: str) -> None:
            stderr.print(f"serving {', '.join(found)} at {url} (docs: {url}/docs); Ctrl-C stops it", soft_wrap=True)
            if json:
                print_json({"url": url, "models": {name: versions[0] for name, versions in found.items()}})

        serve_forever(shelf.served, _section(config, "serve"), ready, shelf.refresh)


@app.command(epilog="Example: `recsys-moe follow models:/shop@champion --file /runs/served.json runs_dir=/runs`")
def follow(
    models: Annotated[list[str], typer.Argument(metavar="MODEL… [OVERRIDES]", help="As `recsys-moe serve` takes them.")],
    file: Annotated[Path, typer.Option(help="The file that replicas read; it is replaced as a whole.")],
    json: Json = False,
) -> None:
    """Keep a file up to date that tells replicas on a cluster which models to serve, and their bundles in runs_dir.

    `recsys-moe serve` does the same by itself; `serve deploy` needs it beside (see conf/serve/cluster.yaml). Every node must
    see the file and runs_dir under the same paths. Ctrl-C stops it.
    """
    import time

    from recsys_moe.console import print_json, stderr

    shelf, config = _shelf(models, file)
    found = shelf.open()
    stderr.print(f"{file} names {', '.join(found)}; Ctrl-C stops following them", soft_wrap=True)
    if json:
        print_json({"file": str(file), "models": {name: versions[0] for name, versions in found.items()}})
    while True:
        time.sleep(_section(config, "serve").poll_seconds)
        shelf.refresh()


@app.command(epilog="Example: `recsys-moe replay features/ --json`")
def replay(
    log: Annotated[Path, typer.Argument(help="The folder that `serve.feature_log` names, or one of its files.")],
    model: Annotated[Path | None, typer.Option(help="The bundle's folder; the one that served, unless said.")] = None,
    json: Json = False,
) -> None:
    """Score a feature log again, from the features as they were served: the scores must be the same bits."""
    from dataclasses import asdict

    from recsys_moe.console import print_json, stdout
    from recsys_moe.replay import replay as run

    found = run(log, model)
    stdout.print(f"{found.rows:,} rows of {found.files:,} files: {found.differ:,} differ (at most by {found.difference:.3g})")
    if json:
        print_json(asdict(found))
    if found.differ:
        raise UserError(
            f"{found.differ:,} of {found.rows:,} rows have other scores now; see whether processor or library changed"
        )


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


def _own_keys(overrides: list[str] | None, kind: Any) -> tuple[dict[str, Any], list[str]]:
    """What of `key=value` is a field of `kind`, with numbers as numbers, and the rest."""
    from dataclasses import fields

    from recsys_moe.config import plain_value

    names = {field.name for field in fields(kind)}
    pairs = [(override, *override.partition("=")[::2]) for override in overrides or []]
    own = {key: plain_value(key, value) for override, key, value in pairs if key in names and "=" in override}
    return own, [override for override, key, _ in pairs if key not in own]


def _job(config: dict[str, Any]) -> Any:
    from recsys_moe.pipelines.train import TrainJob
    from recsys_moe.typed import parse

    parts = {key: config[key] for key in ("data", "model", "train", "tracking", "ray", "runs_dir", "start")}
    return parse(TrainJob, parts, "configuration")


def _shelf(models: list[str], file: Path) -> tuple[Any, dict[str, Any]]:
    """The models that are named among overrides, told in `file`, and the configuration."""
    from recsys_moe.console import stderr
    from recsys_moe.pipelines.registry import Shelf

    names = [name for name in models if not re.match(r"[A-Za-z_]\w*(\.\w+)*=", name)]
    if not names:
        raise UserError("no model is named; name one, such as models:/NAME@champion, or a bundle's folder")
    config = _compose([override for override in models if override not in names], needs_data=False)
    runs_dir = Path(config["runs_dir"])

    def warn(message: str) -> None:
        stderr.print(f"warning: {message}", style="yellow", soft_wrap=True)

    return Shelf(names, _section(config, "tracking").resolve(runs_dir), runs_dir, file, warn), config


def _resolve(model: str, overrides: list[str] | None) -> tuple[Path, dict[str, Any]]:
    """The bundle's folder, and the configuration."""
    from recsys_moe.pipelines.tracking import resolve_model

    config = _compose(overrides, needs_data=False)
    runs_dir = Path(config["runs_dir"])
    return resolve_model(model, runs_dir, _section(config, "tracking").resolve(runs_dir)), config


def _labelled_rows(bundle: Any, config: dict[str, Any], file: str | None, part: str) -> tuple[Any, bool | None]:
    """Raw rows with labels, and whether they are the run's own: all of a file, or a part of the data set that the bundle was
    trained on, or that `data=` names."""
    from recsys_moe.console import stderr
    from recsys_moe.pipelines.prepare import digest_data
    from recsys_moe.sources import list_joins, read_part, read_rows
    from recsys_moe.storage import locate

    schema, trained_on = bundle.schema, bundle.config.data
    if file is not None:
        return read_rows(locate(file), schema, joins=list_joins(trained_on)), None
    data = _section(config, "data") if "data" in config else trained_on
    same_data = digest_data(data, schema, bundle.config.start) == bundle.config.data_digest
    if not same_data and locate(data.source) == locate(trained_on.source):
        stderr.print(
            f"warning: {data.source!r} or its split has changed since the bundle was trained: these {part} rows are not "
            "the run's, and some may have been trained on",
            style="yellow",
            soft_wrap=True,
        )
    return read_part(data, schema, part), same_data


# The type of each section; a dataclass by its name, since importing it opens the room that it configures.
SECTIONS: dict[str, Any] = {
    "data": "recsys_moe.sources:DataConfig",
    "model": "recsys_moe.models:ModelConfig",
    "train": "recsys_moe.trainer:TrainConfig",
    "serve": "recsys_moe.serving.config:ServeConfig",
    "tracking": "recsys_moe.pipelines.tracking:TrackingConfig",
    "ray": "recsys_moe.pipelines.cluster:RayConfig",
    "runs_dir": str,
    "start": str | None,
}


def _compose(overrides: list[str] | None, needs_data: bool = True) -> dict[str, Any]:
    """The configuration, checked wherever the command line touches it, whether this command reads that section or not.

    The sections that nobody touches are files of the package, which are tested; to open the rooms of all of them would
    cost every command seconds.
    """
    from recsys_moe.config import compose
    from recsys_moe.errors import nearest
    from recsys_moe.storage import only_local

    config = compose(overrides or [], needs_data)
    only_local(str(config["runs_dir"]), "runs_dir")
    for key in config:
        if key not in SECTIONS:
            raise UserError(f"unknown key {key!r}; {nearest(key, SECTIONS)}")
    touched = {override.partition("=")[0].split(".")[0] for override in overrides or []}
    for key in config if "experiment" in touched else [key for key in config if key in touched]:
        _section(config, key)
    return config


def _section(config: dict[str, Any], name: str) -> Any:
    """A section of the configuration as its dataclass; mistakes are named by their whole key."""
    from dataclasses import make_dataclass
    from pkgutil import resolve_name

    from recsys_moe.typed import parse, typed

    kind = SECTIONS[name]
    kind = resolve_name(kind) if isinstance(kind, str) else kind
    whole: Any = typed(make_dataclass("Configuration", [(name, kind)], frozen=True))
    return getattr(parse(whole, {name: config[name]}, "configuration"), name)


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
