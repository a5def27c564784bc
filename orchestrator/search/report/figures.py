"""The figures of a search, drawn as SVG; matplotlib is imported with the first figure.

Each function in FIGURES draws one figure, or returns None if there is nothing to show, such as a
single value in a comparison.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.job.labels import label_text
from orchestrator.search.report.facts import SearchFacts, init_label
from orchestrator.search.state.trials import TrialRecord, TrialStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#B8A000")
MARKERS = "osD^vP*X"
WIDTH, HEIGHT = 4.6, 3.2  # inches: about the actual size on a narrow screen
MOST_LABELS = 20  # a confusion matrix of more labels would not be legible
STATUS: Mapping[str, str] = {
    TrialStatus.FINISHED: "#0072B2",
    TrialStatus.STOPPED: "#9A9A9A",
    TrialStatus.FAILED: "#D55E00",
}
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6, "legend.fontsize": 8, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def curves(facts: SearchFacts) -> Figure | None:
    """Draw the validation metric over steps: trials thin, the winner thick, baselines dashed."""
    if not any(trial.points for trial in facts.trials):
        return None
    figure, axes = _figure()
    winner = facts.winner
    for trial in facts.trials:
        points = trial.curve(facts.metric)
        if points and trial is not winner:
            colour = STATUS.get(trial.status, "#9A9A9A")
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                alpha=0.55,
                linewidth=0.9,
                marker=".",
                markersize=3,
            )
    if winner is not None:
        points = winner.curve(facts.metric)
        axes.plot(
            *zip(*points, strict=True), color="#009E73", linewidth=2.4, label=f"best, {winner.id}"
        )
    for number, (name, found) in enumerate(facts.baselines.items()):
        value = found["validation"].get(facts.metric)
        if value is not None:
            label = {"zero_shot": "without a prompt", "few_shot": "few examples"}.get(name, name)
            axes.axhline(
                value, color="#444444", linestyle=("--", ":")[number % 2], linewidth=1, label=label
            )
    for status in sorted({trial.status for trial in facts.trials if trial.points}):
        axes.plot([], [], color=STATUS.get(status, "#9A9A9A"), label=status)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {facts.metric}")
    axes.legend()
    return figure


def _against_rate(
    facts: SearchFacts, key: Callable[[TrialRecord], str], what: str
) -> Figure | None:
    """Draw the best metric over the learning rate, with a colour for each group of trials."""
    groups = {key(trial) for trial in facts.scored}
    if len({trial.spec.learning_rate for trial in facts.scored}) < 2 or groups == {""}:
        return None
    figure, axes = _figure()
    for place, (label, trials) in enumerate(_grouped(facts.scored, key).items()):
        axes.scatter(
            [trial.spec.learning_rate for trial in trials],
            [trial.metrics[facts.metric] for trial in trials],
            color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)], s=22,
            label=label, alpha=0.85,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"best validation {facts.metric}")
    axes.legend(title=what, ncols=2 if len(facts.scored) > 12 else 1)
    return figure


def rate_by_init(facts: SearchFacts) -> Figure | None:
    """Draw the best metric over the learning rate, by init."""
    return _against_rate(facts, lambda trial: init_label(trial.spec) or trial.spec.method, "init")


def rate_by_length(facts: SearchFacts) -> Figure | None:
    """Draw the best metric over the learning rate, by the size of the trial."""
    return _against_rate(facts, lambda trial: facts.size_label(trial.spec), "length")


def _ablation(facts: SearchFacts, key: Callable[[TrialRecord], str], what: str) -> Figure | None:
    """Draw the best metrics of each group of trials, with their mean and standard deviation."""
    groups = _grouped(facts.scored, key)
    if len(groups) < 2:
        return None
    figure, axes = _figure(max(HEIGHT * 0.7, 0.5 + 0.42 * len(groups)))
    for place, trials in enumerate(groups.values()):
        values = [trial.metrics[facts.metric] for trial in trials]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(
            statistics.fmean(values),
            place,
            xerr=spread,
            fmt="D",
            color="#222222",
            markersize=5,
            capsize=3,
            zorder=3,
        )
        for trial, value in zip(trials, values, strict=True):
            seed = sorted({it.spec.seed for it in facts.scored}).index(trial.spec.seed)
            axes.scatter(
                value,
                place + 0.18,
                color=COLOURS[seed % len(COLOURS)],
                s=16,
                alpha=0.8,
                linewidths=0,
            )
    axes.set_yticks(
        range(len(groups)),
        [f"{label.strip()} (n={len(trials)})" for label, trials in groups.items()],
    )
    axes.set_ylim(-0.6, len(groups) - 0.2)
    axes.set_xlabel(
        f"best validation {facts.metric}\n"
        "mean and standard deviation; a dot a trial, a colour a seed"
    )
    axes.set_ylabel(what)
    return figure


def init_ablation(facts: SearchFacts) -> Figure | None:
    """Draw the best metrics by init."""
    return _ablation(facts, lambda trial: init_label(trial.spec) or trial.spec.method, "init")


def length_ablation(facts: SearchFacts) -> Figure | None:
    """Draw the best metrics by the size of the trial."""
    what = "virtual tokens" if facts.size_name == "tokens" else facts.size_name
    return _ablation(facts, lambda trial: facts.size_label(trial.spec, named=False), what)


def parallel(facts: SearchFacts) -> Figure | None:
    """Draw each trial as a line through its configuration to its metric; brighter is better."""
    if len(facts.scored) < 2:
        return None
    columns: list[tuple[str, list[float], list[tuple[float, str]]]] = [
        *(
            [_named_axis("init", inits)]
            if any(inits := [init_label(trial.spec) for trial in facts.scored])
            else []
        ),
        _named_axis(
            facts.size_name, [facts.size_label(trial.spec, named=False) for trial in facts.scored]
        ),
        *(
            [_scaled_axis("log lr", rates, lambda x: f"{10**x:.2g}")]
            if (rates := _log_rates(facts))
            else []
        ),
        _named_axis("seed", [f"{trial.spec.seed:>10}" for trial in facts.scored]),
        _scaled_axis(
            facts.metric,
            [trial.metrics[facts.metric] for trial in facts.scored],
            lambda x: f"{x:.3g}",
        ),
    ]
    figure, axes = _figure()
    axes.grid(False)
    order = range(len(facts.scored) - 1, -1, -1)  # the best is drawn last
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    for place in order:
        share = 1 - place / max(1, len(facts.scored) - 1)
        heights = [values[place] for _, values, _ in columns]
        axes.plot(
            range(len(columns)),
            heights,
            color=shades(0.05 + 0.85 * share),
            alpha=0.35 + 0.6 * share,
            linewidth=1.2,
        )
    for x, (_, _, ticks) in enumerate(columns):
        axes.axvline(x, color="#999999", linewidth=0.8)
        for height, label in ticks:
            axes.annotate(
                label.strip(), (x, height), xytext=(2, 2), textcoords="offset points", fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [name for name, _, _ in columns])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.55)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _log_rates(facts: SearchFacts) -> list[float]:
    """Return the decimal logarithms of the learning rates; none if trials train nothing."""
    rates = [trial.spec.learning_rate for trial in facts.scored]
    return [math.log10(rate) for rate in rates] if all(rates) else []


def _named_axis(
    name: str, labels: Sequence[str]
) -> tuple[str, list[float], list[tuple[float, str]]]:
    """Place labels on an axis: its name, the trials' heights in [0, 1], and the ticks."""
    names = sorted(set(labels))
    height = {label: (place + 0.5) / len(names) for place, label in enumerate(names)}
    return name, [height[label] for label in labels], [(height[label], label) for label in names]


