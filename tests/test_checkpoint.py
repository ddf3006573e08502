"""The files that a run goes on from, and the lock."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import Checkpoints, load_checkpoint, save_checkpoint, sole_writer
from replay import Replay
from tools import UserError, get_random_state

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint_round_trip(tmp_path, device):
    path = tmp_path / "latest.pt"
    state = {
        "model": {"w": torch.randn(3, 4, device=device), "n": torch.tensor(2, dtype=torch.uint8)},
        "steps": 123,
        "names": ["a", ("b", 1.5, None, True)],
        "random": get_random_state(),
    }
    save_checkpoint(path, {"old": True})
    save_checkpoint(path, state)
    assert os.listdir(tmp_path) == ["latest.pt"]
    loaded = load_checkpoint(path, device)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["model"]["w"].device.type == device
    assert (loaded["steps"], loaded["names"]) == (123, ["a", ("b", 1.5, None, True)])
    assert loaded["random"]["python"] == state["random"]["python"]


def test_failed_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    save_checkpoint(path, {"steps": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"steps": 2, "bad": lambda: None})
    assert os.listdir(tmp_path) == ["latest.pt"]
    assert load_checkpoint(path) == {"steps": 1}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"steps": 2})
    assert os.listdir(tmp_path) == ["latest.pt"]


class Stranger:
    """Something that a checkpoint may not hold."""


def test_checkpoint_that_cannot_be_read(tmp_path):
    good = tmp_path / "good.pt"
    save_checkpoint(good, {"w": torch.ones(100)})
    whole = good.read_bytes()
    torch.save({"x": Stranger()}, tmp_path / "stranger.pt")
    torch.save([1], tmp_path / "list.pt")
    contents = {
        "torn": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(99),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in [*contents, "stranger", "list", "missing"]:
        with pytest.raises(UserError, match=f"cannot load .*{name}.pt: ") as caught:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"w": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path)


def state_of(step: int) -> dict:
    return {"step": step, "owed": 0.0, "random": {}, "dreamer": {}, "optimizers": {}, "updates": 0}


def test_the_predecessor_is_kept_and_used_where_the_newest_is_damaged(tmp_path):
    files = Checkpoints(tmp_path)
    assert files.load(CPU) is None
    for step in (1, 2, 3):
        files.save(state_of(step))
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "previous.pt"]
    assert files.load(CPU)["step"] == 3
    (tmp_path / "latest.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="latest.pt: .*; going on from previous.pt, step 2"):
        assert files.load(CPU)["step"] == 2
    files.save(state_of(4))  # the damaged file must not take the place of the good one
    assert load_checkpoint(tmp_path / "previous.pt")["step"] == 2
    (tmp_path / "latest.pt").unlink()  # killed between two renames
    with pytest.warns(UserWarning, match="going on from previous.pt"):
        assert Checkpoints(tmp_path).load(CPU)["step"] == 2
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.pt"):
        Checkpoints(tmp_path).load(CPU)


def test_a_checkpoint_that_lacks_parts_is_refused(tmp_path):
    save_checkpoint(tmp_path / "latest.pt", {"step": 3, "dreamer": {}})
    with pytest.raises(UserError, match="it lacks optimizers, owed, random, updates"):
        Checkpoints(tmp_path).load(CPU)


def make_rings(rows: int) -> dict[str, Replay]:
    ring = Replay(20, 2, {"x": ((3,), torch.float32), "is_first": ((), torch.bool)})
    for row in range(rows):
        ring.add({"x": torch.full((2, 3), row), "is_first": torch.ones(2)})
    return {"replay": ring}


def test_the_moment_and_the_replay_are_taken_up_only_with_their_own_checkpoint(tmp_path):
    files, moment, path = Checkpoints(tmp_path), {"x": 1}, tmp_path / "replay.pt"
    files.save(state_of(1), moment, make_rings(7))
    first, replay = files.load(CPU), path.read_bytes()
    rings = make_rings(0)
    assert files.load_moment(first, CPU)["x"] == 1 and files.load_replay(first, rings)
    assert torch.equal(rings["replay"].rings["x"], make_rings(7)["replay"].rings["x"])
    files.save(state_of(1))
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "previous.pt"]
    assert not files.load_replay(first, make_rings(0)) and not files.load_moment(first, CPU)
    path.write_bytes(replay)
    assert not files.load_replay(files.load(CPU), make_rings(0))
    other = {"replay": Replay(20, 4, {"is_first": ((), torch.bool)})}
    with pytest.warns(UserWarning, match=r"replay.pt does not fit: it has no .*recorded episodes"):
        assert not files.load_replay(first, other)
    path.write_bytes(replay[:-99])
    with pytest.warns(UserWarning, match=r"cannot load .*replay.pt.*recorded episodes"):
        assert not files.load_replay(first, make_rings(0))
    (tmp_path / "moment.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"cannot load .*moment.pt.*recorded episodes"):
        assert not files.load_moment(first, CPU)


def test_one_writer_is_let_in_and_a_dead_one_keeps_nobody_out(tmp_path):
    logdir = tmp_path / "run"
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
    code += "from checkpoint import sole_writer\n"
    code += "with sole_writer(Path(sys.argv[2])): print('in', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(Path(__file__).parent.parent), str(logdir)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    who = f"process {other.pid} on {socket.gethostname()} is writing to it already"
    with pytest.raises(UserError, match=who), sole_writer(logdir):
        pass
    other.kill()
    other.wait()
    with sole_writer(logdir):
        assert str(os.getpid()) in (logdir / ".lock").read_text()


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
        raise ZeroDivisionError
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked: No locks"), sole_writer(tmp_path):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before(small_disk):
    files = Checkpoints(small_disk)
    for step in (1, 2):
        files.save(state_of(step) | {"w": torch.rand(10_000)})
    big = state_of(3) | {"w": torch.rand(1_000_000)}
    with pytest.raises(UserError, match=r"cannot write .*latest.pt: \S"):
        files.save(big)
    with pytest.warns(UserWarning, match=r"NO CHECKPOINT at step 3: cannot write .*latest.pt"):
        files.try_save(big)
    assert sorted(os.listdir(small_disk)) == ["latest.pt", "previous.pt"]
    assert files.load(CPU)["step"] == 2
    ring = {"replay": Replay(2_000_000, 2, {"is_first": ((), torch.bool)})}
    for _ in range(800_000 // 1000):
        ring["replay"].written += 1000
    with pytest.warns(UserWarning, match="replay.pt: .*; the run will go on from train_eps"):
        files.save(state_of(4), {}, ring)
    assert files.load(CPU)["step"] == 4 and not (small_disk / "replay.pt.tmp").exists()
