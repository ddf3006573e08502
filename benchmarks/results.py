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
        steps: (P,) those at which every seed was evaluated.
        returns: (S, P).
        minutes: mean wall time of a seed, to its last line.
    """

    task: str
    label: str
    seeds: list[int]
    command: str
    commit: str
    machine: str
    note: str
    steps: np.ndarray
    returns: np.ndarray
    minutes: float

    @property
    def seeds_text(self) -> str:
        """Which seeds, in words."""
        return f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]} alone"

    def at(self, step: int) -> np.ndarray | None:
        """Returns (S,) of the evaluation at a step; None if there was none near it."""
        nearest = np.abs(self.steps - step).argmin()
        return self.returns[:, nearest] if abs(self.steps[nearest] - step) <= NEAR * step else None


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
    logs = [read_metrics(path) for path in paths]
    evaluations = [
        {line["step"]: line["eval_return"] for line in log if "eval_return" in line} for log in logs
    ]
    steps = sorted(set.intersection(*map(set, evaluations)))
    if not steps:
        raise ManifestError(f"run {entry['label']}: no step at which all seeds were evaluated")
    return Run(
        **{key: entry[key] for key in ("task", "label", "seeds", "command", "commit")},
        machine=machines[entry["machine"]],
        note=entry.get("note", ""),
        steps=np.array(steps),
        returns=np.array([[returns[step] for step in steps] for returns in evaluations]),
        minutes=float(np.mean([wall_time(log) for log in logs])) / 60,
    )


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
    targets = task.get("targets", {})
    columns = sorted({*task["at"], *targets})
    head = [f"at {step:,}" for step in columns]
    rows = [[f"**{task['title']}**", *head, "seeds", "minutes a run"], ["---"] * (len(head) + 3)]
    rows += [
        [r.label, *(_cell(r.at(step)) for step in columns), r.seeds_text, f"{r.minutes:,.0f}"]
        for r in runs
    ]
    if targets:
        cells = [f"{targets[step]:g}" if step in targets else "" for step in columns]
        rows.append(["*target*", *cells, "", ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_known(task), *map(_how, runs)])


def _cell(returns: np.ndarray | None) -> str:
    """Interquartile mean and interval of returns (S,); the return itself of one seed."""
    if returns is None:
        return "-"
    mean = number(interquartile_mean(returns))
    if len(returns) == 1:
        return mean
    low, high = bootstrap_interval([returns])
    return f"{mean} [{number(low)}, {number(high)}]"


def _known(task: Mapping) -> list[str]:
    """A line on what others reach, if anything is known."""
    parts = [f"{name} {value:g}" for name, value in task.get("levels", {}).items()]
    for other in task.get("known", []):
        reached = [f"{value:g} at {step:,}" for step, value in other["returns"].items()]
        parts.append(f"{other['label']} {', '.join(reached)} ({other['source']})")
    return [f"* Known: {'; '.join(parts)}."] if parts else []


def _how(run: Run) -> str:
    """A line that says how to repeat a run."""
    note = f"; {run.note}" if run.note else ""
    return f"* {run.label}: `{run.command}` at {run.commit}, {run.machine}{note}."


def number(value: float) -> str:
    """A return with three digits, or all before the point."""
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def fill(text: str, name: str, content: str) -> str:
    """Put content between the two marker comments of a figure, where a text has them."""
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
