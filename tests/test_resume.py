"""A run that was stopped and resumed is, number for number, the run that was not."""

import collections
import json
import os
import random
import signal
from contextlib import nullcontext
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer
import envs.scenarios
from envs import snapshot
from envs.vmas import Vmas
from learner import Learner

QUICK = [
    *("--configs", "vmas_vector", "debug", "--device", "cpu", "--threads", "1"),
    *("--time_limit", "20", "--envs", "4", "--prefill", "120", "--log_every", "80"),
    *("--eval_every", "240", "--save_every", "200", "--eval_episode_num", "3"),
    *("--train_ratio", "4", "--train_restart", "5"),
]
IMAGES = ("--configs", "vmas", "debug", "--task", "vmas_balance", "--image_size", "32")
TIMED = ("fps", "updates_per_second", "memory_host_mib")


def run(logdir: Path, *flags: str) -> None:
    dreamer.main([*QUICK, "--logdir", str(logdir), *flags])


def stop_after(monkeypatch, updates: int) -> None:
    """Have the process get a SIGTERM in the middle of an update."""
    learn = Learner.learn

    def watch(self, recorder):
        metrics = learn(self, recorder)
        if self.updates == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(Learner, "learn", watch)


def untimed(logdir: Path) -> list[dict]:
    lines = (logdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def leaves(value, path=""):
    """Every tensor and number of a checkpoint, by its place."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list | tuple):
        value = list(enumerate(value))
    else:
        return {path: value}
    return {k: v for name, part in value for k, v in leaves(part, f"{path}/{name}").items()}


def check_equal(one: dict, two: dict) -> None:
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys() and len(one) > 10
    for key, value in one.items():
        same = torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
        assert same, key


@pytest.mark.parametrize("flags", [(), IMAGES], ids=["vectors", "images"])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, flags):
    """Twice stopped, in mid-episode and between two reports; both end by a signal to compare all.

    What is compared: metrics, networks, optimisers, random states, rings with their latents,
    simulator, unfinished episodes, recorded episodes.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_after(patch, 28)
        run(whole, *flags)
    for updates in (9, 20, 28):
        with monkeypatch.context() as patch:
            stop_after(patch, updates)
            run(parts, *flags)
    assert len(untimed(whole)) >= 3 and untimed(parts) == untimed(whole)
    for name in ("latest.pt", "moment.pt", "replay.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        for state in (one, two):
            del state["stamp"]
            if name == "moment.pt":
                del state["settings"], state["meter"]["last"], state["folder"]["stamp"]
                for key in TIMED:
                    state["logger"]["numbers"].pop(key, None)
        check_equal(one, two)
    names = [sorted(p.name[-12:] for p in (f / "train_eps").iterdir()) for f in (whole, parts)]
    assert len(names[0]) == len(names[1]) >= 4


def test_a_stopped_run_that_is_resumed_and_killed_records_no_episode_twice(tmp_path, monkeypatch):
    logdir, once = tmp_path / "run", ("--save_every", "100000")
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        run(logdir, *once)
    names = ("latest.pt", "moment.pt", "replay.pt")
    stopped = {name: (logdir / name).read_bytes() for name in names}
    for _ in range(2):  # the second time as if a kill had left only what the first stop wrote
        for name, content in stopped.items():
            (logdir / name).write_bytes(content)
        with monkeypatch.context() as patch:
            stop_after(patch, 24)
            run(logdir, *once)
    episodes = [np.load(path) for path in (logdir / "train_eps").iterdir()]
    distinct = {b"".join(episode[key].tobytes() for key in episode) for episode in episodes}
    assert len(distinct) == len(episodes) > 8


def test_a_run_whose_scenario_was_edited_goes_on_from_its_episodes(tmp_path, monkeypatch, counting):
    logdir, flags = tmp_path / "run", ("--task", f"vmas_{counting}", "--time_limit", "8")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(logdir, *flags)
    text = Path(counting).read_text()
    Path(counting).write_text(text.replace("self.shortest", "self.least"))
    envs.scenarios._run_file.cache_clear()  # as in another process
    with pytest.warns(UserWarning, match="code of vmas_.* has changed .* recorded episodes"):
        run(logdir, *flags, "--steps", "400")
    assert untimed(logdir)[-1]["step"] == 400


MADE = 'self.shortest = kwargs.get("shortest", 3)'
KEEPING = """
        self.config = kwargs
        self.__dict__.update(kwargs)
        for key, value in kwargs.items():
            setattr(self, key, value)"""
UNSAVABLE = """
        self.names, self.odd = numpy.array(["a", "b"]), numpy.array([object(), 1])
        vars(self)[object()] = 1"""
STEPPED = "self.steps += 1"
GROWING = """
        self.log = getattr(self, "log", [])
        self.log.append({"agent": self.world.agents[0], "at": self.steps + 0})"""


@pytest.mark.parametrize(
    ("after", "more", "warning"),
    [
        (MADE, KEEPING, None),
        (MADE, UNSAVABLE, None),
        (STEPPED, GROWING, "simulator has no .* more; going on from the recorded episodes"),
    ],
    ids=["its arguments", "what cannot be saved", "more and more"],
)
def test_whatever_a_scenario_keeps_no_run_is_lost(
    tmp_path, monkeypatch, counting, after, more, warning
):
    text = Path(counting).read_text().replace(after, after + more)
    Path(counting).write_text(f"import numpy\n{text}")
    flags = ("--task", f"vmas_{counting}", "--time_limit", "8", "--scenario.n_agents", "2")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(tmp_path / "run", *flags)
    with pytest.warns(UserWarning, match=warning) if warning else nullcontext():
        run(tmp_path / "run", *flags, "--steps", "400")
    assert untimed(tmp_path / "run")[-1]["step"] == 400


def test_a_simulator_that_cannot_be_saved_costs_no_weights(tmp_path, monkeypatch):
    def refuse(env):
        raise TypeError("no such thing can be saved")

    with monkeypatch.context() as patch:
        patch.setattr(Vmas, "state_dict", refuse)
        stop_after(patch, 9)
        with pytest.warns(UserWarning, match="episodes under way are not saved: no such thing"):
            run(tmp_path / "run")
    run(tmp_path / "run", "--steps", "400")
    assert untimed(tmp_path / "run")[-1]["step"] == 400


@pytest.mark.parametrize("name", ["simple_spread", "sampling", "simple_adversary", "football"])
def test_a_simulator_goes_on_from_plain_data(name, tmp_path):
    """Scenarios with distributions, with links that a reset changes, and with scripted agents."""
    one, two = (Vmas(name, 3, "cpu", seed, 16, 9) for seed in (0, 5))
    for _ in range(6):
        one.step(one.random_action())
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(12):
        rows = [env.step(env.random_action()) for env in (one, two)]
        assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])


