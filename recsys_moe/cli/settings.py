"""What commands have in common: their options, and the configuration behind them."""

from typing import Annotated, Any

import typer

from recsys_moe.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on standard output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Configuration overrides: group=NAME or section.key=value.", show_default=False),
]
Model = Annotated[str, typer.Argument(help="A bundle's folder, models:/NAME@alias, models:/NAME/VERSION or runs:/RUN_ID.")]

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


def compose(overrides: list[str] | None, needs_data: bool = True) -> dict[str, Any]:
    """The configuration, checked wherever the command line touches it, whether this command reads that section or not.

    The sections that nobody touches are files of the package, which are tested; to open the rooms of all of them would
    cost every command seconds.
    """
    from recsys_moe import config as files
    from recsys_moe.errors import nearest
    from recsys_moe.storage import only_local

    config = files.compose(overrides or [], needs_data)
    only_local(str(config["runs_dir"]), "runs_dir")
    for key in config:
        if key not in SECTIONS:
            raise UserError(f"unknown key {key!r}; {nearest(key, SECTIONS)}")
    touched = {override.partition("=")[0].split(".")[0] for override in overrides or []}
    for key in config if "experiment" in touched else [key for key in config if key in touched]:
        section(config, key)
    return config


def section(config: dict[str, Any], name: str) -> Any:
    """A section of the configuration as its dataclass; mistakes are named by their whole key."""
    from dataclasses import make_dataclass
    from pkgutil import resolve_name

    from recsys_moe.typed import parse, typed

    kind = SECTIONS[name]
    kind = resolve_name(kind) if isinstance(kind, str) else kind
    whole: Any = typed(make_dataclass("Configuration", [(name, kind)], frozen=True))
    return getattr(parse(whole, {name: config[name]}, "configuration"), name)


def own_keys(overrides: list[str] | None, kind: Any) -> tuple[dict[str, Any], list[str]]:
    """What of `key=value` is a field of `kind`, with numbers as numbers, and the rest."""
    from dataclasses import fields

    from recsys_moe.config import plain_value

    names = {field.name for field in fields(kind)}
    pairs = [(override, *override.partition("=")[::2]) for override in overrides or []]
    own = {key: plain_value(key, value) for override, key, value in pairs if key in names and "=" in override}
    return own, [override for override, key, _ in pairs if key not in own]
