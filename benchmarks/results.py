"""The comparisons that docs/results.md tells of, run and written down by one command.

    make results                          everything: hours; what is done already is not done again
    python benchmarks/results.py census   one of them; docs/results.md tells of all whose runs are there

Each is a `recsys-moe compare`, whose whole outcome (pages, pictures, MLflow runs) stands below the runs folder.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_moe.console import number

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = "single_task,shared_bottom,omoe,mmoe,mmoe+gate=topk,cgc,ple,adatt,stem,home"
ABLATION = ("expert_norm=false", "hierarchy_mask=false", "feature_gates=0", "self_gates=false", "task_experts=false")
FEED_TASKS = "data.tasks=[effective_view,long_view,like,comment,follow,forward]"
# Chosen on the validation part (docs/decisions.md).
KUAIRAND = (
    "data=kuairand_time",
    "data.tasks=[click,long_view,like,comment,profile_enter]",
    "model.front.first_order=true",
    "train.epochs=4",
    "train.lr=3e-4",
    "train.embedding_lr=0.02",
)
HOME = "home+expert_dims=[32]"
# Experts as in the paper's account: ReLU, no norm; nothing else that holds them either.
BARE = ("mmoe+norm=none+dropout=0", "cgc+norm=none+dropout=0", f"{HOME}+expert_norm=false+dropout=0", f"{HOME}+dropout=0")
PAPER_SIZES = ",".join(
    (
        "shared_bottom+bottom_dims=[113]+tower_dims=[8]+dropout=0",
        "omoe+num_experts=8+expert_dims=[16]+tower_dims=[8]+dropout=0",
        "mmoe+num_experts=8+expert_dims=[16]+tower_dims=[8]+dropout=0",
    )
)

PAPERS = """Published test AUC, each under a protocol of its own: which columns are kept moves income's AUC by .04, far more
than models differ, so rows are to be compared within a source only. MMoE's paper (Ma et al., KDD 2018) gives the mean of 400
runs, of income and never_married and of college and never_married; PLE's (Tang et al., RecSys 2020, table 5) trains income and
never_married.

