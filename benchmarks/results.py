"""What the runs in `runs.yaml` say: curves over seeds, their statistics, and tables of them.

Symbols: S seeds, P points of a curve, at the environment steps where the team was evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

NEAR = 0.05  # an evaluation counts as one at a step when it is no further away than this share
RUN_KEYS = {"figure", "task", "label", "file", "seeds", "command", "commit", "machine"}
TASK_KEYS = {"title", "at"}


class ManifestError(ValueError):
    """Something in `runs.yaml`, or in a file that it names, is wrong; the message is one line."""


@dataclass(frozen=True)
class Run:
    """One row of a table: the same command with several seeds.

    Attributes:
        baseline: whether another algorithm made it.
        headline: the step at which it stands in the summary; 0 if it does not.
        curves: the return by step, of each seed.
        minutes: wall time for 10,000 steps, evaluations included.
    """

    task: str
    label: str
    seeds: list[int]
    command: str
    commit: str
    machine: str
    note: str
    headline: int
    baseline: bool
    curves: list[dict[int, float]]
    minutes: float

    @property
    def seeds_text(self) -> str:
        """Which seeds, in words."""
        return f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"

    @property
    def steps(self) -> np.ndarray:
        """(P,) those at which every seed was evaluated."""
        return np.array(sorted(set.intersection(*map(set, self.curves))))

    @property
    def returns(self) -> np.ndarray:
        """(S, P) at `steps`."""
        return np.array([[curve[step] for step in self.steps] for curve in self.curves])

    def at(self, step: int) -> np.ndarray:
        """Returns at a step, or near it, of those seeds that got so far."""
        nearest = [min(curve, key=lambda other: abs(other - step)) for curve in self.curves]
        pairs = zip(self.curves, nearest, strict=True)
        return np.array([curve[n] for curve, n in pairs if abs(n - step) <= NEAR * step])


@dataclass(frozen=True)
class Manifest:
    """All of `runs.yaml`: tasks by name, and the runs that each figure shows."""

    tasks: Mapping[str, Mapping]
    figures: Mapping[str, list[Run]]


def load_manifest(path: Path) -> Manifest:
    """Read `runs.yaml` and every file that it names. Raises `ManifestError`."""
    content = YAML(typ="safe", pure=True).load(path)
    for name, task in content["tasks"].items():
        _check_keys(f"task {name}", task, TASK_KEYS)
    figures: dict[str, list[Run]] = {}
    for entry in content["runs"]:
        _check_keys(f"run {entry.get('label')}", entry, RUN_KEYS)
        for key, known in (("task", content["tasks"]), ("machine", content["machines"])):
            if entry[key] not in known:
                raise ManifestError(f"run {entry['label']}: no {key} is called {entry[key]}")
        run = _load_run(entry, path.parent / "runs", content["machines"])
        figures.setdefault(entry["figure"], []).append(run)
    return Manifest(content["tasks"], figures)


def _check_keys(what: str, entry: Mapping, keys: set[str]) -> None:
    if missing := sorted(keys - entry.keys()):
        raise ManifestError(f"{what} lacks {', '.join(missing)}")


def _load_run(entry: Mapping, folder: Path, machines: Mapping[str, str]) -> Run:
    """Read the metrics of every seed, and keep the evaluations that all of them have."""
    paths = [folder / entry["file"].format(seed=seed) for seed in entry["seeds"]]
    if len(set(paths)) < len(paths):
        raise ManifestError(f"run {entry['label']}: several seeds, but one file for all of them")
    logs, shown = [read_metrics(path) for path in paths], entry.get("metric", "eval_return")
    curves = [{line["step"]: line[shown] for line in log if shown in line} for log in logs]
    steps = sum(log[-1]["step"] for log in logs)
    run = Run(
        **{key: entry[key] for key in ("task", "label", "seeds", "command", "commit")},
        machine=machines[entry["machine"]],
        note=entry.get("note", ""),
        headline=entry.get("headline", 0),
        baseline=entry.get("baseline", False),
        curves=curves,
        minutes=sum(map(wall_time, logs)) / steps * 10_000 / 60,
    )
    if not run.steps.size:
        raise ManifestError(f"run {run.label}: no step at which all seeds were evaluated")
    return run


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: {error}") from error


def wall_time(log: Sequence[Mapping]) -> float:
    """Seconds that a run took, evaluations included: `fps` covers all that a line tells of."""
    steps = [0, *(line["step"] for line in log)]
    lines = zip(steps, steps[1:], log, strict=False)
    return sum((now - before) / line["fps"] for before, now, line in lines)


# ---- statistics: the conventions of rliable ------------------------------------------------------


def interquartile_mean(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean without the lowest and the highest quarter, rounded down: of 5, the middle 3."""
    cut = scores.shape[axis] // 4
    middle = np.arange(cut, scores.shape[axis] - cut)
    return np.sort(scores, axis).take(middle, axis).mean(axis)


def bootstrap_interval(
    strata: Sequence[np.ndarray], confidence: float = 0.95, repeats: int = 10_000
) -> np.ndarray:
    """Percentile interval (2, ...) of the interquartile mean of all scores together.

    Args:
        strata: scores (S, ...) of each task; seeds are drawn anew within each, with replacement.
    """
    rng = np.random.default_rng(0)  # the same files give the same interval
    drawn = [scores[rng.integers(len(scores), size=(repeats, len(scores)))] for scores in strata]
    means = interquartile_mean(np.concatenate(drawn, 1), axis=1)
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


