"""`recsys-moe train`, `compare`, `tune`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_moe.cli.settings import Json, Overrides, compose, own_keys
from recsys_moe.errors import UserError

training_app = typer.Typer()


@training_app.command(
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
        job = _job(compose(overrides))
    else:
        config = compose(overrides, needs_data=False)
        changed = changes(overrides or [], config)
    from recsys_moe.pipelines.train import resume as resume_job
    from recsys_moe.pipelines.train import train as run_job

    with progress() as display:
        phases = PhaseProgress(display)

        def on_event(event: dict[str, Any]) -> None:
            phases.training(event, "samples")
            if event["kind"] == "before":
                mean = number(event["before.mean_quality"])
                stderr.print(f"before: validation {qualities(event['before'])}  mean {mean}", soft_wrap=True)
            elif event["kind"] == "epoch":
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


def _job(config: dict[str, Any]) -> Any:
    from recsys_moe.pipelines.train import TrainJob
    from recsys_moe.typed import parse

    parts = {key: config[key] for key in ("data", "model", "train", "tracking", "ray", "runs_dir", "start")}
    return parse(TrainJob, parts, "configuration")


@training_app.command(
    epilog="""Examples:

    recsys-moe compare data=census_full models=shared_bottom,mmoe,ple,home seeds=5

    recsys-moe compare data=census_full models=mmoe,home,home+self_gates=false,trees,logistic budget=params baseline=home"""
)
def compare(overrides: Overrides = None, json: Json = False) -> None:
    """Train a grid of models and seeds, and say which is better, by how much and how surely.

    Besides configuration overrides it takes `models=A,B,…` (names of `model=`, `trees`, `logistic`; settings of its own behind
    a `+`, those of all networks as `model.KEY=…`), `seeds=N`, `baseline=A`, `budget=params|flops` (networks made equally
    large), `draws=N` (of the bootstrap) and `parallel=N`. With `trials=N` each model is tuned first. The same command again
    goes on where it was stopped.
    """
    from recsys_moe.comparison import cost_table, table
    from recsys_moe.console import PhaseProgress, print_json, print_table, progress, stderr, stdout
    from recsys_moe.pipelines.compare import CompareConfig, CompareJob, model_of
    from recsys_moe.pipelines.compare import compare as run
    from recsys_moe.typed import dump, parse

    own, rest = own_keys(overrides, CompareConfig)
    if any(override.startswith("model=") for override in rest):
        raise UserError("compare takes models=A,B,… in place of model=; write a model's own settings as A+key=value")
    shared = [override for override in rest if override.startswith("model.")]
    if "models" in own:
        own["models"] = re.split(r",(?![^\[]*\])", str(own["models"]))  # not within [64,32]
    grid = parse(CompareConfig, own, "compare")
    config = compose([override for override in rest if override not in shared])
    parts = {key: config[key] for key in ("data", "train", "tracking", "ray", "runs_dir")}
    if config["start"] is not None:
        raise UserError("start is for `train`: models are compared from scratch; leave it out")

    models = {label: dump(model_of(label, shared)) for label in grid.models}
    job = parse(CompareJob, parts | {"compare": dump(grid), "models": models}, "configuration")
    with progress() as display:
        comparison, summary = run(job, lambda message: stderr.print(message, soft_wrap=True), PhaseProgress(display))
    if json:
        print_json(summary)
        return
    print_table(f"Test part of {comparison.data}: {comparison.rows:,} rows", *table(comparison))
    print_table("Cost", *cost_table(comparison))
    stdout.print(f"page  {summary['folder']}/result.html", soft_wrap=True)
    stdout.print(f"run   {summary['run_id']}", soft_wrap=True)


@training_app.command(
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

    own, rest = own_keys(overrides, TuneConfig)
    label = next((o.removeprefix("model=") for o in rest if o.startswith("model=")), "mmoe")
    model = model_of(label)
    searched = {o.partition("=")[0].removeprefix("search."): o.partition("=")[2] for o in rest if o.startswith("search.")}
    changed = {key: plain_value(f"search.{key}", value) for key, value in searched.items()}
    space = parse_space(default_space(model.name) | changed)
    config = compose([o for o in rest if not o.startswith(("model=", "search."))])
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
