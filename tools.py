"""The run's plumbing: device, memory, metrics, progress, random states, signals."""

import errno
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gifs import GIF_FRAMES, check_frames, encode_gif


class UserError(Exception):
    """Something that the user can put right; its message is one clear line."""


def readable(path: Path, flag: str) -> Path:
    """The path that a flag gives. Raises `UserError` if the system cannot even look there."""
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that is not ours to enter
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    return path


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU without one. Raises `UserError` if it is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = {"auto": (gpus or ["cpu"])[0], "cpu": "cpu"}
    devices |= {gpu: gpu for gpu in gpus} | ({"cuda": gpus[0]} if gpus else {})
    if name not in devices:
        raise UserError(f"there is no device '{name}' here, only {', '.join(devices)}")
    return torch.device(devices[name])


def memory_in_use(device: torch.device) -> dict[str, float]:
    """MiB that the process holds in the host's memory, and torch on a GPU."""
    used = {}
    with suppress(OSError):  # where there is no /proc
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used["memory_host_mib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    if device.type == "cuda":
        used["memory_device_mib"] = torch.cuda.memory_reserved(device) / 2**20
    return used


@contextmanager
def replacing(
    path: Path, previous: Path | None = None, temporary: Path | None = None
) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on disk.

    Until then it is at `temporary`. What was at `path` takes the place of `previous`, if that is
    given. Raises `UserError` where the file system refuses; then all is as it was.
    """
    path = Path(path)
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    with suppress(OSError):  # not every file system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Logger:
    """Averages scalars until they are written, to `metrics.jsonl` and to TensorBoard.

    A run that resumes at `step` drops what an earlier process logged beyond it.
    """

    def __init__(self, logdir: Path, step: int = 0):
        self._logdir = Path(logdir)
        self._logdir.mkdir(parents=True, exist_ok=True)
        self._numbers: dict[str, tuple[float, int]] = {}
        self._tensors: dict[tuple, tuple[Tensor, int]] = {}
        self._videos: dict[str, tuple[Tensor, int]] = {}
        self._path = self._logdir / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        _drop_after(self._path, step)
        with self._tolerating("TensorBoard's file"):
            self._board = SummaryWriter(str(self._logdir), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float | Tensor]) -> None:
        """Adds numbers or 0-d tensors to the averages of their names, without waiting for a GPU."""
        groups: dict[tuple, dict[str, Tensor]] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                group = groups.setdefault((value.device, value.dtype), {})
                group[name] = value.detach()
            else:
                total, count = self._numbers.get(name, (0.0, 0))
                self._numbers[name] = (total + float(value), count + 1)
        for kind, group in groups.items():
            # One kernel copies them all, as their memory may be reused, a second one adds them up.
            new = torch.stack(list(group.values()))
            if new.dim() != 1:
                raise ValueError(f"expected 0-d tensors, got {tuple(new.shape[1:])} in {[*group]}")
            key = (*kind, *group)
            total, count = self._tensors.get(key, (None, 0))
            self._tensors[key] = (new.double() if total is None else total + new, count + 1)

    def video(self, name: str, frames: Tensor | np.ndarray, fps: float = 15) -> None:
        """Keeps `frames` (T, H, W, 3) uint8 for the next `write`, the first 200 of them."""
        frames = torch.as_tensor(frames)
        check_frames(frames)
        self._videos[name] = (frames[:GIF_FRAMES].clone(), fps)

    def write(self, step: int) -> dict[str, float]:
        """Writes the averages and videos since the last call, returns the averages.

        Where the disk refuses, it warns, and the run goes on with what can be written.
        """
        means = self._means()
        if means:
            finite = {k: v if math.isfinite(v) else None for k, v in means.items()}
            line = json.dumps({"step": int(step), **finite}) + "\n"
            with self._tolerating(f"step {step:,} in {self._path}"):
                _append(self._path, line.encode())
        summaries = [Summary.Value(tag=name, simple_value=mean) for name, mean in means.items()]
        for name, (frames, fps) in self._videos.items():
            gif = encode_gif(frames, fps)
            with (
                self._tolerating(f"{name}.gif"),
                replacing(self._logdir / f"{name.replace('/', '_')}.gif") as file,
            ):
                file.write(gif)
            height, width = frames.shape[1:3]
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=gif
            )
            summaries.append(Summary.Value(tag=name, image=image))
        self._videos.clear()
        if self._board:
            board, self._board = self._board, None  # once refused, its thread is gone
            with self._tolerating("TensorBoard's file: it ends here"):
                board.file_writer.add_summary(Summary(value=summaries), step)
                board.flush()
                self._board = board
        return means

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            warnings.warn(f"cannot write {what}: {error}", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """The sums that were not written yet, for a checkpoint."""
        return {
            "numbers": dict(self._numbers),
            "tensors": [(list(key), *sums) for key, sums in self._tensors.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._numbers = dict(state["numbers"])
        self._tensors = {tuple(key): (total, count) for key, total, count in state["tensors"]}

    def _means(self) -> dict[str, float]:
        """Empties the sums, with one transfer a device."""
        sums = {name: [total, count] for name, (total, count) in self._numbers.items()}
        for device in {key[0] for key in self._tensors}:
            groups = {key: group for key, group in self._tensors.items() if key[0] == device}
            totals = iter(torch.cat([total for total, _ in groups.values()]).tolist())
            for (_, _, *names), (_, count) in groups.items():
                for name in names:
                    entry = sums.setdefault(name, [0.0, 0])
                    entry[0] += next(totals)
                    entry[1] += count
        self._numbers.clear()
        self._tensors.clear()
        return {name: total / count for name, (total, count) in sums.items()}

    def close(self) -> None:
        """Closes the files; what was not written is lost."""
        if self._board:
            with self._tolerating("TensorBoard's file"):
                self._board.close()


def _append(path: Path, line: bytes) -> None:
    """Adds a line whole or not at all."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the lines of a metrics file without torn ones and those beyond `step`."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) < len(lines):
        with replacing(path) as file:
            file.writelines(kept)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # torn by a crash
        return math.inf


