"""Two ranks on one machine learn as one process does, and the loss of one ends the run clearly."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import distributed
import dreamer
from build import share
from config import Config, load_config
from learner import Learner
from models import Dreamer
from scales import ReturnScale
from tests.test_resume import stop_after
from tools import UserError

ROOT = Path(__file__).parent.parent


class Fixed:
    """Stands for a replay that always gives the same batch."""

    def __init__(self, batch: dict):
        self.batch = batch

    def sample(self, batch: int, length: int) -> tuple[dict, None]:
        return self.batch, None

    def write_back(self, index: None, latents: dict) -> None:
        pass


def settings(*flags: str) -> Config:
    return load_config(["--logdir", "none", *flags], ROOT / "configs.yaml")


def learn(rank: int, folder: Path, team: Dreamer, batches: list[dict], returns: list) -> None:
    """What a rank leaves behind: the gradients of one update, the weights after three, and after a
    fourth in which what the second rank sees is not finite."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    team = copy.deepcopy(team)  # what was handed over lies in memory that both ranks share
    learner = Learner(settings(), team)
    for update in range(3):
        torch.manual_seed(10 * update + rank)
        learner.update(Fixed(batches[rank]), 3, 5)
        if not update:
            grads = [p.grad.clone() for p in team.parameters() if p.grad is not None]
    scale = ReturnScale(1)
    scale.update(returns[rank])
    weights = {key: value.clone() for key, value in team.state_dict().items()}
    spoiled = batches[rank] | ({"agent0": batches[rank]["agent0"] * torch.nan} if rank else {})
    metrics = learner.update(Fixed(spoiled), 3, 5)
    result = {"grads": grads, "weights": weights, "scale": scale.state_dict()}
    result |= {"skipped": bool(metrics["skipped_updates"]), "kept": team.state_dict()}
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one_process(
    make_world, make_behavior, make_batch, tmp_path, monkeypatch
):
    world = make_world()
    team = Dreamer(world, make_behavior(world.feat), None, "mean", settings().loss_scales.as_dict())
    batches, returns = [make_batch(world) for _ in range(2)], [torch.randn(30, 1) for _ in range(2)]
    multiprocessing.spawn(learn, (tmp_path, team, batches, returns), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone, loss = Learner(settings(), team), 0.0
    team.world.update_scales(
        {key: torch.cat([b[key] for b in batches]) for key in ("agent0", "agent1")}
    )
    monkeypatch.setattr(team.world, "update_scales", lambda batch: None)  # once, for both halves
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = loss + team.losses(batch)[0] / 2
    alone._descend(loss, ("model", "behavior"), {})
    expected = [p.grad for p in team.parameters() if p.grad is not None]
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], expected, rtol=1e-4, atol=1e-6)
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), key
        for rank in ranks:
            assert rank["skipped"] and rank["kept"][key].isfinite().all()
            assert "slow_critic" in key or torch.equal(value, rank["kept"][key]), key
    scale = ReturnScale(1)
    scale.update(torch.cat(returns))
    for rank in ranks:
        torch.testing.assert_close(rank["scale"], scale.state_dict())


@pytest.mark.parametrize("key", ["envs", "batch_size", "imag_starts"])
def test_totals_are_divided_evenly_or_refused(key):
    whole = settings(f"--{key}", "6", "--dataset_size", "7")
    parts = [share(whole, rank, 2) for rank in range(2)]
    assert [getattr(part, key) for part in parts] == [3, 3]
    assert [part.dataset_size for part in parts] == [3, 3]
    assert parts[0].seed == whole.seed != parts[1].seed
    with pytest.raises(UserError, match=f"--{key} 7: expected a multiple of the 2 ranks"):
        share(settings(f"--{key}", "7"), 0, 2)


def test_alone_nothing_is_divided_or_averaged():
    config = settings()
    assert share(config, *distributed.started()).as_dict() == config.as_dict()
    assert distributed.join("cpu") == "cpu"
    assert distributed.gather("value") == ["value"]


def test_a_lost_rank_is_reported_though_torchrun_sends_sigterm():
    """The signal may come at any time, also after the loop that waits for signals."""
    code = """
import os, signal
from distributed import RankLost, _together
from tools import GracefulExit

def broken():
    raise RuntimeError("connection closed by peer")

try:
    with GracefulExit():
        _together(broken)
except RankLost as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "another rank of this run has ended" in process.stdout


FLAGS = [
    *("--configs", "vmas_vector", "debug", "--device", "cpu", "--time_limit", "10"),
    *("--envs", "4", "--prefill", "80", "--log_every", "40", "--save_every", "40"),
    *("--eval_every", "100000", "--eval_episode_num", "2", "--probe.envs", "0"),
]


@contextmanager
def two_ranks(logdir: Path) -> Iterator[subprocess.Popen]:
    """The run under torchrun, once it has logged four more lines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "dreamer.py"]
    env, known = os.environ | {"OMP_NUM_THREADS": "1"}, len(steps(logdir))
    process = subprocess.Popen(
        [*command, *FLAGS, "--logdir", str(logdir)],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(steps(logdir)) < known + 4 and process.poll() is None:
            time.sleep(0.2)
        yield process
    finally:
        process.kill()


def steps(logdir: Path) -> list[int]:
    path = logdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def signal_rank(process: subprocess.Popen, rank: int, number: signal.Signals) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[rank]), number)


def saved(logdir: Path) -> dict:
    return torch.load(logdir / "latest.pt", weights_only=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_ranks_come_and_go(tmp_path, monkeypatch):
    """One process is stopped; two go on, and one of them is lost; two are stopped; one goes on."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        dreamer.main([*FLAGS, "--logdir", str(tmp_path)])
    reached = [saved(tmp_path)["step"]]
    assert {"moment.pt", "replay.pt"} < {path.name for path in tmp_path.iterdir()}

    with two_ranks(tmp_path) as process:
        signal_rank(process, 1, signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode
    assert "dreamer.py: another rank of this run has ended" in stderr
    reached.append(saved(tmp_path)["step"])

    with two_ranks(tmp_path) as process:
        signal_rank(process, 1, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    reached.append(saved(tmp_path)["step"])
    assert len(saved(tmp_path)["random"]) == 2
    assert not {"moment.pt", "replay.pt"} & {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (tmp_path / "rank1").iterdir()} == {"train_eps"}

    dreamer.main([*FLAGS, "--logdir", str(tmp_path), "--steps", str(reached[-1] + 40)])
    reached.append(saved(tmp_path)["step"])
    assert len(saved(tmp_path)["random"]) == 1
    assert reached == sorted(set(reached))
    assert steps(tmp_path) == sorted(set(steps(tmp_path))) and steps(tmp_path)[-1] == reached[-1]
