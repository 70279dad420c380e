"""One configuration, composed by Hydra from `conf/` and the command line's overrides.

What comes out is plain data; the typed dataclasses beside the classes that they configure check it (`recsys_moe.typed`).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recsys_moe.errors import UserError, nearest

GROUPS = ("data", "model", "train", "serve", "experiment")


def conf_dir() -> Path:
    """The folder of the configuration files, in a checkout and in an installed wheel alike."""
    import recsys_moe.conf

    return Path(recsys_moe.conf.__path__[0])


def lm_conf_dir() -> Path:
    """The folder of what `recsys-moe llm train` is configured by."""
    return conf_dir() / "llm"


def options(group: str, folder: Path | None = None) -> list[str]:
    """The names that `group=` takes, from the files of the group."""
    return sorted(p.stem for p in ((folder or conf_dir()) / group).glob("*.yaml"))


def compose(overrides: Sequence[str], needs_data: bool = True, folder: Path | None = None) -> dict[str, Any]:
    """Compose the configuration: `data=census_full model=mmoe train.seed=1`.

    A group takes a file's name, every other key a value: a number, `true`, `null`, a `[list]`, a `{dictionary: 1}`, or else
    text as it stands (`~/` is the home folder; quotes keep `"5"` text). A key that no file mentions is passed on: the
    dataclass that it is meant for knows whether it exists. Without `needs_data` the `data` group may be left out. `folder` has
    another `config.yaml` with groups of its own.

    Raises:
        UserError: an override that is not `key=value`, or a name that no file or section has.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = folder or conf_dir()
    checked = [_check(override, folder) for override in overrides]
    if not needs_data and not any(o.startswith(("data=", "experiment=")) for o in overrides):
        checked.append("~data")
    try:
        with initialize_config_dir(str(folder), version_base=None):
            config = hydra_compose("config", overrides=checked)
        for key in sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"{key} is missing; add {key}=VALUE")
        resolved = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error)
        missing = re.search(r"You must specify '(\w+)'", message)
        if missing:
            group = missing[1]
            raise UserError(f"{group!r} is missing; add {group}=NAME ({nearest('', options(group, folder))})") from None
        raise UserError(f"configuration ({' '.join(overrides)}): {' '.join(message.split())}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _check(override: str, folder: Path) -> str:
    key, separator, value = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.([A-Za-z_]\w*|\d+))*", key):
        raise UserError(f"{override!r} is not an override; write key=value, such as model=mmoe or train.seed=1")
    if key in GROUPS and (folder / key).is_dir():
        if value not in options(key, folder):
            raise UserError(f"{key} {value!r} is unknown; {nearest(value, options(key, folder))}")
        return override
    section = key.split(".")[0]
    if section not in sections(folder):
        raise UserError(f"unknown key {key!r}; {nearest(section, sections(folder))}")
    return f"++{key}={_value(key, value)}"


def sections(folder: Path) -> list[str]:
    """What the composed configuration consists of: the groups (an experiment only changes the others) and the root's own."""
    root = yaml.safe_load((folder / "config.yaml").read_text())
    groups = [name for name in GROUPS if (folder / name).is_dir()]
    return [name for name in (*groups, *root) if name not in ("experiment", "defaults")]


def plain_value(key: str, text: str) -> Any:
    """A value as YAML has it: a number, `true`, `null`, a `[list]`, a `{dictionary: 1}`, or text.

    >>> plain_value("leaves", "7"), plain_value("c", "[0.1, 1]")
    (7, [0.1, 1])

    Raises:
        UserError: a list or the like that is not closed.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key} is {text!r}, which is no value; close what is open, or quote it for the shell") from None


def _value(key: str, text: str) -> str:
    """A value in Hydra's grammar: numbers, lists and the like as they stand, any other text quoted.

    To Hydra, a path with a comma is a choice, one with a parenthesis a function, and one with an equals sign a mistake.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith("~"):
        text = os.path.expanduser(text)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
        simple = not parsed.is_sweep_override()
    except HydraException:
        simple = False
    if simple and not re.match(r"\w+\(", text):
        return text
    if text.startswith(("[", "{", "'", '"')):
        raise UserError(
            f"{key} is {text!r}, which is not one whole list, dictionary or quoted text; close what is open, or quote it "
            f"for the shell and for us: '{key}=\"…\"'"
        )
    # Backslashes are plain characters but before a quote, where each must be doubled.
    quoted = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{quoted}'"


# What a run that goes on may have differently from before.
CHANGEABLE = {
    "train": ("workers", "expert_parallel", "max_failures", "checkpoint_steps", "checkpoint_seconds"),
    "ray": ("address", "wheel"),
}


def changes(overrides: Sequence[str], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values by which a resumed run's settings differ, by section, from the configuration that the overrides made.

    Raises:
        UserError: a key that can't change any more.
    """
    found: dict[str, dict[str, Any]] = {}
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section == "runs_dir":
            continue
        if key not in CHANGEABLE.get(section, ()):
            raise UserError(f"{override!r} can't change when a run goes on; leave it out, or train anew with it")
        found.setdefault(section, {})[key] = config[section][key]
    return found