class Progress:
    """A bar on a terminal, elsewhere a printed line every `every` steps; both on stderr."""

    def __init__(self, total: int, step: int = 0, every: int = 1000, updates: int = 0):
        self._total, self._every = total, every
        self._now = self._shown = (step, updates)
        self._shown_at = time.monotonic()
        self._figures: dict[str, float] = {}
        self._stream = None if sys.stderr is None or sys.stderr.closed else sys.stderr
        self._bar = None
        if self._stream and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=step, unit="step", unit_scale=True, dynamic_ncols=True
            )

    def update(self, step: int, updates: int = 0, **figures: float) -> None:
        """Takes the counts so far and numbers to show beside them, which stay until replaced."""
        self._now = (step, updates)
        self._figures |= figures
        if self._bar:
            due = time.monotonic() - self._shown_at >= 0.5
        else:
            due = step // self._every > self._shown[0] // self._every
        if due:
            self._show()

    def close(self) -> None:
        """Shows the last counts, if that was not done, and ends the bar."""
        if self._now != self._shown:
            self._show()
        if self._bar:
            with suppress(OSError, ValueError):
                self._bar.close()

    def _show(self) -> None:
        (step, updates), (last_step, last_updates) = self._now, self._shown
        seconds = max(time.monotonic() - self._shown_at, 1e-6)
        speed = (step - last_step) / seconds
        figures = {"updates/s": (updates - last_updates) / seconds, **self._figures}
        self._shown, self._shown_at = self._now, time.monotonic()
        try:
            if self._bar:
                self._bar.set_postfix(figures, refresh=False)
                self._bar.update(step - last_step)
            elif self._stream:
                eta = tqdm.format_interval(max(0, self._total - step) / speed) if speed > 0 else "?"
                words = [f"step {step:,} of {self._total:,}", f"{speed:,.0f} steps/s", f"eta {eta}"]
                words += [f"{name} {value:.4g}" for name, value in figures.items()]
                print(" | ".join(words), file=self._stream, flush=True)
        except (OSError, ValueError):  # whoever read it is gone: go on in silence
            self._stream = self._bar = None


def get_random_state() -> dict[str, Any]:
    """The global generators of torch (CPU and GPUs), numpy and python, for `save_checkpoint`."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())],
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `get_random_state` returned; GPUs that are not there now are passed over."""
    torch.set_rng_state(state["torch"].cpu())
    for i, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), i)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


class GracefulExit:
    """While entered, SIGINT, SIGTERM and SIGHUP (a closed terminal) set `requested`.

    A second SIGINT interrupts at once; a signal that is ignored (as nohup does) stays so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulExit":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # and not what was set meanwhile
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
