"""One configuration, composed by Hydra from `conf/` and the command line's overrides.

What comes out is plain data; the typed dataclasses beside the classes that they configure check it (`recsys_moe.typed`).
"""

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


def options(group: str) -> list[str]:
    """The names that `group=` takes, from the files of the group."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def compose(overrides: Sequence[str], needs_data: bool = True) -> dict[str, Any]:
    """Compose the configuration: `data=census_full model=mmoe train.seed=1`.

    A group takes a file's name, every other key a value in Hydra's grammar. A key that no file mentions is passed on: the
    dataclass that it is meant for knows whether it exists. Without `needs_data` the `data` group may be left out.

    Raises:
        UserError: an override that is not `key=value`, or a name that no file or section has.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    checked = [_check(override) for override in overrides]
    if not needs_data and not any(o.startswith(("data=", "experiment=")) for o in overrides):
        checked.append("~data")
    try:
        with initialize_config_dir(str(conf_dir()), version_base=None):
            config = hydra_compose("config", overrides=checked)
        for key in sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"{key} is missing; add {key}=VALUE")
        resolved = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error)
        missing = re.search(r"You must specify '(\w+)'", message)
        if missing:
            group = missing[1]
            raise UserError(f"{group!r} is missing; add {group}=NAME ({nearest('', options(group))})") from None
        raise UserError(f"configuration ({' '.join(overrides)}): {' '.join(message.split())}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _check(override: str) -> str:
    key, separator, value = override.partition("=")
    if not separator or not re.fullmatch(r"[\w.]+", key):
        raise UserError(f"{override!r} is not an override; write key=value, such as model=mmoe or train.seed=1")
    if key in GROUPS:
        if value not in options(key):
            raise UserError(f"{key} {value!r} is unknown; {nearest(value, options(key))}")
        return override
    section = key.split(".")[0]
    sections = [name for name in yaml.safe_load((conf_dir() / "config.yaml").read_text()) if name != "defaults"]
    if section not in (*GROUPS, *sections):
        raise UserError(f"unknown key {key!r}; {nearest(section, (*GROUPS, *sections))}")
    return f"++{override}"
