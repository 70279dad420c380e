"""`recsys-moe demo`: the whole road in a few minutes, through the same commands that a user types."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_moe.config import conf_dir
from recsys_moe.console import stdout
from recsys_moe.errors import UserError
from recsys_moe.schema import Schema, load_schema
from recsys_moe.synth import load_synth_config

MODELS = ("shared_bottom", "mmoe")
NAME = "feed_synth"
SEED = 0


def run_demo(folder: Path, rows: int) -> dict[str, Any]:
    """Synthesise, prepare, train, compare, register, serve, score, draw; returns what it found.

    Raises:
        UserError: a step failed; names the command.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    commands: list[str] = []
    feed = folder / "feed"
    settings = [f"runs_dir={folder}", f"data={NAME}", f"data.source={feed}"]
    _make_feed(commands, feed, rows)
    prepared = _run(commands, "data", "prepare", *settings)
    positives = {c["task"]: c["positive"] for c in prepared["counts"] if c["part"] == "test"}
    results = {}
    for model in MODELS:
        schedule = ["train.epochs=3", "train.batch_size=2048", f"tracking.alias={model}"]
        results[model] = _run(commands, "train", *settings, f"model={model}", *schedule)
    truth = json.loads((feed / "synth.json").read_text())["tasks"]
    _print_table(results, truth, positives)
    better = _better(results)
    _run(commands, "promote", f"models:/{NAME}@{better}", "--alias", "champion", f"runs_dir={folder}")
    body = json.dumps({"rows": [_request_row(feed, load_schema(conf_dir() / "schema" / "short_video.yaml"))]})
    with _serving(commands, f"models:/{NAME}@champion", f"runs_dir={folder}", "serve.port=0") as url:
        request = urllib.request.Request(f"{url}/v1/score", body.encode(), {"Content-Type": "application/json"})
        commands.append(shlex.join(("curl", "-s", request.full_url, "-H", "Content-Type: application/json", "-d", body)))
        with urllib.request.urlopen(request, timeout=30) as response:
            scores = {task: values[0] for task, values in json.load(response)["scores"].items()}
    stdout.print(f"\nOne request over HTTP to {better}: " + "  ".join(f"{t} {p:.4f}" for t, p in scores.items()))
    picture = folder / "demo.png"
    _draw(picture, results, feed, truth, positives)
    stdout.print("\nThe commands that ran:")
    for command in commands:
        stdout.print(f"  {command}", soft_wrap=True, markup=False)
    seconds = time.perf_counter() - started
    ui = shlex.join(("mlflow", "ui", "--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').absolute()}"))
    stdout.print(f"\nDone in {seconds:.0f} s. Where to look:\n  picture      {picture}\n  experiments  {ui}", soft_wrap=True)
    return {"better": better, "scores": scores, "picture": str(picture), "seconds": round(seconds, 1)}


def _make_feed(commands: list[str], feed: Path, rows: int) -> None:
    """Synthesise the feed, unless just this one is there from an earlier demo; another one is replaced."""
    wanted = {"version": load_synth_config().version, "rows": rows, "seed": SEED}
    if feed.exists():
        if not (feed / "synth.json").is_file():
            raise UserError(f"{str(feed)!r} is not a synthetic feed; delete it or name another folder with --folder")
        found = json.loads((feed / "synth.json").read_text())
        if {key: found[key] for key in wanted} == wanted:
            return
        stdout.print(f"{feed} holds {found['rows']:,} rows of {found['version']}, seed {found['seed']}: it is made anew")
        shutil.rmtree(feed)
    _run(commands, "data", "synth", str(feed), "--rows", str(rows), "--seed", str(SEED))


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recsys_moe", *arguments]


def _tell(commands: list[str], *arguments: str) -> None:
    commands.append(shlex.join(("recsys-moe", *arguments)))
    stdout.print(f"\n$ {commands[-1]}", style="bold", soft_wrap=True, markup=False)


