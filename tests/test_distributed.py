"""Two ranks on one machine learn as one process does, and the loss of one ends the run clearly."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import distributed
from config import Config, load_config
from learner import Learner
from models import Dreamer, ReturnScale
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


def learn(rank: int, folder: Path, dreamer: Dreamer, batches: list[dict], returns: list) -> None:
    """What a rank leaves behind: the gradients of one update, the weights after three."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    learner = Learner(settings(), dreamer)
    for update in range(3):
        torch.manual_seed(10 * update + rank)
        learner.update(Fixed(batches[rank]), 3, 5)
        if not update:
            grads = [p.grad.clone() for p in dreamer.parameters() if p.grad is not None]
    scale = ReturnScale(1)
    scale.update(returns[rank])
    weights = dreamer.state_dict()
    result = {"grads": grads, "weights": weights, "scale": scale.state_dict()}
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one_process(
    make_world, make_behavior, make_batch, tmp_path
):
    world = make_world()
    dreamer = Dreamer(
        world, make_behavior(world.rssm.feat), None, "mean", settings().loss_scales.as_dict()
    )
    batches, returns = [make_batch(world) for _ in range(2)], [torch.randn(30, 1) for _ in range(2)]
    multiprocessing.spawn(learn, (tmp_path, copy.deepcopy(dreamer), batches, returns), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone, loss = Learner(settings(), dreamer), 0.0
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = loss + dreamer.losses(batch)[0] / 2
    alone._descend(loss, ("model", "behavior"), {})
    expected = [p.grad for p in dreamer.parameters() if p.grad is not None]
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], expected, rtol=1e-4, atol=1e-6)
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key]), key
    scale = ReturnScale(1)
    scale.update(torch.cat(returns))
    for rank in ranks:
        torch.testing.assert_close(rank["scale"], scale.state_dict())


@pytest.mark.parametrize("key", ["envs", "batch_size", "imag_starts"])
def test_totals_are_divided_evenly_or_refused(monkeypatch, key):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"--{key} 7: expected a multiple of the 2 ranks"):
        distributed.join(settings(f"--{key}", "7"))


def test_alone_nothing_is_divided_or_averaged():
    config = settings()
    assert distributed.join(config) is config
    assert distributed.gather("value") == ["value"]


def start(logdir: Path, steps: int) -> subprocess.Popen:
    flags = [
        *("--configs", "vmas_vector", "debug", "--device", "cpu", "--time_limit", "10"),
        *("--envs", "4", "--prefill", "80", "--log_every", "40", "--save_every", "40"),
        *("--eval_every", "100000", "--eval_episode_num", "2", "--probe.envs", "0"),
        *("--logdir", str(logdir), "--steps", str(steps)),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "dreamer.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


def steps(logdir: Path) -> list[int]:
    path = logdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_lost_rank_ends_the_run_and_the_same_command_goes_on(tmp_path):
    process = start(tmp_path, 1_000_000)
    try:
        deadline = time.monotonic() + 120
        while len(steps(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(workers(process)[1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode
    assert "dreamer.py: another rank of this run has ended" in stderr
    reached = torch.load(tmp_path / "latest.pt")["step"]
    process = start(tmp_path, reached + 80)
    assert process.communicate(timeout=120) and process.returncode == 0
    assert steps(tmp_path) == sorted(set(steps(tmp_path)))
    assert steps(tmp_path)[-1] == reached + 80
    assert not (tmp_path / "rank1" / "latest.pt").exists()