def _scaled_axis(
    name: str, values: Sequence[float], text: Callable[[float], str]
) -> tuple[str, list[float], list[tuple[float, str]]]:
    """Place numbers on a linear axis: its name, the trials' heights in [0, 1], and the ticks."""
    low, high = min(values), max(values)
    if low == high:
        return name, [0.5] * len(values), [(0.5, text(low))]
    heights = [0.02 + 0.95 * (value - low) / (high - low) for value in values]
    return name, heights, [(0.02, text(low)), (0.97, text(high))]


def confusion(facts: SearchFacts) -> Figure | None:
    """Draw the confusion matrix of the winner on the test rows."""
    matrix = (facts.result or {}).get("best", {}).get("confusion")
    if not matrix or len(matrix["labels"]) > MOST_LABELS:
        return None
    labels, rows = [label_text(label)[:14] for label in matrix["labels"]], matrix["counts"]
    figure, axes = _figure(max(HEIGHT, 0.3 * len(labels) + 1.2))
    axes.grid(False)
    shares = [[count / max(1, sum(row)) for count in row] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for true, row in enumerate(rows):
        for said, count in enumerate(row):
            dark = shares[true][said] > 0.55
            axes.text(
                said,
                true,
                str(count),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "#222222",
            )
    axes.set_xticks(range(len(labels)), labels, rotation=35 if len(labels) > 4 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("said")
    axes.set_ylabel("true label")
    return figure


def cost(facts: SearchFacts) -> Figure | None:
    """Draw the seconds of each part of the search, and how many steps the trials took.

    The planned seconds are shown beside the total if there was a plan.
    """
    seconds = {name: value for name, value in (facts.result or {}).get("seconds", {}).items()
               if name not in ("total", "startup", "training") and value > 0}  # fmt: skip
    if not seconds:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(seconds) + 1.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[0.26 * len(seconds) + 0.5, 1.2])
    above.barh(range(len(seconds)), list(seconds.values()), color=COLOURS[0])
    above.set_yticks(range(len(seconds)), list(seconds))
    above.invert_yaxis()
    planned = (facts.result or {}).get("plan", {}).get("seconds", {}).get("total")
    total = facts.result["seconds"]["total"] if facts.result else 0.0
    against = f", planned {planned:.0f}" if planned else ""
    above.set_xlabel(f"seconds ({total:.0f} in all{against})")
    for status, trials in _grouped(facts.trials, lambda trial: trial.status).items():
        steps = sorted((trial.step for trial in trials if trial.points), reverse=True)
        if steps:
            below.plot(
                range(1, len(steps) + 1),
                steps,
                marker=".",
                color=STATUS.get(status, "#9A9A9A"),
                label=status,
            )
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlabel("trials")
    below.set_ylabel("steps taken")
    below.legend()
    return figure


def method_bytes(facts: SearchFacts) -> Figure | None:
    """Draw the best metric over the bytes to store for the task, by method, in a mixed search."""
    trials = [trial for trial in facts.scored if trial.costs.stored_bytes]
    if not facts.job.mixes or not trials:
        return None
    figure, axes = _figure()
    for place, (method, of_method) in enumerate(_grouped(trials, _method).items()):
        axes.scatter(
            [trial.costs.stored_bytes for trial in of_method],
            [trial.metrics[facts.metric] for trial in of_method],
            color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)], s=22,
            label=method, alpha=0.85,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("bytes to store for the task")
    axes.set_ylabel(f"best validation {facts.metric}")
    axes.legend(title="method")
    return figure