| source | model | income | never_married | college |
|---|---|---|---|---|
| MMoE's paper | single-task | .9337 | .9922 | .8792 |
| | shared-bottom | .9295 | .9921 | .8813 |
| | L2-constrained | .9359 | .9918 | .8823 |
| | cross-stitch | .9361 | .9922 | .8819 |
| | OMoE | .9319 | .9923 | .8813 |
| | MMoE | .9359 | .9927 | .8826 |
| PLE's paper | single-task | .9445 | .9923 | |
| | MMoE | .9393 | .9928 | |
| | PLE | .9522 | .9945 | |"""


@dataclass(frozen=True)
class Experiment:
    """A section: what is asked, the `compare` that answers, what has to be there before (a command), and what others have
    published. With `anomalies`, anomalies.py reads the runs' health afterwards; with `further`, further.py measures them on
    more rows."""

    title: str
    question: str
    compare: tuple[str, ...]
    before: tuple[str, ...] = ()
    published: str = ""
    anomalies: bool = False
    further: bool = False


def correlated(p: float) -> Experiment:
    folder = f"runs/task_correlation-{p}"
    return Experiment(
        f"Two regression tasks, p = {p}",
        f"The MMoE paper's pair of tasks whose weight vectors have the cosine {p} (its section 3), and its sizes: 8 experts of "
        "16 units or a bottom of 113, towers of 8. 100,000 rows, c = 0.3, m = 5, noise of variance 0.01.",
        (
            "data=task_correlation",
            f"data.source={folder}",
            f"data.name=correlation_{round(100 * p):03d}",
            f"models={PAPER_SIZES}",
            f"baseline={PAPER_SIZES.split(',')[0]}",
            "seeds=10",
            "parallel=2",
            "train.epochs=8",
        ),
        ("data", "synth", folder, "--generator", "task_correlation", "--rows", "100000", f"p={p}"),
    )


EXPERIMENTS = {
    "census": Experiment(
        "Census income, five folds",
        "All 99,762 rows of `full42`, the protocol's permutation cut into five; trees and the linear model beside.",
        ("data=census_full", f"models={NETWORKS},trees,logistic", "baseline=trees", "seeds=2", "folds=5", "parallel=2"),
        published=PAPERS,
    ),
    "census_tuned": Experiment(
        "Census income, five folds, tuned",
        "The same folds, each model's settings searched in each fold on its own validation rows, with as many trials for all.",
        (
            "data=census_full",
            "models=mmoe,trees",
            "baseline=trees",
            "seeds=2",
            "folds=5",
            "trials=10",
            "parallel=1",
        ),
    ),
    "census_nominal": Experiment(
        "Census income, nominal columns",
        "UCI's split with the nominal columns only, as several papers have it.",
        ("data=census_nominal", f"models={NETWORKS},trees,logistic", "baseline=trees", "seeds=3", "parallel=2"),
    ),
    "kuairand": Experiment(
        "KuaiRand in time",
        "41,828 impressions with a like or a hate of 664 users, tested on the last tenth. Rates are not the platform's, "
        "comment and profile_enter have some hundred positives, and the months drift: see the rolling splits.",
        (
            *KUAIRAND,
            f"models={NETWORKS},aitm+chain=[click,long_view],trees,logistic",
            "baseline=logistic",
            "seeds=3",
            "parallel=2",
        ),
    ),
    "kuairand_tuned": Experiment(
        "KuaiRand in time, tuned",
        "The same, after ten trials for each model.",
        (
            *KUAIRAND[:3],
            f"models={NETWORKS},aitm+chain=[click,long_view],trees,logistic",
            "baseline=trees",
            "seeds=5",
            "trials=10",
            "parallel=2",
            "train.epochs=16",
        ),
    ),
    "kuairand_rolling": Experiment(
        "KuaiRand, rolling splits",
        "The last three tenths tested one after the other, each by models of what came before.",
        (
            *KUAIRAND,
            "models=mmoe,ple,home,trees,logistic",
            "baseline=logistic",
            "seeds=3",
            "folds=3",
            "parallel=2",
        ),
    ),
    "feed": Experiment(
        "Synthetic feed: HoME against MMoE and PLE",
        "2 million rows whose true probabilities are known, equal parameters.",
        (
            "data=feed_synth",
            FEED_TASKS,
            f"models={HOME},mmoe,ple",
            f"baseline={HOME}",
            "seeds=5",
            "budget=params",
            "parallel=2",
            "model.dropout=0",
            "train.epochs=4",
            "train.batch_size=4096",
        ),
        ("data", "synth", "runs/feed_synth", "--rows", "2000000"),
        further=True,
    ),
    "feed_ablation": Experiment(
        "Synthetic feed: what HoME's parts do",
        "HoME without each of its parts, equal parameters.",
        (
            "data=feed_synth",
            FEED_TASKS,
            f"models={HOME}," + ",".join(f"{HOME}+{part}" for part in ABLATION),
            f"baseline={HOME}",
            "seeds=2",
            "budget=params",
            "parallel=2",
            "model.dropout=0",
            "train.epochs=4",
            "train.batch_size=4096",
        ),
        ("data", "synth", "runs/feed_synth", "--rows", "2000000"),
        further=True,
    ),
    "anomalies": Experiment(
        "Synthetic feed: HoME's three anomalies",
        "MMoE and CGC of ReLU experts without a norm, and HoME without and with its own, all at ten times the usual learning "
        "rate, in small batches, without decay or dropout: what gates and experts do wrong shows soonest there. 200,000 rows. "
        "Figures are of the last look, at the weights that are kept.",
        (
            "data=feed_synth",
            "data.source=runs/feed_200000",
            FEED_TASKS,
            f"models={','.join(BARE)}",
            f"baseline={BARE[-1]}",
            "seeds=1",
            "parallel=2",
            "train.epochs=3",
            "train.patience=0",
            "train.batch_size=256",
            "train.lr=0.03",
            "train.weight_decay=0",
            "train.health.budget=1",
        ),
        ("data", "synth", "runs/feed_200000", "--rows", "200000"),
        anomalies=True,
    ),
    **{f"correlation_{p}": correlated(p) for p in (0.0, 0.5, 0.9, 1.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS, "llm"], help="all if none is named")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where results.md and results/*.png go")
    parser.add_argument("--change", nargs="*", default=[], help="overrides for a smaller try, such as seeds=1 train.epochs=1")
    options = parser.parse_args()
    pictures = options.docs / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in options.experiments or [*EXPERIMENTS, "llm"]:
        if name == "llm":
            subprocess.run([sys.executable, str(Path(__file__).with_name("results_llm.py"))], check=True)
            (options.docs / "results.md").write_text(report(pictures))
            continue
        experiment = EXPERIMENTS[name]
        if experiment.before and not Path(experiment.before[2]).exists():
            run(*experiment.before)
        command = ["compare", *experiment.compare, *options.change]
        found = run(*command)
        folder = Path(found["folder"])
        kept = found | {"folder": folder.name, "command": command, "best": best_reachable(experiment)}
        (pictures / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        for kind in ("differences", "pareto"):
            shutil.copy(folder / f"{kind}.png", pictures / f"{name}-{kind}.png")
        if experiment.anomalies:
            script = Path(__file__).with_name("anomalies.py")
            subprocess.run([sys.executable, script, folder, pictures], check=True)
        if experiment.further:
            script = Path(__file__).with_name("further.py")
            subprocess.run([sys.executable, script, folder, pictures / f"{name}-further.json"], check=True)
        (options.docs / "results.md").write_text(report(pictures))


def run(*arguments: str) -> Any:
    command = [sys.executable, "-m", "recsys_moe", *arguments]
    print("$", shlex.join(("recsys-moe", *arguments)), file=sys.stderr, flush=True)
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def best_reachable(experiment: Experiment) -> dict[str, dict[str, float]]:
    """What the true probabilities or expectations reach, by metric and task, where the generator has left it."""
    file = Path(experiment.before[2]) / "synth.json" if experiment.before else None
    told = json.loads(file.read_text()) if file and file.exists() else {}
    if "tasks" in told:
        return {"auc": {task: values["best_auc"] for task, values in told["tasks"].items()}}
    if "noise" in told:
        return {"r2": {task: 1 - told["noise"] / std**2 for task, std in zip(("y1", "y2"), told["std"], strict=True)}}
    return {}


# ---- docs/results.md ---------------------------------------------------------------------------------------------------


def report(pictures: Path) -> str:
    """All sections whose outcome is there."""
    parts = [
        "# Results",
        "Made by `make results` from logged runs; every figure is of test rows, which have chosen nothing. A value is the mean "
        "over seeds (and folds) with Student's 95 % interval over seeds. ▲ and ▼: ahead of and behind the baseline, by a "
        "bootstrap over test rows (whole users where there are any) and seeds whose 95 % interval does not hold 0. "
        "Training rates are of two trainings at a time, some beside other work: they compare a section's models, no more.",
    ]
    for name, experiment in EXPERIMENTS.items():
        file = pictures / f"{name}.json"
        if file.exists():
            parts += section(name, experiment, json.loads(file.read_text()))
        if experiment.further and (file := pictures / f"{name}-further.json").exists():
            later = json.loads(file.read_text())
            parts += [f"The same models on {later['rows']:,} rows of the same feed that came later:", *tables(later)]
        if experiment.anomalies and (told := pictures / "anomalies-health.md").exists():
            parts += [told.read_text().strip(), "![The worst figures over training](results/anomalies-health.png)"]
    if (language := pictures / "llm.md").exists():
        parts.append(language.read_text().strip())
    parts.append(f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.")
    return "\n\n".join(parts) + "\n"


def section(name: str, experiment: Experiment, found: dict[str, Any]) -> list[str]:
    parts = [
        f"## {experiment.title}",
        experiment.question,
        f"    recsys-moe {shlex.join(found['command'])}",
        *tables(found),
    ]
    costs = [
        f"| {model} | {cost['params']:,} | {cost['flops']:,} | {found['samples_per_s'][model]:,.0f} |"
        for model, cost in found["costs"].items()
        if cost
    ]
    parts.append(
        "\n".join(["| model | dense parameters | FLOPs a sample | samples/s in training |", "|---|---|---|---|", *costs])
    )
    if experiment.published:
        parts.append(experiment.published)
    parts.append(f"![Differences to {found['baseline']}](results/{name}-differences.png)")
    parts.append(f"![Quality against cost](results/{name}-pareto.png)")
    return parts


def tables(found: dict[str, Any]) -> list[str]:
    """What a comparison has found, a table a metric."""
    lines = {(line["model"], line["task"], line["metric"]): line for line in found["lines"]}
    tasks, metrics, models = (list(dict.fromkeys(key[i] for key in lines)) for i in (1, 2, 0))
    made = []
    for metric in metrics:
        columns = [task for task in tasks if any(key[1:] == (task, metric) for key in lines)]
        head = f"| {metric} | " + " | ".join(columns) + " |"
        rows = [f"| {model} | " + " | ".join(cell(lines[model, task, metric]) for task in columns) + " |" for model in models]
        if reachable := found.get("best", {}).get(metric):
            rows.append("| best reachable | " + " | ".join(number(reachable.get(task)) for task in columns) + " |")
        made.append("\n".join([head, "|---" * (len(columns) + 1) + "|", *rows]))
    return made


def cell(line: dict[str, Any]) -> str:
    score, mark = line["score"], {"ahead": " ▲", "behind": " ▼"}.get(line["verdict"], "")
    half = "" if score["low"] is None else f" ± {(score['high'] - score['low']) / 2:.4f}"
    return number(score["value"]) + half + mark


if __name__ == "__main__":
    main()
