"""The files that a run goes on from, and the lock that keeps a second process away from them.

`latest.pt` holds what is learned, `previous.pt` the same of one checkpoint earlier. When a signal
stops a run, `moment.pt` holds the episodes under way and `replay.pt` the replay as it was, so that
the run goes on as if it had never stopped; a stamp tells what belongs together. Nothing that is
learned depends on these two: a scenario may keep what cannot be saved or read again.
"""

import fcntl
import os
import socket
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from replay import Replay
from tools import UserError, replacing

_NEEDED = {"step", "owed", "random", "dreamer", "optimizers", "updates"}


@contextmanager
def sole_writer(logdir: Path) -> Iterator[None]:
    """Makes `logdir` and holds its lock, which the system lets go of however the process ends.

    Raises `UserError` if another process has it. Folders made for nothing are removed again.
    """
    made = [path for path in (logdir, *logdir.parents) if not path.exists()]
    path = logdir / ".lock"
    try:
        try:
            logdir.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(f"--logdir {logdir}: cannot write there: {error.strerror}") from error
        with file:
            _lock(file, logdir)
            try:
                yield
            except BaseException:
                if logdir in made and os.listdir(logdir) == [path.name]:
                    path.unlink()
                raise
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def _lock(file: Any, logdir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(300).strip() or "another process"
        raise UserError(f"--logdir {logdir}: {holder} is writing to it already") from None
    except OSError as error:
        warnings.warn(f"{logdir} cannot be locked: {error.strerror}", stacklevel=4)
    with suppress(OSError):  # on a full disk the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def save_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes `state` whole or not at all; what `path` held before goes to `previous`.

    Raises `UserError` if it cannot be written.
    """
    with replacing(path, previous) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's word for a file that took less than it was given
            raise OSError(None, "the file system took only a part of it") from error


def load_checkpoint(
    path: Path, device: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """The state saved at `path`, tensors on `device`. Raises `UserError` if it cannot be read.

    With `mmap`, tensors are read from the disk when they are used.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes raise nearly anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"cannot load {path}: {type(error).__name__}: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"cannot load {path}: it holds no training state")
    return state


class Checkpoints:
    """What a logdir holds of a run's state, for one process that reads it and then writes it."""

    def __init__(self, logdir: Path):
        self._latest, self._previous = logdir / "latest.pt", logdir / "previous.pt"
        self._moment, self._replay = logdir / "moment.pt", logdir / "replay.pt"
        self._sound = True  # whether latest.pt is worth keeping as previous.pt

    def load(self, device: torch.device) -> dict | None:
        """The newest state that can be read, None if there is none.

        Warns if it is not that of `latest.pt`. Raises `UserError` if no file can be read.
        """
        if not self._latest.exists() and not self._previous.exists():
            return None
        try:
            return load_training(self._latest, device)
        except UserError as error:
            self._sound = False
            if not self._previous.exists():
                raise
            state = load_training(self._previous, device)
            step = f"{state['step']:,}"
            warnings.warn(f"{error}; going on from previous.pt, step {step}", stacklevel=2)
            return state

    def load_moment(self, saved: dict, device: torch.device) -> dict | None:
        """What else there was when a signal stopped the run that `saved`; None if no file tells."""
        return self._load_beside(self._moment, saved, device=device)

    def load_replay(self, saved: dict, rings: dict[str, Replay]) -> bool:
        """Fill `rings` with what they held when `saved` was, if a file tells; or leave them."""
        state = self._load_beside(self._replay, saved, mmap=True)
        if state is None:
            return False
        try:
            for name, ring in rings.items():
                ring.check(state[name])
        except (ValueError, KeyError) as error:
            self._warn(f"{self._replay} does not fit: {error}")
            return False
        for name, ring in rings.items():
            ring.load_state_dict(state[name])
        return True

    def _load_beside(self, path: Path, saved: dict, **how: Any) -> dict | None:
        """What a file holds that was written with `saved`; warns if it cannot be read."""
        if not path.exists():
            return None
        try:
            state = load_checkpoint(path, **how)
        except UserError as error:
            self._warn(str(error))
            return None
        return state if state.get("stamp") == saved["stamp"] else None  # of another checkpoint

    def _warn(self, problem: str) -> None:
        warnings.warn(f"{problem}; going on from the recorded episodes", stacklevel=4)

    def save(
        self, state: dict, moment: dict | None = None, rings: dict[str, Replay] | None = None
    ) -> None:
        """Write `latest.pt`, then `moment.pt` and `replay.pt` if given; older ones are removed.

        Raises `UserError` if that is not possible; what was there before is still there then.
        """
        stamp = {"stamp": uuid.uuid4().hex}
        previous = self._previous if self._sound else None
        save_checkpoint(self._latest, state | stamp, previous)
        self._sound = True
        for path in (self._moment, self._replay):
            for stale in (path, path.with_name(f"{path.name}.tmp")):
                with suppress(OSError):
                    stale.unlink()
        if moment is None or rings is None:
            return
        held = {name: ring.state_dict() for name, ring in rings.items()}
        try:
            save_checkpoint(self._moment, moment | stamp)
            save_checkpoint(self._replay, held | stamp)
        except UserError as error:
            warnings.warn(f"{error}; the run will go on from train_eps", stacklevel=2)

    def try_save(self, state: dict) -> None:
        """Write `latest.pt`, or warn: there may be room again when the next one is due."""
        try:
            self.save(state)
        except UserError as error:
            warnings.warn(f"NO CHECKPOINT at step {state['step']:,}: {error}", stacklevel=2)


def load_training(path: Path, device: torch.device) -> dict[str, Any]:
    """The state of a run. Raises `UserError` if `path` cannot be read or lacks a part of it."""
    state = load_checkpoint(path, device)
    if missing := _NEEDED - state.keys():
        raise UserError(f"cannot load {path}: it lacks {', '.join(sorted(missing))}")
    return state
