"""Device, metrics, videos, progress, random states and signals."""

import io
import json
import os
import random
import signal
import stat
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tools
from checkpoint import load_checkpoint, save_checkpoint
from gifs import encode_gif
from tests.test_gifs import decoded
from tools import (
    GracefulExit,
    Logger,
    Progress,
    UserError,
    get_random_state,
    replacing,
    resolve_device,
    set_random_state,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def lines_of(logdir):
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def events_of(logdir):
    return EventAccumulator(str(logdir)).Reload()


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu", "", "cpu:x"):
        with pytest.raises(UserError, match=r"only auto, cpu$"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"no device 'cuda:2' here, only auto, cpu, .*cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("device", DEVICES)
def test_logger_averages_numbers_and_tensors(tmp_path, device):
    log = Logger(tmp_path / "new" / "run")
    moving = torch.tensor(2.0, device=device, requires_grad=True)
    log.scalars({"loss": moving, "count": torch.tensor(3, device=device), "number": 1})
    with torch.no_grad():
        moving += 2  # the logger keeps the value that it was given
    log.scalars({"loss": moving, "count": torch.tensor(5, device=device), "number": np.float32(2)})
    log.scalars({"loss": 9})
    log.scalars({"half": torch.tensor(0.5, dtype=torch.bfloat16, device=device)})
    log.scalars({"flag": torch.tensor(True, device=device)})
    expected = {"number": 1.5, "loss": 5.0, "count": 4.0, "half": 0.5, "flag": 1.0}
    assert log.write(10) == expected
    log.scalars({"loss": 1})
    assert log.write(20) == {"loss": 1.0}  # nothing is left over
    assert log.write(30) == {}
    log.close()
    assert lines_of(tmp_path / "new" / "run") == [{"step": 10, **expected}, {"step": 20, "loss": 1}]


def test_logger_keeps_values_that_are_not_finite_out_of_the_json(tmp_path):
    log = Logger(tmp_path)
    log.scalars({"nan": torch.tensor(float("nan")), "inf": float("inf"), "fine": 1.0})
    means = log.write(1)
    log.close()
    assert np.isnan(means["nan"])
    assert means["inf"] == float("inf")
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, ')
    assert lines_of(tmp_path) == [{"step": 1, "nan": None, "inf": None, "fine": 1.0}]


def test_logger_averages_many_values_without_drift(tmp_path):
    log = Logger(tmp_path)
    for _ in range(5000):
        log.scalars({"return": torch.tensor(0.1)})
    assert log.write(1)["return"] == pytest.approx(0.1, abs=1e-7)
    log.close()


def test_logger_refuses_what_is_no_scalar(tmp_path):
    log = Logger(tmp_path)
    with pytest.raises(ValueError, match=r"0-d tensors, got \(3,\) in \['loss'\]"):
        log.scalars({"loss": torch.zeros(3)})
    log.close()


@needs_gpu
def test_logger_waits_for_the_gpu_only_to_write(tmp_path):
    log = Logger(tmp_path)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in torch.arange(6.0, device="cuda"):
            log.scalars({"a": value, "b": value.double(), "number": 1.0})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert log.write(1) == {"number": 1.0, "a": 2.5, "b": 2.5}
    log.close()


def test_logger_transfers_once(tmp_path, monkeypatch):
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: transfers.append(1) or original(t))
    for name in ("item", "cpu", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a transfer of its own"))
    log = Logger(tmp_path)
    for i in range(4):
        log.scalars({f"agent{i}_actor_entropy": torch.tensor(i), "loss": torch.tensor(0.5)})
    assert not transfers
    assert log.write(1)["agent3_actor_entropy"] == 3
    assert len(transfers) == 1
    log.close()


def test_tensorboard_gets_the_same_scalars_and_the_video(tmp_path):
    frames = torch.randint(0, 255, (4, 8, 6, 3), dtype=torch.uint8)
    log = Logger(tmp_path)
    log.scalars({"agent0_actor_entropy": 0.25, "kl": torch.tensor(1.5)})
    log.video("train_openl", frames)
    log.video("eval/policy", frames.numpy().repeat(60, axis=0), fps=5)
    log.write(7)
    log.write(8)
    log.close()
    events = events_of(tmp_path)
    for name, value in {"agent0_actor_entropy": 0.25, "kl": 1.5}.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(7, value)]
    (image,) = events.Images("train_openl")
    assert (image.step, image.height, image.width) == (7, 8, 6)
    assert image.encoded_image_string == (tmp_path / "train_openl.gif").read_bytes()
    assert np.array_equal(decoded(image.encoded_image_string), frames.numpy())
    long = Image.open(tmp_path / "eval_policy.gif")
    duration = sum(frame.info["duration"] for frame in ImageSequence.Iterator(long))
    assert duration == 200 * 1000 / 5  # the first 200 frames, equal ones merged
    assert lines_of(tmp_path) == [{"step": 7, "agent0_actor_entropy": 0.25, "kl": 1.5}]


def test_video_keeps_the_frames_it_was_given(tmp_path):
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    log = Logger(tmp_path)
    log.video("clip", frames)
    frames += 9
    log.write(1)
    log.close()
    assert not decoded((tmp_path / "clip.gif").read_bytes()).any()


def test_resumed_logger_drops_what_the_checkpoint_does_not_know(tmp_path):
    log = Logger(tmp_path)
    for step in (10, 20, 30):
        log.scalars({"kl": step})
        log.write(step)
    log.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 15, "kl\n\xff\x00\n[1]\n{"kl": 3}\n{"step": 12}')
    time.sleep(1)  # TensorBoard reads files of one second by their number, the 10th before the 9th
    log = Logger(tmp_path, step=20)
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 20]
    log.scalars({"kl": 25})
    log.write(25)
    log.close()
    assert lines_of(tmp_path) == [{"step": s, "kl": float(s)} for s in (10, 20, 25)]
    assert [event.step for event in events_of(tmp_path).Scalars("kl")] == [10, 20, 25]
    assert not list(tmp_path.glob("*.tmp"))


