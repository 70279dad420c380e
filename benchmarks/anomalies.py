"""HoME's three anomalies of a mixture (arXiv 2408.05430, §1), told by the health that every training run logs of its experts.

    python benchmarks/results.py anomalies                         trains the models as one comparison, then calls
    python benchmarks/anomalies.py COMPARISON docs/results         on that comparison's folder

Writes anomalies-health.json (the figures of each look), anomalies-health.md (a table and what it says, part of docs/results.md)
and anomalies-health.png below the second folder. Thresholds are those of the warnings in training (`recsys_moe.health`).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recsys_moe.health import Health, HealthConfig, PlanHealth, find_anomalies
from recsys_moe.pictures import GREY, PALETTE, drawing, render
from recsys_moe.pipelines.runs import RunFolder

LIMITS = HealthConfig()


@dataclass(frozen=True)
class Measure:
    """An anomaly's figure: `of` a plan's experts or gates, of which the `worst` counts; crossing `limit` is the anomaly."""

    anomaly: str
    title: str
    what: str
    limit: float
    of: Callable[[PlanHealth], Any]
    worst: Callable[[Any], Any]


MEASURES = (
    Measure("collapse", "zero activations of an expert", "experts", LIMITS.zero_rate, lambda plan: plan.zero, np.nanmax),
    Measure(
        "degradation", "a shared expert's weight with one task", "experts", LIMITS.held, lambda plan: plan.holding, np.nanmax
    ),
    Measure(
        "underfitting",
        "weight on own experts, in even shares",
        "gates or experts",
        LIMITS.own_weight,
        lambda plan: plan.own_weight / np.where(plan.own.any(1), plan.even_own_weight, 1.0),
        np.nanmin,
    ),
)
Looks = dict[str, list[dict[int, dict[str, Any]]]]
"""By model, for each seed: by step, each anomaly's worst figure (None: the model has no such thing) and number of findings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="a folder that `recsys-moe compare` made: runs/compare/NAME-DIGEST")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    looks = read(options.comparison)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "anomalies-health.json").write_text(json.dumps(looks, indent=1) + "\n")
    (options.out / "anomalies-health.md").write_text(section(looks))
    with drawing():
        (options.out / "anomalies-health.png").write_bytes(render(draw(looks)))


def read(comparison: Path) -> Looks:
    """The looks of all networks of a comparison, from their runs' events."""
    looks: Looks = {}
    for file in sorted(comparison.glob("cells/*/cell.json")):
        cell = json.loads(file.read_text())
        events = RunFolder(Path(cell["bundle"]).parent).events()
        told = {e["step"]: figures(Health.from_json(e["health"])) for e in events if e["kind"] == "health"}
        looks.setdefault(cell["label"], []).append(told)
    return looks


def figures(health: Health) -> dict[str, Any]:
    """Of each anomaly: the worst figure of all plans, and how many experts or gates have crossed the limit."""
    findings = [finding.anomaly for finding in find_anomalies(health, LIMITS)]
    found = {}
    for m in MEASURES:
        values = np.concatenate([np.ravel(m.of(plan)) for plan in health.plans.values()])
        worst = None if np.isnan(values).all() else round(float(m.worst(values)), 4)
        found[m.anomaly] = {"worst": worst, "found": findings.count(m.anomaly)}
    return found


def section(looks: Looks) -> str:
    """A table of the last looks, of the weights that are kept, and a sentence an anomaly."""
    head = "| model | " + " | ".join(f"{m.anomaly}: {m.title} | found" for m in MEASURES) + " |"
    rows = [
        f"| {model} | " + " | ".join(f"{text(at_end(seeds, m))} | {found_at_end(seeds, m):g}" for m in MEASURES) + " |"
        for model, seeds in looks.items()
    ]
    said = [sentence(looks, m) for m in MEASURES]
    return "\n".join([head, "|---" * (1 + 2 * len(MEASURES)) + "|", *rows, "", *(f"- {line}" for line in said)]) + "\n"


def sentence(looks: Looks, m: Measure) -> str:
    """Which models show the anomaly; the worst figures where none does."""
    showing = {model: found_at_end(seeds, m) for model, seeds in looks.items() if found_at_end(seeds, m)}
    passing = [model for model, seeds in looks.items() if model not in showing and any(found_ever(told, m) for told in seeds)]
    free = [model for model in looks if model not in (*showing, *passing) and at_end(looks[model], m) is not None]
    without = [model for model in looks if model not in (*showing, *passing, *free)]
    parts = [f"`{model}` ends with {count:g} {m.what} found" for model, count in showing.items()]
    parts += [f"`{model}` had some on the way and ends without ({text(at_end(looks[model], m))})" for model in passing]
    if free:
        worst = ", ".join(f"`{model}` ({text(at_end(looks[model], m))})" for model in free)
        parts.append(f"never in {worst}")
    if without:
        parts.append(f"it has no meaning in {', '.join(f'`{model}`' for model in without)}")
    sign = "below" if m.worst is np.nanmin else "above"
    return f"**{m.anomaly}** ({sign} {m.limit:g}): {'; '.join(parts)}."


def at_end(seeds: Sequence[dict[int, dict[str, Any]]], m: Measure) -> float | None:
    """The worst figure of the last look, mean over the seeds."""
    last = [told[max(told)][m.anomaly]["worst"] for told in seeds]
    return None if None in last else float(np.mean(last))


def found_at_end(seeds: Sequence[dict[int, dict[str, Any]]], m: Measure) -> float:
    return float(np.mean([told[max(told)][m.anomaly]["found"] for told in seeds]))


def found_ever(told: dict[int, dict[str, Any]], m: Measure) -> bool:
    return any(look[m.anomaly]["found"] for look in told.values())


def text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw(looks: Looks) -> Figure:
    """The worst figures over training, a panel an anomaly, a line a model: the mean over its seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(MEASURES))
    for axis, m in zip(panels, MEASURES, strict=True):
        for (model, seeds), colour in zip(looks.items(), PALETTE, strict=False):
            steps = sorted(set.intersection(*(set(told) for told in seeds)))
            values = [[told[step][m.anomaly]["worst"] for told in seeds] for step in steps]
            if None not in values[0]:
                axis.plot(steps, np.mean(values, 1), color=colour, marker="o", markersize=3, label=model)
        axis.axhline(m.limit, color=GREY, linestyle="--", linewidth=1)
        axis.set_title(f"{m.anomaly}: {m.title}", fontsize=9)
        axis.set(xlabel="training step", ylim=(0, None))
    panels[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
