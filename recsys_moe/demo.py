"""`recsys-moe demo`: the whole road in a few minutes, through the same commands that a user types."""

import json
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

from recsys_moe.console import number, stdout
from recsys_moe.errors import UserError

MODELS = ("shared_bottom", "mmoe")
NAME = "feed_synth"


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
    if not feed.exists():
        _run(commands, "data", "synth", str(feed), "--rows", str(rows))
    _run(commands, "data", "prepare", *settings)
    results = {}
    for model in MODELS:
        schedule = ["train.epochs=3", "train.batch_size=2048", f"tracking.alias={model}"]
        results[model] = _run(commands, "train", *settings, f"model={model}", *schedule)
    _print_table(results, json.loads((feed / "synth.json").read_text())["tasks"])
    better = max(MODELS, key=lambda model: _mean_auc(results[model]))
    _run(commands, "promote", f"models:/{NAME}@{better}", "--alias", "champion", f"runs_dir={folder}")
    row = _some_rows(feed, 1)[0]
    with _serving(commands, f"models:/{NAME}@champion", f"runs_dir={folder}", "serve.port=0") as url:
        request = urllib.request.Request(
            f"{url}/v1/score", json.dumps({"rows": [row]}).encode(), {"Content-Type": "application/json"}
        )
        commands.append(f"curl -s {url}/v1/score -H 'Content-Type: application/json' -d '{{\"rows\": [{{…}}]}}'")
        with urllib.request.urlopen(request, timeout=30) as response:
            scores = {task: values[0] for task, values in json.load(response)["scores"].items()}
    stdout.print(f"\nOne request over HTTP to {better}: " + "  ".join(f"{t} {p:.4f}" for t, p in scores.items()))
    picture = folder / "demo.png"
    _draw(picture, results, feed)
    stdout.print("\nThe commands that ran:")
    for command in commands:
        stdout.print(f"  {command}", soft_wrap=True, markup=False)
    seconds = time.perf_counter() - started
    ui = f"mlflow ui --backend-store-uri sqlite:///{(folder / 'mlflow.db').absolute()}"
    stdout.print(f"\nDone in {seconds:.0f} s. Where to look:\n  picture      {picture}\n  experiments  {ui}", soft_wrap=True)
    return {"better": better, "scores": scores, "picture": str(picture), "seconds": round(seconds, 1)}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recsys_moe", *arguments]


def _run(commands: list[str], *arguments: str) -> dict[str, Any]:
    commands.append(" ".join(("recsys-moe", *arguments)))
    stdout.print(f"\n$ {commands[-1]}", style="bold", soft_wrap=True, markup=False)
    done = subprocess.run(_command(*arguments, "--json"), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the demo stopped: {commands[-1]!r} failed with exit code {done.returncode}; its message is above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextmanager
def _serving(commands: list[str], *arguments: str) -> Iterator[str]:
    """Start `recsys-moe serve`, yield its URL once it answers, stop it and wait until it is gone."""
    commands.append(" ".join(("recsys-moe", "serve", *arguments)))
    stdout.print(f"\n$ {commands[-1]}", style="bold", soft_wrap=True, markup=False)
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


def _mean_auc(result: dict[str, Any]) -> float:
    return float(np.mean([m["auc"] for m in result["test"].values() if m["auc"] is not None]))


def _print_table(results: dict[str, dict[str, Any]], truth: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="Test AUC (GAUC)", title_justify="left")
    for column in ("task", "rate", *MODELS, "best reachable"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, facts in truth.items():
        cells = [results[model]["test"][task] for model in MODELS]
        aucs = [f"{number(c['auc'])} ({number(c['gauc'])})" for c in cells]
        table.add_row(task, f"{facts['rate']:.4f}", *aucs, number(facts["best_auc"]))
    table.add_section()
    table.add_row("mean", "", *(f"{_mean_auc(results[m]):.4f}" for m in MODELS), "")
    rates = (f"{results[m]['train']['samples_per_s']:,.0f}" for m in MODELS)
    table.add_row("samples/s", "", *rates, "")
    stdout.print(table)


def _some_rows(feed: Path, rows: int) -> list[dict[str, Any]]:
    """The first log rows as JSON-able dictionaries, labels and lists left out."""
    table = next(pq.ParquetFile(sorted((feed / "logs").glob("*.parquet"))[0]).iter_batches(rows))
    keep = [f.name for f in table.schema if not pa.types.is_nested(f.type)]
    found: list[dict[str, Any]] = table.select(keep).to_pylist()
    return found


def _draw(path: Path, results: dict[str, dict[str, Any]], feed: Path) -> None:
    """Task AUCs of both models, and how MMoE's gates share out the experts on some log rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from recsys_moe.predictor import Predictor

    predictor = Predictor(Path(results["mmoe"]["bundle"]))
    logs = sorted((feed / "logs").glob("*.parquet"))[-1]
    columns = list(predictor.bundle.schema.feature_names)
    rows = pa.Table.from_batches([next(pq.ParquetFile(logs).iter_batches(4096, columns=columns))])
    gates = predictor.gates(rows)
    assert gates is not None
    tasks = predictor.tasks
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    height = 0.8 / len(MODELS)
    truth = json.loads((feed / "synth.json").read_text())["tasks"]
    for n, model in enumerate(MODELS):
        aucs = [results[model]["test"][t]["auc"] or np.nan for t in tasks]
        left.barh(np.arange(len(tasks)) + n * height, aucs, height, label=model)
    best = [truth[t]["best_auc"] or np.nan for t in tasks]
    left.plot(best, np.arange(len(tasks)) + height / 2, "k|", markersize=14, label="best reachable")
    left.set_yticks(np.arange(len(tasks)) + height / 2, tasks)
    left.invert_yaxis()
    drawn = [a for model in MODELS for a in (results[model]["test"][t]["auc"] for t in tasks) if a is not None]
    left.set_xlim(min([0.5, *drawn]) - 0.02, None)
    left.set_xlabel("test AUC")
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
