"""Results: statistics against brute force, what is read from runs, and what is drawn from them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from benchmarks.results import (
    ManifestError,
    bootstrap_interval,
    fill,
    interquartile_mean,
    load_manifest,
    marl_eval,
    summary,
    table,
)

TASK = {
    "title": "task, 2 agents",
    "at": [100, 200],
    "targets": {200: 5},
    "levels": {"random": -1},
    "known": [{"label": "MAPPO", "returns": {150: 2.5}, "source": "somewhere"}],
}


def write_runs(folder: Path, seeds: dict[int, list], **changes) -> Path:
    """A manifest of one run with `(step, return)` pairs by seed; returns its path."""
    entry = {"figure": "returns", "task": "task", "label": "team", "file": "team-s{seed}.jsonl"}
    entry |= {"seeds": list(seeds), "command": "python dreamer.py", "commit": "abc", "machine": "m"}
    (folder / "runs").mkdir(parents=True)
    for seed, points in seeds.items():
        lines = [{"step": s, "fps": 2.0} | ({"eval_return": r} if r else {}) for s, r in points]
        text = "\n".join(map(json.dumps, lines))
        (folder / "runs" / f"team-s{seed}.jsonl").write_text(text)
    manifest = {"machines": {"m": "a machine"}, "tasks": {"task": TASK}, "runs": [entry | changes]}
    YAML(typ="safe", pure=True).dump(manifest, folder / "runs.yaml")
    return folder / "runs.yaml"


@pytest.mark.parametrize(
    ("scores", "mean"),
    [([4], 4), ([9, 0, 3], 4), ([100, 1, 2, -50], 1.5), ([0, 9, 1, 2, 3], 2)],
)
def test_interquartile_mean_drops_a_quarter_at_each_end(scores: list, mean: float) -> None:
    assert interquartile_mean(np.array(scores, float)) == mean


def test_interval_is_that_of_all_possible_draws() -> None:
    scores = np.random.default_rng(1).normal(size=(5, 2))
    draws = [interquartile_mean(scores[list(i)]) for i in itertools.product(range(5), repeat=5)]
    exact = np.quantile(draws, [0.025, 0.975], axis=0)
    assert np.abs(bootstrap_interval([scores]) - exact).max() < 0.03
    assert (exact[1] - exact[0]).min() > 0.5


def test_each_task_keeps_its_share_of_the_draws() -> None:
    # Drawn without regard to tasks, the interval would span from 0 to 10.
    low, high = bootstrap_interval([np.zeros(4), np.full(4, 10.0)])
    assert low == high == 5


def test_curve_has_the_steps_that_all_seeds_share(tmp_path: Path) -> None:
    path = write_runs(tmp_path, {0: [(50, None), (100, 1), (200, 2)], 1: [(100, 3), (300, 4)]})
    (run,) = load_manifest(path).figures["returns"]
    assert run.steps.tolist() == [100] and run.returns.tolist() == [[1], [3]]
    assert run.minutes == pytest.approx(10_000 / 2.0 / 60)


def test_table_has_intervals_and_says_how_many_seeds_got_so_far(tmp_path: Path) -> None:
    path = write_runs(tmp_path, {s: [(101, 1.0 + s), (150, 2)] for s in range(3)})
    lines = table(TASK, load_manifest(path).figures["returns"]).splitlines()
    known = "For comparison: random -1; MAPPO 2.5 at 150 (somewhere); our aim 5 at 200."
    assert lines[:4] == ["#### task, 2 agents", "", known, ""]
    assert lines[4] == "|  | 100 | seeds | minutes / 10,000 steps |"
    assert lines[6] == "| team | 2.00 [1.00, 3.00] | seeds 0, 1, 2 | 83.3 |"
    assert lines[10:] == [
        "* team: `python dreamer.py` at abc.",
        "* On a machine.",
        "",
        "</details>",
    ]
    path = write_runs(tmp_path / "more", {0: [(100, 1), (198, 4)], 1: [(100, 1)]})
    row = table(TASK, load_manifest(path).figures["returns"]).splitlines()[6]
    assert row == "| team | 1.00 [1.00, 1.00] | 4.00 (1 of 2) | seeds 0, 1 | 83.3 |"


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    path = write_runs(tmp_path, {7: [(100, -1234.5)]})
    row = table(TASK, load_manifest(path).figures["returns"]).splitlines()[6]
    assert row == "| team | -1,234 | seed 7 | 83.3 |"


def test_summary_has_the_runs_with_a_headline_at_their_step(tmp_path: Path) -> None:
    task = TASK | {"levels": {"random": -1_000, "scripted": 0.5}}
    path = write_runs(tmp_path, {0: [(100, 1), (198, 4)]}, headline=200)
    runs = load_manifest(path).figures["returns"]
    ours, others = "4.00 | 200 steps | seed 0", "-1,000 | scripted 0.5"
    row = f"| task, 2 agents: team | {ours} | {others} |"
    assert summary({"task": task}, runs).splitlines()[2:] == [row]
    path = write_runs(tmp_path / "other", {3: [(100, 1), (210, 9), (300, 2)]}, baseline=True)
    runs += load_manifest(path).figures["returns"]
    assert "; team 9.00 at 210, 2.00 at 300 |" in summary({"task": task}, runs)
    path = write_runs(tmp_path / "none", {0: [(100, 1)]})
    assert len(summary({"task": task}, load_manifest(path).figures["returns"]).splitlines()) == 2


def test_another_metric_can_be_the_return_that_is_shown(tmp_path: Path) -> None:
    path = write_runs(tmp_path, {0: [(100, 7)]}, metric="fps")
    assert load_manifest(path).figures["returns"][0].returns.tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "none-s{seed}.jsonl"}, "none-s0.jsonl"),
        ({"file": "team-s0.jsonl"}, "one file for all"),
        ({"task": "tusk"}, "no task is called tusk"),
        ({"machine": "n"}, "no machine is called n"),
    ],
)
def test_mistakes_in_the_manifest_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_runs(tmp_path, {0: [(100, 1)], 1: [(100, 1)]}, **changes)
    with pytest.raises(ManifestError, match=message):
        load_manifest(path)


def test_fill_replaces_only_what_is_between_the_markers() -> None:
    text = "a\n<!-- plots: x -->\nold\n<!-- end of x -->\nb\n"
    once = fill(text, "x", "new")
    assert once == "a\n<!-- plots: x -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert fill(once, "x", "new") == once and fill(text, "y", "new") == text
    with pytest.raises(ManifestError, match="not followed"):
        fill("<!-- plots: x -->\n", "x", "new")


def test_export_has_the_structure_of_marl_eval(tmp_path: Path) -> None:
    path = write_runs(tmp_path, {0: [(100, 3), (200, 2)], 4: [(100, 5), (200, 6)]})
    exported = marl_eval(load_manifest(path).figures["returns"])
    assert exported["vmas"]["task"]["team"]["seed_4"] == {
        "step_0": {"step_count": 100, "return": [5.0]},
        "step_1": {"step_count": 200, "return": [6.0]},
        "absolute_metrics": {"return": [6.0]},
    }
    json.dumps(exported)


def test_shown_tables_are_those_of_the_runs() -> None:
    """What `make plots` would write stands in the documents."""
    root = Path(__file__).resolve().parent.parent
    manifest = load_manifest(root / "benchmarks" / "runs.yaml")
    shown = "".join((root / name).read_text() for name in ("README.md", "benchmarks/README.md"))
    for name, runs in manifest.figures.items():
        if any(run.headline for run in runs):
            assert summary(manifest.tasks, runs) in shown
        assert (root / "imgs" / f"{name}.png").exists()
        for task in {run.task for run in runs}:
            assert table(manifest.tasks[task], [r for r in runs if r.task == task]) in shown


def test_plots_are_drawn_twice_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs benchmarks/requirements.txt")
    from benchmarks.plot import main

    write_runs(tmp_path / "benchmarks", {s: [(100, s), (200, 2)] for s in range(1, 4)})
    (tmp_path / "imgs").mkdir()
    markers = "<!-- plots: returns -->\n<!-- end of returns -->\n"
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).write_text(markers)
    outcomes = []
    for _ in range(2):
        main(tmp_path)
        files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        outcomes.append([path.read_bytes() for path in files])
    assert outcomes[0] == outcomes[1]
    assert "](imgs/returns.png)" in (tmp_path / "README.md").read_text()
    assert "](../imgs/returns.png)" in (tmp_path / "benchmarks" / "README.md").read_text()
