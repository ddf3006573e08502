"""Runs that are killed, and updates that go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learner import PATIENCE, Learner
from models import ImageProbe
from tests.test_resume import run, untimed
from tools import UserError

ROOT = Path(__file__).parent.parent


def test_a_killed_run_goes_on_and_leaves_no_damage():
    """At any moment, in the middle of a checkpoint and of an episode, around a rename."""
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "--faults", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert (counts["lost"], counts["resumed"]) == (0, 6)
    assert counts["killed in a checkpoint"] and counts["killed in an episode"]


def spoil(monkeypatch, updates) -> list[dict]:
    """Make the loss of these updates infinite; returns what was learned before and after each."""
    seen, update = [], Learner.update

    def watch(self, *arguments):
        losses = self.dreamer.losses
        if self.updates in updates:
            bad = lambda data: (losses(data)[0] * torch.inf, *losses(data)[1:])  # noqa: E731
            self.dreamer.losses = bad
        before = {key: value.clone() for key, value in self.dreamer.state_dict().items()}
        metrics = update(self, *arguments)
        self.dreamer.losses = losses
        after = self.dreamer.state_dict()
        still = {
            key: torch.equal(before[key], after[key]) for key in after if "slow_critic" not in key
        }
        assert all(value.isfinite().all() for value in after.values())
        seen.append({"skipped": bool(metrics["skipped_updates"]), "still": all(still.values())})
        return metrics

    monkeypatch.setattr(Learner, "update", watch)
    return seen


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    seen = spoil(monkeypatch, {3, 4})
    run(tmp_path, "--steps", "200", "--probe.envs", "0")
    assert [entry["skipped"] for entry in seen] == [i in (3, 4) for i in range(len(seen))]
    assert [entry["still"] for entry in seen] == [i in (3, 4) for i in range(len(seen))]
    logged = [row["skipped_updates"] for row in untimed(tmp_path) if "skipped_updates" in row]
    assert max(logged) > 0


def test_a_skipped_update_of_the_image_head_is_counted_too(tmp_path, monkeypatch):
    loss = ImageProbe.loss
    monkeypatch.setattr(ImageProbe, "loss", lambda *arguments: loss(*arguments) * torch.inf)
    run(tmp_path, "--steps", "200", "--eval_every", "10000")
    logged = [row["skipped_updates"] for row in untimed(tmp_path) if "image_loss" in row]
    assert logged and all(0 < share < 1 for share in logged)
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["dreamer"].values())


def test_many_in_a_row_end_the_run_with_what_was_seen(tmp_path, monkeypatch):
    spoil(monkeypatch, range(12, 10**6))
    with pytest.raises(UserError, match=r"updates were skipped, .* model_grad_norm.* before") as e:
        run(tmp_path, "--steps", "2000", "--probe.envs", "0", "--eval_every", "10000")
    assert "\n" not in str(e.value) and int(str(e.value).split()[2]) >= PATIENCE
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["dreamer"].values())


def test_broken_observations_neither_poison_nor_crash(tmp_path, monkeypatch):
    """One copy shows NaN now and then: its actions are finite, and only its batches are lost."""
    from envs.vmas import Vmas

    step, calls = Vmas.step, []

    def broken(self, action):
        assert action.isfinite().all()
        row = step(self, action)
        calls.append(1)
        if len(calls) == 20:
            row["agent0"][0, 0], row["agent1"][1, 0] = torch.nan, torch.inf
        return row

    monkeypatch.setattr(Vmas, "step", broken)
    alone = ("--probe.envs", "0", "--eval_every", "10000", "--force_reward", "true")
    run(tmp_path, "--steps", "280", *alone)
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["dreamer"].values())
    with pytest.warns(UserWarning, match=r"skipping .*agent\d holds NaN or infinity"):
        run(tmp_path, "--steps", "320", *alone)


def test_a_full_disk_does_not_stop_the_metrics(tmp_path, monkeypatch):
    def refuse(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools._append", refuse)
    with pytest.warns(UserWarning, match=r"cannot write step 80 .*No space"):
        run(tmp_path, "--steps", "160", "--probe.envs", "0", "--eval_every", "10000")
    assert (tmp_path / "latest.pt").exists() and not (tmp_path / "metrics.jsonl").exists()