def test_resumed_logger_leaves_a_whole_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "kl": null}\n')
    before = path.stat().st_ino
    Logger(tmp_path, step=3).close()
    assert path.stat().st_ino == before


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 4, 4, 3, dtype=torch.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"expected \(T, H, W, 3\) uint8"):
        encode_gif(frames, 15)
    log = Logger(tmp_path)
    with pytest.raises(ValueError, match=r"expected \(T, H, W, 3\) uint8"):
        log.video("clip", frames)
    log.close()


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and may go away."""

    gone = False

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise BrokenPipeError
        return super().write(text)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(tools.time, "monotonic", lambda: self.now)


def test_progress_prints_a_line_an_interval(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    progress = Progress(10_000, step=500, every=1000, updates=5)
    for step in range(600, 3001, 100):
        clock.now += 0.5
        progress.update(step, updates=step // 100, **({"train_return": -1.5} if step > 900 else {}))
    clock.now += 5
    progress.update(3500, updates=35)
    progress.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1,000 of 10,000",
        "step 2,000 of 10,000",
        "step 3,000 of 10,000",
        "step 3,500 of 10,000",
    ]
    assert lines[0].endswith("200 steps/s | eta 00:45 | updates/s 2 | train_return -1.5")
    assert lines[3].endswith("100 steps/s | eta 01:05 | updates/s 1 | train_return -1.5")


def test_progress_without_a_step_has_no_eta(capsys):
    progress = Progress(100, every=10)
    progress.update(0, updates=3, kl=float("nan"))
    progress.close()
    assert "eta ? |" in capsys.readouterr().err


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock(monkeypatch)
    progress = Progress(1000, step=200)
    for step in range(210, 401, 10):
        clock.now += 0.1
        progress.update(step, updates=step, train_return=-3.25)
    progress.close()
    text = terminal.getvalue()
    assert "400/1.00k" in text
    assert "updates/s=" in text
    assert "train_return=-3.25" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_survives_the_loss_of_its_stream(monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    clock = Clock(monkeypatch)
    progress = Progress(1000, every=10)
    for step in range(10, 100, 10):
        clock.now += 1
        progress.update(step)
        if step == 50:
            stream.gone = True
            if not terminal:
                stream.close()
    progress.close()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_progress_without_stderr(monkeypatch, stream):
    if stream:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress(100, every=10)
    progress.update(50)
    progress.close()


def test_replacing_syncs_the_file_before_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def watch_sync(number):
        events.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        sync(number)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    with replacing(tmp_path / "x") as file:
        file.write(b"1")
        assert not (tmp_path / "x").exists()
    assert events == ["file", "replace", "folder"]
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("device", DEVICES)
def test_random_state_round_trip(tmp_path, device):
    def draw():
        numbers = [torch.rand(2).tolist(), torch.rand(2, device=device).tolist()]
        return [*numbers, np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)]

    draw()  # leaves half a pair of normal numbers in numpy and in python
    save_checkpoint(tmp_path / "random.pt", get_random_state())
    expected = draw()
    draw()
    set_random_state(load_checkpoint(tmp_path / "random.pt", device))
    assert draw() == expected


def test_random_state_of_a_machine_with_gpus_loads_without():
    state = get_random_state()
    state["cuda"] = [*state["cuda"], torch.zeros(16, dtype=torch.uint8)]
    set_random_state(state)


def test_graceful_exit():
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = [signal.getsignal(s) for s in numbers]
    for first in numbers:
        with GracefulExit() as stop:
            assert not stop.requested
            signal.raise_signal(first)
            assert stop.requested
            signal.raise_signal(signal.SIGTERM)  # asks again, no harder
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert [signal.getsignal(s) for s in numbers] == before
