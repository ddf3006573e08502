"""Redraw every figure of results and its tables from `runs.yaml` and the files that it names.

    make plots            # or, with benchmarks/requirements.txt: python -m benchmarks.plot

A figure NAME becomes imgs/NAME.png, and appears with its tables in each document that has the
lines `<!-- plots: NAME -->` and `<!-- end of NAME -->`; so does a summary of its headlines between
those for `summary of NAME`.
"""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.equations import draw_equations
from benchmarks.results import (
    ManifestError,
    Run,
    bootstrap_interval,
    fill,
    interquartile_mean,
    load_manifest,
    summary,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "benchmarks/README.md")
COLUMNS = 3  # panels in a row
LEGEND = 70  # letters that fit below a panel
FURTHEST = 1.5  # points are drawn up to so many times the steps of the longest curve
CAPTION = (
    "Thick: interquartile mean over seeds, with its 95 % interval; thin: each seed; dashed: one "
    "seed alone. Returns below a panel's lower edge are in its table."
)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw_figure(path: Path, tasks: Mapping[str, Mapping], runs: Sequence[Run]) -> None:
    """Learning curves, a panel for each task that the runs are of."""
    shown = [name for name in tasks if any(run.task == name for run in runs)]
    labels = list(dict.fromkeys(run.label for run in runs))
    palette = colormaps["tab10" if len(labels) <= 10 else "tab20"].colors
    colours = dict(zip(labels, itertools.cycle(palette), strict=False))  # the same in all panels
    across = min(len(shown), COLUMNS)
    down = -(-len(shown) // across)
    with rc_context(STYLE):
        entries = max(sum(run.task == name for run in runs) for name in shown)
        height = 3.7 * down + 0.2 * (entries + 2)  # a legend may have a line for each
        figure = Figure(figsize=(5 * across, height), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False)
        for axis, name in zip(axes.flat, shown, strict=False):
            draw_panel(axis, tasks[name], [run for run in runs if run.task == name], colours)
        for axis in axes.flat[len(shown) :]:
            axis.axis("off")
        figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_panel(axis: Axes, task: Mapping, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    """The runs of one task, with what they are up against in grey."""
    for run in runs:
        colour, label = colours[run.label], f"{run.label} ({run.seeds_text})"
        if len(run.seeds) == 1:  # no mean and no interval: one run, as it went
            style = {"linewidth": 1.2, "linestyle": "--", "marker": ".", "markersize": 4}
            axis.plot(run.steps, run.returns[0], color=colour, label=label, **style)
            continue
        axis.plot(run.steps, interquartile_mean(run.returns), color=colour, label=label, lw=2)
        for curve in run.curves:  # some seeds go on when others have stopped
            axis.plot(*zip(*sorted(curve.items()), strict=True), color=colour, alpha=0.5, lw=0.8)
        axis.fill_between(
            run.steps, *bootstrap_interval([run.returns]), color=colour, alpha=0.2, linewidth=0
        )
    reach = FURTHEST * max(max(curve) for run in runs for curve in run.curves)
    levels = dict(task.get("levels", {}))
    for marker, other in zip("os^vDP", task.get("known", []), strict=False):
        draw_points(axis, other["returns"], reach, other["label"], marker, "#777777")
        if (last := max(other["returns"])) > reach:
            levels[f"{other['label']} at {last:,}"] = other["returns"][last]
    draw_points(axis, task.get("targets", {}), reach, "aim", "*", "black")
    for name, value in levels.items():
        axis.axhline(value, color="#999999", linewidth=1, linestyle=":")
        style = {"color": "#777777", "size": 8, "ha": "right", "va": "bottom"}
        axis.text(0.99, value, name, transform=axis.get_yaxis_transform(), **style)
    axis.set(title=task["title"], xlabel="environment steps", ylabel="return", xlim=(0, None))
    axis.set_ylim(task.get("ylim"))
    axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:,.0f}k" if step else "0")
    longest = max(len(label) for label in axis.get_legend_handles_labels()[1])
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19)}
    axis.legend(**below, ncols=max(1, LEGEND // longest))


def draw_points(
    axis: Axes, returns: Mapping[int, float], reach: float, label: str, marker: str, colour: str
) -> None:
    """Single returns by step, those that are not too far beyond the curves."""
    if near := [point for point in returns.items() if point[0] <= reach]:
        style = {"linestyle": "", "marker": marker, "markersize": 7, "zorder": 3}
        axis.plot(*zip(*near, strict=True), label=label, color=colour, **style)


def section(picture: str, tasks: Mapping[str, Mapping], runs: Sequence[Run]) -> str:
    """Markdown of a figure and its tables, a table for each task."""
    parts = [f"![Learning curves]({picture})", CAPTION]
    for name, task in tasks.items():
        if of_task := [run for run in runs if run.task == name]:
            parts.append(table(task, of_task))
    return "\n\n".join(parts)


def main(root: Path = ROOT) -> None:
    """Write all figures, then the documents that show them. Raises `ManifestError`."""
    manifest = load_manifest(root / "benchmarks" / "runs.yaml")
    documents = {root / name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    draw_equations(root / "imgs" / "equations.png")
    for name, runs in manifest.figures.items():
        path = root / "imgs" / f"{name}.png"
        draw_figure(path, manifest.tasks, runs)
        for document, text in documents.items():
            picture = Path(os.path.relpath(path, document.parent)).as_posix()
            text = fill(text, f"summary of {name}", summary(manifest.tasks, runs))
            documents[document] = fill(text, name, section(picture, manifest.tasks, runs))
    for document, text in documents.items():
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ManifestError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
