"""`recsys-moe data …`."""

from pathlib import Path
from typing import Annotated

import typer

from recsys_moe.cli.settings import Json, Overrides, compose, section
from recsys_moe.errors import UserError

data_app = typer.Typer(
    no_args_is_help=True,
    help="Describe and prepare log rows, fetch public data sets, or make synthetic rows.",
    epilog="""Examples:

    recsys-moe data describe logs/ --label is_click --output shop.yaml

    recsys-moe data prepare data=custom data.name=shop data.schema=shop.yaml data.source=logs/

    recsys-moe data fetch movielens_1m

    recsys-moe data synth runs/feed_synth --rows 1000000""",
)


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

    config = compose(overrides)
    data: DataConfig = section(config, "data")
    from recsys_moe.pipelines.cluster import ray_cluster
    from recsys_moe.pipelines.prepare import prepare as run_prepare

    start = None
    if config["start"] is not None:
        from recsys_moe.pipelines.tracking import resolve_model
        from recsys_moe.warm_start import StartBundle

        runs_dir = Path(config["runs_dir"])
        start = StartBundle(resolve_model(config["start"], runs_dir, section(config, "tracking").resolve(runs_dir)))
    cluster = partial(ray_cluster, section(config, "ray"))
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