# ---- text ----------------------------------------------------------------------------------------


def table(task: Mapping, runs: Sequence[Run]) -> str:
    """Markdown: the runs of one task, what they are up against, and how to repeat each."""
    columns = [
        step
        for step in sorted({*task["at"], *task.get("targets", {})})
        if any(run.at(step).size for run in runs)
    ]
    rows = [["", *(f"{step:,}" for step in columns), "seeds", "minutes / 10,000 steps"]]
    rows.append(["---"] * len(rows[0]))
    rows += [
        [r.label, *(_cell(r.at(step), r) for step in columns), r.seeds_text, f"{r.minutes:.1f}"]
        for r in runs
    ]
    lines = [f"#### {task['title']}", "", *_known(task)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machines = dict.fromkeys(run.machine for run in runs)
    lines += ["", "<details><summary>Commands, commits, machines</summary>", ""]
    lines += [*map(_how, runs), f"* On {'; '.join(machines)}.", "", "</details>"]
    return "\n".join(lines)


def summary(tasks: Mapping[str, Mapping], runs: Sequence[Run]) -> str:
    """Markdown: a line for each run that says at which step it is to be read (`headline`)."""
    lines = ["| | team of Dreamers | after | seeds | random | for comparison |", "|" + " --- |" * 6]
    for run in (run for run in runs if run.headline):
        rivals = [other for other in runs if other.baseline and other.task == run.task]
        lines.append("| " + " | ".join(_headline(tasks[run.task], run, rivals)) + " |")
    return "\n".join(lines)


def _headline(task: Mapping, run: Run, rivals: Sequence[Run]) -> list[str]:
    """The cells of a line of the summary."""
    levels = dict(task.get("levels", {}))
    random = f"{levels.pop('random'):,}" if "random" in levels else "-"
    others = [f"{name} {value:,}" for name, value in levels.items()]
    others += [_then_and_last(rival, run.headline) for rival in rivals]
    what, cell = f"{task['title']}: {run.label}", _cell(run.at(run.headline), run)
    return [what, cell, f"{run.headline:,} steps", run.seeds_text, random, "; ".join(others)]


def _then_and_last(run: Run, step: int) -> str:
    """Where a run stood at a step, or when next evaluated, and where it ended, in words."""
    means = dict(zip(run.steps.tolist(), interquartile_mean(run.returns), strict=True))
    last = max(means)
    shown = dict.fromkeys((min((at for at in means if at >= step), default=last), last))
    return f"{run.label} " + ", ".join(f"{number(means[at])} at {at:,}" for at in shown)


def _cell(returns: np.ndarray, run: Run) -> str:
    """Interquartile mean and interval of the seeds that got so far; how many, if not all."""
    if not returns.size:
        return "-"
    text = number(interquartile_mean(returns))
    if len(returns) > 1:
        low, high = bootstrap_interval([returns])
        text += f" [{number(low)}, {number(high)}]"
    few = f" ({len(returns)} of {len(run.seeds)})" if len(returns) < len(run.seeds) else ""
    return text + few


def _known(task: Mapping) -> list[str]:
    """A paragraph on what others reach and what is aimed at, where anything is known."""
    parts = [f"{name} {value:g}" for name, value in task.get("levels", {}).items()]
    parts += [
        f"{other['label']} {_by_step(other['returns'])} ({other['source']})"
        for other in task.get("known", [])
    ]
    if targets := task.get("targets"):
        parts.append(f"our aim {_by_step(targets)}")
    return [f"For comparison: {'; '.join(parts)}.", ""] if parts else []


def _by_step(returns: Mapping[int, float]) -> str:
    return ", ".join(f"{value:,} at {step:,}" for step, value in returns.items())


def _how(run: Run) -> str:
    """A line that says how to repeat a run."""
    note = f"; {run.note}" if run.note else ""
    return f"* {run.label}: `{run.command}` at {run.commit}{note}."


def number(value: float) -> str:
    """A return with three digits, or all before the point."""
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def fill(text: str, name: str, content: str) -> str:
    """Put content between two marker comments with a name, where a text has them."""
    start, end = f"<!-- plots: {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    if not found:
        return text
    if end not in rest:
        raise ManifestError(f"'{start.strip()}' is not followed by '{end}'")
    return f"{before}{start}\n{content}\n\n{end}{rest.partition(end)[2]}"


def marl_eval(runs: Sequence[Run]) -> dict:
    """The runs in the form that marl-eval reads: a list of one number, the mean, an evaluation.

    The absolute metric is the best evaluation of a run; nothing is evaluated again for it.
    """
    tasks: dict = {}
    for run in runs:
        tasks.setdefault(run.task, {})[run.label] = {
            f"seed_{seed}": {
                **{
                    f"step_{i}": {"step_count": int(step), "return": [float(value)]}
                    for i, (step, value) in enumerate(zip(run.steps, returns, strict=True))
                },
                "absolute_metrics": {"return": [float(returns.max())]},
            }
            for seed, returns in zip(run.seeds, run.returns, strict=True)
        }
    return {"vmas": tasks}
