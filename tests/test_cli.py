"""The command line: examples in the help, one sentence for a mistake, JSON on the last line."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from recsys_moe.cli import app

Cli = Callable[..., subprocess.CompletedProcess[str]]


def verbs(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Every command by its words, and whether it has commands of its own."""
    inner = getattr(command, "commands", {})
    yield names, bool(inner)
    for name, one in inner.items():
        yield from verbs(one, *names, name)


@pytest.mark.parametrize(("command", "group"), verbs(typer.main.get_command(app)), ids=str)
def test_every_command_has_an_example_and_json(command: tuple[str, ...], group: bool, cli: Cli) -> None:
    done = cli(*command, "--help")
    assert done.returncode == 0
    assert " ".join(("recsys-moe", *command)) in done.stdout.partition("Example")[2]
    assert group or "--json" in done.stdout


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
    # A section that the command does not read is checked all the same.
    "unread key": (["train", "data=census_full", "serve.prot=1"], "unknown key 'serve.prot'; did you mean 'port'?"),
    "unread section": (
        ["data", "prepare", "data=census_full", "train.sead=3"],
        "unknown key 'train.sead'; did you mean 'seed'?",
    ),
    "unread type": (["promote", "models:/a/1", "train.seed=one"], "'train.seed' is 'one'; input should be a valid integer"),
    "unread before the model": (["serve", "nowhere", "train.sed=1"], "unknown key 'train.sed'; did you mean 'seed'?"),
    "runs_dir": (["promote", "models:/a/1", "runs_dir=[]"], "'runs_dir' is []; input should be a valid string"),
    "option": (["data", "synth", "x", "--rosw", "10"], "No such option: --rosw (Possible options: --rows); see "),
    "argument": (["score", "m"], "Missing argument 'IN'; see "),
    "wrong type": (["train", "data=census_full", "train.seed=one"], "'train.seed' is 'one'; input should be a valid integer"),
    "fraction": (["train", "data=census_full", "train.epochs=1.5"], "'train.epochs' is 1.5"),
    "out of range": (["train", "data=census_full", "train.lr=-1"], "'train.lr' is -1; input should be greater than 0"),
    "no override": (["train", "census_full"], "'census_full' is not an override; write key=value"),
    "unknown task": (["data", "prepare", "data=census_full", "data.tasks=[incme]"], "did you mean 'income'?"),
    "no source": (["data", "prepare", "data=census_full", "data.source=nowhere"], "does not exist; name the folder or file"),
    "no model": (["score", "nowhere", "a.parquet", "b.parquet"], "model 'nowhere' is neither a folder nor models:/NAME@alias"),
    "no bundle": (["score", ".", "a.parquet", "b.parquet"], "is not a bundle: it has no config.json"),
    "nothing to inspect": (["inspect", ".", "rows.parquet"], "is not a bundle: it has no config.json"),
    "unknown generator": (["data", "synth", "x", "--generator", "feed"], "--generator 'feed' is unknown; valid: short_video"),
    "frozen generator": (["data", "synth", "x", "p=0.5"], "'p=0.5': short_video is frozen and takes no numbers"),
    "unknown number": (
        ["data", "synth", "x", "q=0.5", "--generator", "task_correlation"],
        "task_correlation: unknown key 'q'; valid: version, p, c",
    ),
    "number out of range": (
        ["data", "synth", "x", "p=1.5", "--generator", "task_correlation"],
        "task_correlation: 'p' is 1.5; input should be less than or equal to 1",
    ),
    "unknown data set": (["data", "fetch", "movielens"], "data set 'movielens' is unknown; did you mean 'movielens_1m'?"),
    "no address": (
        ["data", "fetch", "movielens_1m", "--url", "ftp://a/b"],
        "'url' is 'ftp://a/b'; string should match pattern",
    ),
    "no part": (["evaluate", ".", "--part", "tset"], "--part 'tset' is unknown"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, cli: Cli) -> None:
    arguments, sentence = MISTAKES[name]
    done = cli(*arguments, "--json", f"runs_dir={tmp_path}" if arguments[0] == "train" else "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert "Traceback" not in done.stderr
    assert sentence in json.loads(done.stdout.splitlines()[-1])["error"]
    assert not list(tmp_path.iterdir())


def test_no_command_shows_the_help() -> None:
    done = subprocess.run([sys.executable, "-m", "recsys_moe"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "recsys-moe train data=census_full model=mmoe" in done.stdout
    assert done.stderr == ""


def test_promote_promises_what_serving_does(cli: Cli) -> None:
    help_text = " ".join(cli("promote", "--help").stdout.split())
    assert "a service of that alias follows within seconds" in help_text
    assert "restart" not in help_text


FIGURES = {
    "auc": 0.9999,
    "gauc": 0.6123,
    "gauc_left_out": 12345,
    "logloss": 0.6851,
    "ne": 0.9884,
    "calibration": 1.0408,
    "ece": 0.0464,
    "rows": 123456,
}


def test_both_trainers_progress_is_shown_alike(capsys: pytest.CaptureFixture[str]) -> None:
    from recsys_moe.console import PhaseProgress, progress

    with progress() as display:
        phases = PhaseProgress(display)
        for event in (
            {"kind": "warning", "message": "slow"},
            {"kind": "start", "step": 0, "total_steps": 9},
            {"kind": "resume", "step": 1234},
            {"kind": "resume", "step": 3, "epoch": 1},
            {"kind": "health"},
            {"kind": "step", "step": 4, "total_steps": 9, "train.loss": 0.5, "train.tokens_per_s": 1234.4},
        ):
            phases.training(event, "tokens")
        (task,) = display.tasks
        found = task.description, task.completed, task.total, task.fields["note"]
        assert found == ("train", 4, 9, "loss 0.5000  1,234 tokens/s")
    told = capsys.readouterr().err
    for line in ("warning: slow\n", "going on from step 1,234\n", "going on from step 3, in epoch 2\n"):
        assert line in told


@pytest.mark.parametrize("width", [30, 80, 10_000])
def test_figures_are_never_cut(width: int) -> None:
    from recsys_moe.console import print_metrics

    out = io.StringIO()
    print_metrics(
        "Test metrics of [old]", {"effective_view": FIGURES, "like": FIGURES}, Console(file=out, width=width, markup=False)
    )
    lines = out.getvalue().splitlines()
    assert lines[0] == "Test metrics of [old]"
    for task, line in zip(("effective_view", "like"), lines[-2:], strict=True):
        assert line.split() == [task, "0.9999", "0.6123", "12,345", "0.6851", "0.9884", "1.0408", "0.0464", "123,456"]
    assert max(map(len, lines)) <= 80


def test_what_has_no_groups_has_no_gauc() -> None:
    from recsys_moe.console import print_metrics

    out = io.StringIO()
    print_metrics("x", {"like": FIGURES | {"gauc": None, "gauc_left_out": 0}}, Console(file=out, width=80))
    assert "gauc" not in out.getvalue()


def test_a_pipe_gets_whole_lines_and_brackets_are_text() -> None:
    path = "/tmp/[/x]/[old]/:smile:/" + "long" * 60
    program = f"from recsys_moe.console import stderr, stdout; stdout.print({path!r}); stderr.print({path!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"COLUMNS": "80"})
    assert done.stdout == done.stderr == path + "\n"
