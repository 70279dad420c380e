"""Pictures of a model: its experts' health, how its scores and features do, how it compares. matplotlib, without a screen.

Colours are told apart by the colour-blind too (cividis, PuOr, Okabe and Ito's palette); names from a schema are drawn as they
are, never read as formulas.

Shapes: T tasks, G gates, E experts.
"""

import csv
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from recsys_moe.health import Bools, Floats, Health, PlanHealth

if TYPE_CHECKING:
    from recsys_moe.comparison import Comparison, Line
    from recsys_moe.llm.expert_map import ExpertMap
    from recsys_moe.report import TaskCurve

BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#767676"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)

_CELL = 0.42  # inches: room for two digits


@contextmanager
def drawing() -> Iterator[None]:
    """What is drawn and rendered inside takes text as it is: a `$` opens no formula, and what a font lacks is a box."""
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def render(figure: Figure) -> bytes:
    """The picture as PNG; call it inside of `drawing`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def draw_plan(name: str, plan: PlanHealth, tasks: Sequence[str]) -> Figure:
    """A plan in one picture, an expert a column: what it puts out, who uses it, whose gradient reaches it."""
    experts, held = len(plan.experts), plan.holding
    shared = np.flatnonzero(~np.isnan(held).all(1))
    maps: list[tuple[str, str, Floats, list[str], Bools | None]] = [
        (
            "gate",
            "weight of each gate on each expert, % (in brackets: the experts that it uses, e to the entropy)",
            100 * plan.weight,
            [f"{gate} ({np.exp(h):.1f})" for gate, h in zip(plan.gates, plan.entropy, strict=True)],
            plan.sees,
        )
    ]
    if len(shared):
        gates = [plan.gates[g] for g in shared]
        title = "whose is a shared expert's weight, % of it (degradation: one task has nearly all)"
        maps.append(("gate", title, 100 * held[shared], gates, None))
    gradient = plan.gradient_share
    maps.append(
        (
            "task",
            "where each task's gradient arrives, % of its length (underfitting: not at the task's own experts)",
            100 * gradient,
            list(tasks),
            plan.gradient > 0,
        )
    )
    heights = [1.3, 1.3, *(0.25 + 0.3 * len(labels) for _, _, _, labels, _ in maps)]
    width = max(8.0, 2.6 + _CELL * experts)
    figure = Figure(figsize=(width, sum(heights) + 0.75 * len(heights) + 1.2), layout="constrained")
    figure.suptitle(f"Plan {name!r}: its experts", fontsize=12, fontweight="bold")
    axes: Any = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    place = np.arange(experts)
    _titled(axes[0], "activations that are zero, and units that are so in every row (collapse: nearly all)")
    axes[0].bar(place - 0.2, 100 * plan.zero, 0.4, color=BLUE, label="zero activations")
    axes[0].bar(place + 0.2, 100 * plan.dead, 0.4, color=ORANGE, label="dead units")
    axes[0].set(ylim=(0, 105), ylabel="%")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    _titled(axes[1], "outputs: mean, and standard deviation over the rows (collapse: unlike the others', or none)")
    axes[1].errorbar(place, plan.mean, np.sqrt(plan.variance), fmt="o", color=BLUE, ecolor=SKY, elinewidth=2, markersize=4)
    axes[1].axhline(0, color=GREY, linewidth=0.6)
    axes[1].set(ylabel="output")
    for axis, (what, title, values, labels, shown) in zip(axes[2:], maps, strict=True):
        axis.set_ylabel(what)
        _titled(axis, title)
        _heat(axis, values, labels, shown, high=100)
    axes[-1].set_xticks(place, plan.experts, rotation=90 if experts > 8 else 0, fontsize=8)
    axes[-1].set(xlim=(-0.5, experts - 0.5), xlabel="expert")
    for axis in axes:
        axis.label_outer()
    return figure


def _titled(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)


def _heat(axis: Axes, values: Floats, labels: Sequence[str], shown: Bools | None, high: float) -> None:
    """A heat map with whole numbers in its cells; what is not shown is left empty."""
    missing = np.isnan(values) if shown is None else ~shown | np.isnan(values)
    axis.imshow(np.ma.masked_array(values, missing), cmap="cividis", vmin=0, vmax=high, aspect="auto")
    axis.set_facecolor("#eeeeee")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    for row, column in zip(*np.nonzero(~missing), strict=True):
        value = values[row, column]
        colour = "black" if value > 0.55 * high else "white"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)


def draw_cosines(health: Health) -> Figure:
    """The cosine of each pair of tasks' gradients: below 0 one's progress is the other's loss."""
    tasks = health.tasks
    size = 1.8 + max(0.55 * len(tasks), 2.2)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axis = figure.subplots()
    axis.set_title("Do the tasks pull together?\ncosine of their gradients at the shared representation", fontsize=10)
    image = axis.imshow(health.cosine, cmap="PuOr", vmin=-1, vmax=1)
    axis.set_facecolor("#eeeeee")
    axis.set_xticks(range(len(tasks)), tasks, rotation=90 if len(tasks) > 3 else 0, fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.set(xlabel="task", ylabel="task")
    for row, column in zip(*np.nonzero(~np.isnan(health.cosine)), strict=True):
        value = health.cosine[row, column]
        colour = "white" if abs(value) > 0.7 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, shrink=0.8, label="cosine")
    return figure