def _method(trial: TrialRecord) -> str:
    return trial.spec.method


def _grouped(
    trials: Sequence[TrialRecord], key: Callable[[TrialRecord], str]
) -> dict[str, list[TrialRecord]]:
    """Group the trials by key, in the order of the keys."""
    groups: dict[str, list[TrialRecord]] = {}
    for trial in sorted(trials, key=key):
        groups.setdefault(key(trial), []).append(trial)
    return groups


FIGURES: dict[str, tuple[str, Callable[[SearchFacts], Figure | None]]] = {
    "curves": ("Metric over steps, all trials", curves),
    "rate_by_init": ("Against the learning rate, by init", rate_by_init),
    "rate_by_length": ("Against the learning rate, by length", rate_by_length),
    "init_ablation": ("Init, with the spread over seeds", init_ablation),
    "length_ablation": ("Length, with the spread over seeds", length_ablation),
    "parallel": ("Configurations", parallel),
    "confusion": ("The winner's answers on the test rows", confusion),
    "cost": ("Cost", cost),
}
"""The figures of every search, each with its title."""
MIXED_FIGURES: dict[str, tuple[str, Callable[[SearchFacts], Figure | None]]] = {
    "method_bytes": ("Metric against stored bytes, by method", method_bytes),
}
"""The figures that only a search of several methods has besides."""
ALL_FIGURES = FIGURES | MIXED_FIGURES


def draw(facts: SearchFacts, names: Collection[str] = tuple(ALL_FIGURES)) -> dict[str, bytes]:
    """Draw the figures that have something to show, as SVG by name."""
    import matplotlib

    found: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        for name in names:
            _, function = ALL_FIGURES[name]
            if (figure := function(facts)) is not None:
                stream = io.BytesIO()
                figure.savefig(stream, format="svg", metadata={"Date": None})
                found[name] = stream.getvalue()
    return found