class Thing:
    def __init__(self, **fields):
        vars(self).update(fields)


class Mood(Enum):
    GLAD = (1, 0)
    SAD = (0, 1)


def hand_over(one: Thing, two: Thing, folder: Path) -> None:
    torch.save(snapshot.take(one), folder / "x.pt")
    snapshot.put(two, torch.load(folder / "x.pt", weights_only=True))


class Text(str):
    pass


class Count(int):
    pass


def test_a_snapshot_holds_texts_and_numbers_of_classes_of_their_own(tmp_path):
    def build(name, count):
        return Thing(name=Text(name), count=Count(count), both={Text("key"): Count(count)})

    one, two = build("a", 1), build("b", 2)
    hand_over(one, two, tmp_path)
    assert (two.name, two.count, two.both) == ("a", 1, {"key": 1})


def test_a_snapshot_holds_sets_turned_arrays_and_sources_of_random_numbers(tmp_path):
    def build(seed):
        numpy, plain = np.random.default_rng(seed), random.Random(seed)
        tensors = torch.Generator().manual_seed(seed)
        turned = np.arange(seed, seed + 3)[::-1]
        return Thing(numpy=numpy, plain=plain, tensors=tensors, seen={seed}, turned=turned)

    one, two = build(1), build(2)
    numpy, plain, tensors = two.numpy, two.plain, two.tensors
    hand_over(one, two, tmp_path)
    assert two.seen == {1} and two.turned.tolist() == [3, 2, 1]
    assert (two.numpy, two.plain, two.tensors) == (numpy, plain, tensors)  # others may share them
    assert numpy.random() == one.numpy.random() and plain.random() == one.plain.random()
    assert torch.equal(torch.rand(3, generator=tensors), torch.rand(3, generator=one.tensors))


def test_a_snapshot_holds_what_is_no_plain_value_but_can_be_one(tmp_path):
    def build(mood, number, *kept):
        history = collections.deque(map(torch.tensor, kept), maxlen=2)
        return Thing(mood=mood, moods=[mood], number=np.float32(number), history=history)

    one, two = build(Mood.GLAD, 0.1, 1, 2), build(Mood.SAD, 7)
    hand_over(one, two, tmp_path)
    assert two.mood is Mood.GLAD and two.moods == [Mood.GLAD]
    assert two.number == np.float32(0.1) and type(two.number) is np.float32
    assert list(two.history) == [1, 2] and two.history.maxlen == 2


def test_a_snapshot_of_another_build_is_refused():
    one, two = Thing(part=Thing(x=1)), Thing(part=None)
    with pytest.raises(ValueError, match="/part"):
        snapshot.put(two, snapshot.take(one))


def test_tensors_that_share_memory_share_it_afterwards(tmp_path):
    def build(value):
        x = torch.full((3,), value)
        return Thing(a=x, part=Thing(b=x[:2]), items=[Thing(c=1), Thing(c=2)])

    one, two = build(1.0), build(2.0)
    hand_over(one, two, tmp_path)
    two.a += 1
    assert two.part.b.tolist() == [2.0, 2.0] and one.a.tolist() == [1.0] * 3
