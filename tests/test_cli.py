"""The command line: examples in the help, one sentence for a mistake, JSON on the last line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    ("train",),
    ("evaluate",),
    ("score",),
    ("promote",),
    ("serve",),
    ("demo",),
    ("data", "prepare"),
    ("data", "synth"),
]


def cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recsys_moe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_help_shows_examples() -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert "recsys-moe train data=census_full model=mmoe" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_and_json(command: tuple[str, ...]) -> None:
    done = cli(*command, "--help")
    assert f"recsys-moe {' '.join(command)}" in done.stdout
    assert "--json" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    # What makes --help answer at once: every command opens its room itself.
    program = "import sys, recsys_moe.cli; print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MISTAKES = {
    "no data": (["train"], "'data' is missing; add data=NAME"),
    "unknown data": (["train", "data=census_ful"], "data 'census_ful' is unknown; did you mean 'census_full'?"),
    "unknown model": (["train", "data=census_full", "model=mmeo"], "model 'mmeo' is unknown; did you mean 'mmoe'?"),
    "unknown section": (["train", "data=census_full", "trian.seed=1"], "unknown key 'trian.seed'; did you mean 'train'?"),
    "unknown key": (["train", "data=census_full", "train.sed=1"], "unknown key 'train.sed'; did you mean 'seed'?"),
    "wrong type": (["train", "data=census_full", "train.seed=one"], "'train.seed' is 'one'; input should be a valid integer"),
    "fraction": (["train", "data=census_full", "train.epochs=1.5"], "'train.epochs' is 1.5"),
    "out of range": (["train", "data=census_full", "train.lr=-1"], "'train.lr' is -1; input should be greater than 0"),
    "no override": (["train", "census_full"], "'census_full' is not an override; write key=value"),
    "unknown task": (["data", "prepare", "data=census_full", "data.tasks=[incme]"], "did you mean 'income'?"),
    "no source": (["data", "prepare", "data=census_full", "data.source=nowhere"], "does not exist; name the folder or file"),
    "no model": (["score", "nowhere", "a.parquet", "b.parquet"], "model 'nowhere' is neither a folder nor models:/NAME@alias"),
    "no bundle": (["score", ".", "a.parquet", "b.parquet"], "is not a bundle: it has no config.json"),
    "no part": (["evaluate", ".", "--part", "tset"], "--part 'tset' is unknown"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path) -> None:
    arguments, sentence = MISTAKES[name]
    done = cli(*arguments, "--json", f"runs_dir={tmp_path}" if arguments[0] == "train" else "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert "Traceback" not in done.stderr
    assert sentence in json.loads(done.stdout.splitlines()[-1])["error"]
    assert not list(tmp_path.iterdir())


def test_a_mistyped_option_is_named() -> None:
    done = cli("data", "synth", "x", "--rosw", "10")
    assert done.returncode == 2
    assert "--rows" in done.stderr
    assert "Traceback" not in done.stderr