def _run(commands: list[str], *arguments: str) -> dict[str, Any]:
    _tell(commands, *arguments)
    done = subprocess.run(_command(*arguments, "--json"), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the demo stopped: {commands[-1]!r} failed with exit code {done.returncode}; its message is above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def _serving(commands: list[str], *arguments: str) -> Iterator[str]:
    """Start `recsys-moe serve`, yield its URL once it answers, stop it and wait until it is gone."""
    _tell(commands, "serve", *arguments)
    process = subprocess.Popen(_command("serve", *arguments, "--json"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise UserError(answer["error"])
                yield answer["url"]
                break
        else:
            raise UserError(f"the demo stopped: {commands[-1]!r} ended before it served; its message is above")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _mean_auc(result: dict[str, Any], part: str) -> float:
    return float(np.mean([m["auc"] for m in result[part].values() if m["auc"] is not None]))


def _better(results: dict[str, dict[str, Any]]) -> str:
    """The model of the higher mean validation AUC, as early stopping has it: the test part chooses nothing."""
    return max(results, key=lambda model: _mean_auc(results[model], "validation"))


def _print_table(results: dict[str, dict[str, Any]], truth: dict[str, dict[str, Any]], positives: dict[str, int]) -> None:
    from rich.table import Table

    table = Table(title="Test AUC (GAUC), and the best that any model could reach", title_justify="left")
    for column in ("task", "rate", "positives", *MODELS, "best"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, facts in truth.items():
        cells = [results[model]["test"][task] for model in MODELS]
        aucs = [f"{_short(c['auc'])} ({_short(c['gauc'])})" for c in cells]
        table.add_row(task, f"{facts['rate']:.4f}", f"{positives[task]:,}", *aucs, _short(facts["best_auc"]))
    table.add_section()
    table.add_row("mean", "", "", *(f"{_mean_auc(results[m], 'test'):.4f}" for m in MODELS), "")
    table.add_row("validation", "", "", *(f"{_mean_auc(results[m], 'validation'):.4f}" for m in MODELS), "")
    rates = (f"{results[m]['train']['samples_per_s']:,.0f}" for m in MODELS)
    table.add_row("samples/s", "", "", *rates, "")
    stdout.print(table)
    stdout.print("The better mean on the validation part is registered. The AUC of a task with few positives is mostly chance.")


def _short(value: float | None) -> str:
    """Three decimals: the table fits into 80 columns."""
    return "–" if value is None else f"{value:.3f}"


def _request_row(feed: Path, schema: Schema) -> dict[str, Any]:
    """The features of the first log row in which every task is observed; of the first row if there is none.

    No labels: a client does not have them. Where a task is never observed its score would be an extrapolation.
    """
    first: dict[str, Any] = {}
    for path in sorted((feed / "logs").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(4096, columns=list(schema.columns)):
            rows = batch.select(schema.feature_columns).to_pylist()
            observed = np.all([batch[name].is_valid() for name in schema.label_columns], axis=0)
            if observed.any():
                found: dict[str, Any] = rows[int(observed.argmax())]
                return found
            first = first or rows[0]
    return first


def _draw(
    path: Path,
    results: dict[str, dict[str, Any]],
    feed: Path,
    truth: dict[str, dict[str, Any]],
    positives: dict[str, int],
) -> None:
    """Task AUCs of both models, and how MMoE's gates share out the experts on some log rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from recsys_moe.predictor import Predictor

    predictor = Predictor(Path(results["mmoe"]["bundle"]))
    logs = sorted((feed / "logs").glob("*.parquet"))[-1]
    columns = list(predictor.bundle.schema.feature_columns)
    rows = pa.Table.from_batches([next(pq.ParquetFile(logs).iter_batches(4096, columns=columns))])
    gates = predictor.gates(rows)["experts"]
    tasks = predictor.bundle.schema.task_names
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    height = 0.8 / len(MODELS)
    for n, model in enumerate(MODELS):
        aucs = [results[model]["test"][t]["auc"] or np.nan for t in tasks]
        left.barh(np.arange(len(tasks)) + n * height, aucs, height, label=model)
    best = [truth[t]["best_auc"] or np.nan for t in tasks]
    left.plot(best, np.arange(len(tasks)) + height / 2, "k|", markersize=14, label="best reachable")
    left.set_yticks(np.arange(len(tasks)) + height / 2, [f"{t} ({positives[t]:,})" for t in tasks])
    left.invert_yaxis()
    drawn = [a for model in MODELS for a in (results[model]["test"][t]["auc"] for t in tasks) if a is not None]
    left.set_xlim(min([0.5, *drawn]) - 0.02, None)
    left.set_xlabel("test AUC (test positives beside the task)")
    left.set_title("How well each task is ranked")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    mean = gates.mean(0)
    image = right.imshow(mean, aspect="auto", vmin=0, cmap="viridis")
    for t, e in np.ndindex(*mean.shape):
        shade = "black" if mean[t, e] > 0.6 * mean.max() else "white"
        right.text(e, t, f"{mean[t, e]:.2f}\n±{gates[:, t, e].std():.2f}", ha="center", va="center", color=shade, fontsize=7)
    right.set_yticks(range(len(tasks)), tasks)
    right.set_xticks(range(mean.shape[1]), [f"expert {e}" for e in range(mean.shape[1])], rotation=45, ha="right")
    right.set_title(f"mmoe: gate weight, mean ± spread over {rows.num_rows:,} rows")
    figure.colorbar(image, ax=right, label="mean gate weight")
    figure.savefig(path, dpi=120)
    plt.close(figure)
