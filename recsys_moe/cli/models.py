"""What is done with a trained model: `recsys-moe evaluate`, `inspect`, `score`, `promote`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_moe.cli.settings import Json, Model, Overrides, compose, section
from recsys_moe.errors import UserError

models_app = typer.Typer()


@models_app.command(epilog="Example: `recsys-moe evaluate models:/census_full@candidate data=census_full --part test`")
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


@models_app.command(
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


@models_app.command(epilog="Example: `recsys-moe score models:/census_full@candidate new_rows.parquet scores.parquet`")
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


@models_app.command(epilog="Example: `recsys-moe promote models:/census_full/3 --alias champion`")
def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME@alias or models:/NAME/VERSION")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Give a registered version an alias; a service of that alias follows within seconds."""
    from recsys_moe.console import print_json, stdout
    from recsys_moe.pipelines.tracking import promote as move

    config = compose(overrides, needs_data=False)
    version = move(model, alias, section(config, "tracking").resolve(Path(config["runs_dir"])))
    if json:
        print_json({"version": version, "alias": alias})
    else:
        stdout.print(f"{version} is now @{alias}", soft_wrap=True)


def _resolve(model: str, overrides: list[str] | None) -> tuple[Path, dict[str, Any]]:
    """The bundle's folder, and the configuration."""
    from recsys_moe.pipelines.tracking import resolve_model

    config = compose(overrides, needs_data=False)
    runs_dir = Path(config["runs_dir"])
    return resolve_model(model, runs_dir, section(config, "tracking").resolve(runs_dir)), config


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
    data = section(config, "data") if "data" in config else trained_on
    same_data = digest_data(data, schema, bundle.config.start) == bundle.config.data_digest
    if not same_data and locate(data.source) == locate(trained_on.source):
        stderr.print(
            f"warning: {data.source!r} or its split has changed since the bundle was trained: these {part} rows are not "
            "the run's, and some may have been trained on",
            style="yellow",
            soft_wrap=True,
        )
    return read_part(data, schema, part), same_data
