"""What a folder may hold that it should not: one line and status 2, or the run goes on."""

import os
from pathlib import Path

import pytest
import torch

import dreamer
from checkpoint import sole_writer
from config import read_yaml
from models import Dreamer
from tests.test_resume import run
from tools import UserError

FEW = ("--steps", "160", "--probe.envs", "0", "--eval_every", "10000")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The logdir of a short run."""
    logdir = tmp_path_factory.mktemp("trained")
    run(logdir, *FEW)
    return logdir


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of it: its settings, and its checkpoint twice."""
    logdir = tmp_path / "copy"
    logdir.mkdir()
    (logdir / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    for name in ("latest.pt", "previous.pt"):
        (logdir / name).write_bytes((trained / "latest.pt").read_bytes())
    return logdir


def edit(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def only_latest(logdir: Path) -> Path:
    (logdir / "previous.pt").unlink()
    return logdir / "latest.pt"


def rename_network(state: dict) -> None:
    state["dreamer"]["strange.weight"] = state["dreamer"].pop(next(iter(state["dreamer"])))


REFUSED = {
    "torn": (lambda d: only_latest(d).write_bytes(b"PK torn"), "cannot load .*latest.pt"),
    "empty": (lambda d: only_latest(d).write_bytes(b""), "cannot load .*latest.pt"),
    "a folder": (lambda d: (only_latest(d).unlink(), (d / "latest.pt").mkdir()), "latest.pt"),
    "a list": (lambda d: torch.save([1], only_latest(d)), "holds no training state"),
    "code": (lambda d: torch.save({"x": Path}, only_latest(d)), "cannot load .*Unpickling"),
    "parts": (lambda d: edit(only_latest(d), lambda s: s.pop("optimizers")), "lacks optimizers"),
    "no actors": (
        lambda d: edit(only_latest(d), rename_network),
        "strange.weight: saved .* now ",
    ),
    "optimiser": (
        lambda d: edit(only_latest(d), lambda s: s["optimizers"].pop("behavior")),
        "no optimiser 'behavior'",
    ),
    "both": (
        lambda d: [(d / n).write_bytes(b"x") for n in ("latest.pt", "previous.pt")],
        "cannot load .*previous.pt",
    ),
    "settings": (lambda d: (d / "config.yaml").write_text("task: ["), "cannot read .*config.yaml"),
    "no settings": (lambda d: (d / "config.yaml").write_text(""), "cannot read .*config.yaml"),
    "binary": (lambda d: (d / "config.yaml").write_bytes(b"\xff\xfe"), "cannot read .*config.yaml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_run_is_refused(copied, name):
    """In one line, and before anything but the lock is written."""
    spoil, expected = REFUSED[name]
    spoil(copied)
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    with pytest.raises(UserError, match=expected) as error:
        run(copied, *FEW)
    assert "\n" not in str(error.value)
    after = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    after.pop(".lock", None)
    assert after == before


SIZES = {
    "units": (("--units", "24"), r"saved \(.*\), now \("),
    "task": (("--task", "vmas_balance"), r"saved \(.*\), now "),
    "agents": (("--scenario.n_agents", "2"), r"saved \(.*\), now "),
    "actions": (("--discrete", "true"), r"actors.*: saved .*, now "),
    "state": (("--rssm.deter", "64"), r"rssm.*: saved .*, now "),
    "images": (("--configs", "vmas", "debug"), r"cnn.*: saved nothing, now "),
}


@pytest.mark.parametrize("name", SIZES)
def test_weights_that_do_not_fit_are_named(trained, tmp_path, name):
    flags, expected = SIZES[name]
    source = ("--from_checkpoint", str(trained / "latest.pt"))
    with pytest.raises(UserError, match=expected) as error:
        run(tmp_path / "new", *FEW, *flags, *source)
    assert "--from_checkpoint" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [None, b"", b"text"], ids=["missing", "empty", "text"])
def test_weights_that_are_not_there(tmp_path, content):
    if content is not None:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot load .*x\.pt"):
        run(tmp_path / "new", *FEW, "--from_checkpoint", str(tmp_path / "x.pt"))
    assert not (tmp_path / "new").exists()


def test_a_new_run_starts_from_the_weights_of_another(trained, tmp_path):
    flags = ("--from_checkpoint", str(trained / "latest.pt"))
    run(tmp_path / "new", *FEW, *flags, "--steps", "8", "--seed", "7")
    one, two = (torch.load(d / "latest.pt", weights_only=True) for d in (trained, tmp_path / "new"))
    assert two["step"] == 8 and two["updates"] == 0
    assert all(torch.equal(value, two["dreamer"][key]) for key, value in one["dreamer"].items())
    for more in ((), flags):  # where it began stays known, so that either command resumes it
        run(tmp_path / "new", *FEW, *more, "--steps", "16", "--seed", "7")
        assert read_yaml(tmp_path / "new" / "config.yaml")["from_checkpoint"] == flags[1]


def test_a_replay_too_large_for_the_memory_is_refused(tmp_path):
    with pytest.raises(UserError, match="--dataset_size 100000000000: too many rows for the mem"):
        run(tmp_path / "new", *FEW, "--dataset_size", "100_000_000_000")
    assert not (tmp_path / "new").exists()


def test_a_team_is_played_without_compiling(copied, monkeypatch, capsys):
    monkeypatch.setattr(Dreamer, "compile_steps", lambda dreamer: pytest.fail("compiles"))
    dreamer.main(["--eval_only", "true", "--logdir", str(copied), "--compile", "true"])
    assert "eval_return_mean" in capsys.readouterr().out


def test_weights_of_another_are_for_new_runs_alone(trained, copied):
    source = ("--from_checkpoint", str(trained / "latest.pt"))
    with pytest.raises(UserError, match="holds a run that began otherwise; expected another"):
        run(copied, *FEW, *source)


@pytest.mark.parametrize("flags", [("--discrete", "true"), ("--task", "vmas_balance")])
def test_a_team_is_played_with_what_its_networks_are_made_for(copied, flags):
    with pytest.raises(UserError, match=rf"other settings .*: {flags[0][2:]}: saved") as error:
        dreamer.main(["--eval_only", "true", "--logdir", str(copied), *flags])
    assert "world." not in str(error.value)


def test_a_damaged_newest_checkpoint_costs_one_interval(copied):
    (copied / "latest.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"latest\.pt.*; going on from previous\.pt, step 160"):
        run(copied, *FEW, "--steps", "176")
    assert torch.load(copied / "latest.pt", weights_only=True)["step"] == 176


def test_a_second_process_is_refused(copied):
    # A second lock of the same file is refused to the process that holds the first, too.
    who = rf"process {os.getpid()} on \S+ is writing to it already"
    with sole_writer(copied), pytest.raises(UserError, match=who):
        run(copied, *FEW)


@pytest.mark.parametrize("where", ["/proc/nothing/here", "/dev/null/run"])
def test_a_place_where_nothing_can_be_written(where):
    with pytest.raises(UserError, match=rf"--logdir {where}: cannot write there"):
        run(Path(where), *FEW)