def draw_history(name: str, steps: Sequence[int], plans: Sequence[PlanHealth]) -> Figure:
    """A plan over the looks of training: a row for each expert, a line for each gate."""
    first = plans[0]
    high = 0.4 + 0.2 * len(first.experts)
    figure = Figure(figsize=(max(11.0, 4 + 0.75 * len(steps)), 1.8 + high + 2.4), layout="constrained")
    figure.suptitle(f"Plan {name!r} in the course of training", fontsize=12, fontweight="bold")
    (zero, held), (used, own) = figure.subplots(2, 2, height_ratios=[high, 2.4])
    for axis, title, values in (
        (zero, "zero activations, % (collapse: above 90)", [100 * plan.zero for plan in plans]),
        (held, "largest share with one task, % (degradation: above 90)", [100 * _most(plan.holding) for plan in plans]),
    ):
        _titled(axis, title)
        _heat(axis, np.array(values).T, first.experts, None, high=100)
        axis.set_xticks(range(len(steps)), [f"{step:,}" for step in steps], fontsize=8, rotation=45 if len(steps) > 6 else 0)
        axis.set(xlabel="training step", ylabel="expert")
    _lines(used, steps, "experts that a gate uses (e to the entropy)", first.gates, [np.exp(plan.entropy) for plan in plans])
    even = [plan.own_weight / np.maximum(plan.even_own_weight, 1e-12) for plan in plans]
    _lines(own, steps, "weight on its own experts as a multiple of an even share", first.gates, even)
    return figure


def _most(holding: Floats) -> Floats:
    """`[E]`: the largest of each column, NaN where there is none."""
    most: Floats = np.where(np.isnan(holding).all(0), np.nan, np.nan_to_num(holding).max(0))
    return most


