"""`recsys-moe serve`, `follow`, `replay`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_moe.cli.settings import Json, compose, section
from recsys_moe.errors import UserError

serving_app = typer.Typer()


@serving_app.command(
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

        serve_forever(shelf.served, section(config, "serve"), ready, shelf.refresh)


@serving_app.command(epilog="Example: `recsys-moe follow models:/shop@champion --file /runs/served.json runs_dir=/runs`")
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
        time.sleep(section(config, "serve").poll_seconds)
        shelf.refresh()


@serving_app.command(epilog="Example: `recsys-moe replay features/ --json`")
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


def _shelf(models: list[str], file: Path) -> tuple[Any, dict[str, Any]]:
    """The models that are named among overrides, told in `file`, and the configuration."""
    from recsys_moe.console import stderr
    from recsys_moe.pipelines.registry import Shelf

    names = [name for name in models if not re.match(r"[A-Za-z_]\w*(\.\w+)*=", name)]
    if not names:
        raise UserError("no model is named; name one, such as models:/NAME@champion, or a bundle's folder")
    config = compose([override for override in models if override not in names], needs_data=False)
    runs_dir = Path(config["runs_dir"])

    def warn(message: str) -> None:
        stderr.print(f"warning: {message}", style="yellow", soft_wrap=True)

    return Shelf(names, section(config, "tracking").resolve(runs_dir), runs_dir, file, warn), config