def _lines(axis: Axes, steps: Sequence[int], title: str, gates: Sequence[str], values: Sequence[Floats]) -> None:
    """A line for each gate that has a value."""
    _titled(axis, title)
    table = np.array(values)
    there = [i for i in range(len(gates)) if not np.isnan(table[:, i]).all()]
    for number, i in enumerate(there):
        style = ("-", "--", ":", "-.")[number // len(PALETTE) % 4]
        colour = PALETTE[number % len(PALETTE)]
        axis.plot(steps, table[:, i], style, color=colour, marker="o", markersize=3, linewidth=1.2, label=gates[i])
    if not there:
        axis.text(0.5, 0.5, "no gate has experts of its own", transform=axis.transAxes, ha="center", color=GREY)
        axis.set(xticks=[], yticks=[])
        return
    axis.set(ylim=(0, 1.1 * np.nanmax(table)), xlabel="training step", ylabel="experts" if "uses" in title else "multiple")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7, ncols=1 + len(there) // 17)


def draw_health(history: Sequence[tuple[int, Health]]) -> dict[str, Figure]:
    """All pictures of a run's looks, step by step, by a name for their file; those of one look are of the last one."""
    last = history[-1][1]
    figures = {}
    if len(last.tasks) > 1:
        figures["gradient_cosines"] = draw_cosines(last)
    steps = [step for step, _ in history]
    for name, plan in last.plans.items():
        figures[f"experts_{name.replace(' ', '_')}"] = draw_plan(name, plan, last.tasks)
        if len(history) > 1:
            figures[f"training_{name.replace(' ', '_')}"] = draw_history(
                name, steps, [health.plans[name] for _, health in history]
            )
    return figures


def draw_reliability(curves: Sequence["TaskCurve"]) -> Figure:
    """What became of rows of about the same score, task by task."""
    figure, axes = _grid(len(curves), "How far can a score be believed?")
    for axis, curve in zip(axes, curves, strict=True):
        axis.set_title(curve.task, fontsize=10)
        points = curve.points()
        if not points:
            _nothing(axis, "no row observes it")
            continue
        score, label, low, high = (np.array([getattr(p, key) for p in points]) for key in ("score", "label", "low", "high"))
        ends = [min(score.min(), low.min()), max(score.max(), high.max())]
        axis.plot(ends, ends, "--", color=GREY, linewidth=1, label="calibrated")
        axis.errorbar(score, label, [label - low, high - label], fmt="o-", color=BLUE, ecolor=SKY, markersize=4, linewidth=1)
        observed = "share of positive rows" if curve.two_classes else "mean label"
        axis.set(xlabel="mean score", ylabel=observed)
        axis.xaxis.set_major_locator(MaxNLocator(4))  # rare events' scores are long numbers
        rows = sum(p.rows for p in points)
        axis.text(0.03, 0.97, f"{rows:,} rows", transform=axis.transAxes, va="top", fontsize=8)
    return figure


def draw_scores(curves: Sequence["TaskCurve"]) -> Figure:
    """How each task's scores are spread, for rows of either outcome, or beside the labels."""
    figure, axes = _grid(len(curves), "How are the scores spread?")
    for axis, curve in zip(axes, curves, strict=True):
        axis.set_title(curve.task, fontsize=10)
        if not curve.scores.counts.any():
            _nothing(axis, "no row observes it")
            continue
        shown = [(curve.scores, BLUE, "scores"), (curve.labels, ORANGE, "labels")]
        if curve.two_classes:
            shown = [(curve.negatives, BLUE, "negative rows"), (curve.positives, ORANGE, "positive rows")]
        shown = [(spectrum, colour, name) for spectrum, colour, name in shown if spectrum.counts.any()]
        low, high = (pick(s.quantile(share) for s, _, _ in shown) for pick, share in ((min, 0.001), (max, 0.999)))
        edges = np.linspace(low, high if high > low else low + 1, 41)
        for spectrum, colour, name in shown:
            axis.stairs(100 * spectrum.histogram(edges), edges, color=colour, fill=True, alpha=0.35)
            axis.stairs(100 * spectrum.histogram(edges), edges, color=colour, linewidth=1.4, label=name)
        axis.set(xlabel="score" if curve.two_classes else "score or label", ylabel="% of these rows")
        axis.xaxis.set_major_locator(MaxNLocator(4))  # rare events' scores are long numbers
        axis.legend(frameon=False, fontsize=8)
    return figure


def _grid(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, three a row."""
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(max(5.0, 3.7 * columns), 0.6 + 3.1 * rows), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def _nothing(axis: Axes, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", color=GREY)
    axis.set(xticks=[], yticks=[])


SHOWN_FEATURES = 40


def draw_importance(features: Sequence[str], tasks: Sequence[str], qualities: Sequence[str], lost: Floats) -> Figure:
    """What permuting a feature costs a task, the dearest features first, in thousandths of the task's quality."""
    thousandths = 1000 * np.nan_to_num(lost)
    order = np.argsort(-thousandths.max(1), kind="stable")[:SHOWN_FEATURES]
    values = np.where(np.isnan(lost), np.nan, thousandths)[order]
    figure = Figure(figsize=(max(6.5, 3.5 + 0.9 * len(tasks)), 1.9 + 0.24 * len(order)), layout="constrained")
    axis = figure.subplots()
    left_out = f", the {len(order)} dearest" if len(order) < len(features) else ""
    axis.set_title(f"Quality lost when a feature is shuffled, in thousandths{left_out}", fontsize=10)
    # Colours by the square root: beside the dearest feature the others would all look alike.
    most = max(float(np.nanmax(values, initial=0)), 1e-9)
    norm = PowerNorm(0.5, 0, most, clip=True)
    axis.imshow(np.ma.masked_invalid(values), cmap="cividis", norm=norm, aspect="auto")
    axis.set_facecolor("#eeeeee")
    labels = [f"{task}\n({name})" for task, name in zip(tasks, qualities, strict=True)]
    axis.set_xticks(range(len(tasks)), labels, rotation=90 if len(tasks) > 4 else 0, fontsize=8)
    axis.set_yticks(range(len(order)), [_short(features[f]) for f in order], fontsize=8)
    axis.set(xlabel="task", ylabel="feature")
    for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
        value = values[row, column]
        colour = "black" if norm(value) > 0.55 else "white"
        axis.text(column, row, f"{round(value, 1) + 0:.1f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def draw_pareto(comparison: "Comparison") -> Figure:
    """Quality against cost, with the front of what nothing beats on both."""
    from recsys_moe.comparison import MEAN, quality_metric

    task, metric = quality_metric(comparison)
    lines = {model: comparison.of(model, task, metric) for model in comparison.models}
    networks = [m for m, cost in comparison.costs.items() if cost is not None]
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rated = [m for m in networks if comparison.samples_per_s[m]]
    flops = {m: float(comparison.costs[m].flops) for m in networks}  # type: ignore[union-attr]
    _scatter(axes[0], networks, flops, lines, cheaper_is=-1)
    _scatter(axes[1], rated, {m: comparison.samples_per_s[m] for m in rated}, lines, cheaper_is=1)
    axes[0].set_xlabel("FLOPs a sample in scoring (dense part)")
    axes[1].set_xlabel("samples/s in training")
    axes[0].set_ylabel(f"{'mean ' if task == MEAN else task + ' '}{metric.upper()}, test part")
    for axis in axes:
        for model in comparison.models:
            line = lines[model]
            if model not in networks and line is not None:
                axis.axhline(line.score.value, color="0.5", linewidth=1, linestyle="--")
                axis.annotate(
                    model, (0.01, line.score.value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.35"
                )
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    _legend_below(figure, handles, labels)
    figure.suptitle(f"{comparison.data}: quality against cost (bars: 95 % over seeds; line: not beaten on both)")
    return figure


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """As many columns as there is room for: a model's label may be its name or hold all its settings."""
    columns = max(1, int(figure.get_figwidth() * 11 / max((len(label) + 6 for label in labels), default=1)))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def _marker(n: int) -> str:
    """After ten models colours come again, with another marker."""
    return "osD^v"[n // 10 % 5]


def _scatter(
    axis: Any, models: Sequence[str], xs: Mapping[str, Any], lines: Mapping[str, "Line | None"], cheaper_is: int
) -> None:
    points = {m: line.score for m in models if (line := lines[m]) is not None}
    for n, (model, score) in enumerate(points.items()):
        half = 0 if math.isnan(score.high) else (score.high - score.low) / 2
        axis.errorbar(xs[model], score.value, yerr=half, fmt=_marker(n), color=f"C{n % 10}", capsize=3, label=model)
    front = [
        m for m in points
        if not any(points[o].value >= points[m].value and cheaper_is * (xs[o] - xs[m]) > 0 for o in points)
    ]  # fmt: skip
    front.sort(key=lambda m: xs[m])
    axis.plot([xs[m] for m in front], [points[m].value for m in front], color="0.6", linewidth=1, zorder=0)
    costs = [xs[m] for m in points]
    if costs and max(costs) > 3 * min(costs):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))


def draw_differences(comparison: "Comparison") -> Figure:
    """A forest plot: each model's difference to the baseline by task, with its interval; clear ones are filled."""
    from recsys_moe.comparison import quality_metric

    _, metric = quality_metric(comparison)
    first = {line.task: line.metric for line in reversed(comparison.lines)}
    wanted = [(t, metric if comparison.of(comparison.baseline, t, metric) else first[t]) for t in dict.fromkeys(first)]
    wanted.reverse()
    others = [m for m in comparison.models if m != comparison.baseline]
    height = max(2.5, 0.32 * len(wanted) * max(len(others), 1) + 1.4)
    figure = Figure(figsize=(9, height), layout="constrained")
    axis = figure.subplots()
    for n, model in enumerate(others):
        for row, (task, name) in enumerate(wanted):
            line = comparison.of(model, task, name)
            if line is None or line.gap is None:
                continue
            y = row + (n + 0.5) / len(others) * 0.8 - 0.4
            axis.plot([line.gap.low, line.gap.high], [y, y], color=f"C{n % 10}", linewidth=2)
            face = f"C{n % 10}" if line.gap.clear else "white"
            label = model if row == 0 else None
            axis.plot(line.gap.value, y, _marker(n), color=f"C{n % 10}", markerfacecolor=face, label=label)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(wanted)), [f"{task} ({name})" for task, name in wanted])
    axis.invert_yaxis()
    axis.set_xlabel(
        f"difference to {comparison.baseline}, test part (95 %, bootstrap over rows and seeds; filled: 0 lies outside)"
    )
    axis.grid(alpha=0.3, axis="x")
    if others:
        _legend_below(figure, *axis.get_legend_handles_labels())
    return figure


def _short(name: str, letters: int = 40) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def save_health(history: Sequence[tuple[int, Health]], warnings_told: Sequence[str], folder: Path) -> None:
    """A run's pictures as PNG, `experts.csv` with a row for each expert as it was at the end, and `warnings.txt`."""
    folder.mkdir(exist_ok=True)
    with drawing():
        for name, figure in draw_health(history).items():
            (folder / f"{name}.png").write_bytes(render(figure))
    header, rows = history[-1][1].table()
    with (folder / "experts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (folder / "warnings.txt").write_text("".join(f"{message}\n" for message in warnings_told) or "no anomaly\n")


def draw_expert_use(history: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]]) -> Figure:
    """Each layer's load by expert over the steps: 1 is an even share."""
    layers = list(history[-1][1])
    experts = max(len(history[-1][1][layer]["load"]) for layer in layers)
    figure = Figure((2 + 0.3 * max(len(history), 8), 1 + len(layers) * (0.5 + 0.16 * experts)), layout="constrained")
    axes = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axis, layer in zip(axes, layers, strict=True):
        load_es = np.array([looks[layer]["load"] for _, looks in history]).T
        image = axis.imshow(load_es * len(load_es), aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
        axis.set_xticks(range(len(history)), [f"{step:,}" for step, _ in history], rotation=90)
        axis.set_yticks(range(len(load_es)))
        _titled(axis, f"{layer}: load by expert over the steps, in even shares")
    figure.colorbar(image, ax=axes)
    return figure


def save_expert_use(history: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]], folder: Path) -> None:
    """`load.png` and, as it was at the end, `experts.csv`: a row for each expert of each layer."""
    folder.mkdir(exist_ok=True)
    with drawing():
        (folder / "load.png").write_bytes(render(draw_expert_use(history)))
    with (folder / "experts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["layer", "expert", "load", "importance"])
        for layer, figures in history[-1][1].items():
            rows.writerows([layer, e, *both] for e, both in enumerate(zip(figures["load"], figures["importance"], strict=True)))


def draw_expert_map(found: "ExpertMap", token_names: Sequence[str], most: int = 40) -> Figure:
    """Two columns, a row for each layer: the share of each expert in what the commonest tokens and the positions are given to.

    Args:
        token_names: for each token of the vocabulary what is written below its column.
    """
    common = np.argsort(-found.by_token[0].sum(0), kind="stable")[:most]
    layers, experts = found.by_token.shape[:2]
    figure = Figure((13, 1 + layers * (0.9 + 0.2 * experts)), layout="constrained")
    axes = figure.subplots(layers, 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), layer, tokens, places in zip(axes, found.layers, found.by_token, found.by_position, strict=True):
        shares = tokens[:, common] / np.maximum(tokens[:, common].sum(0), 1)
        left.imshow(100 * shares, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        left.set_xticks(range(len(common)), [token_names[token] for token in common], rotation=90)
        image = right.imshow(
            100 * places / np.maximum(places.sum(0), 1), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest"
        )
        for axis, what in ((left, "commonest tokens"), (right, "position in the window")):
            axis.set_yticks(range(experts))
            _titled(axis, f"layer {layer}: expert (down), {what}")
        figure.colorbar(image, ax=right, label="% of the choices")
        figure.colorbar(left.images[0], ax=left)
    return figure
