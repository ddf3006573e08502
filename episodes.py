"""Experience on disk: whole episodes, one `.npz` file each."""

import collections
import datetime
import queue
import re
import threading
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replay import Episode, Replay, Spaces
from tools import replacing


def _stamp(name: str) -> int:
    """When a file was written, by its name: digits of the date and of the time, as one number."""
    return int(name[:8] + name[9:21])


class EpisodeFolder:
    """Whole episodes as one file each, "<UTC time>-<id>-<length>.npz", the oldest pruned first.

    Rows are collected where they are; when an episode ends, it goes to the host and a thread
    writes it. An episode without its beginning or its end never becomes a file. Lengths and
    steps count transitions: one less than an episode has rows.
    """

    def __init__(
        self,
        folder: Path | str,
        limit_steps: int,
        spaces: Spaces,
        queue_size: int = 64,
    ):
        """Keep at most `limit_steps` steps in `folder`, which is made when first written to.

        While `queue_size` episodes wait to be written, so does the caller of `add`.
        """
        self.folder = Path(folder)
        self.limit_steps = limit_steps
        self.spaces = spaces
        own = re.compile(r"\d{8}T\d{12}-[0-9a-f]{8}-(\d+)\.npz")
        found = [own.fullmatch(path.name) for path in sorted(self.folder.glob("*.npz"))]
        self._files = collections.deque((name[0], int(name[1])) for name in found if name)
        self._steps = sum(steps for _, steps in self._files)
        self._stamp = max((_stamp(name) for name, _ in self._files), default=0)
        self._rows: Replay | None = None  # of the episodes under way
        self._queue: queue.Queue[Episode | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._warned = False

    def add(self, rows: dict[str, Tensor], ended: bool | None = None) -> None:
        """Collect one row (num_envs, ...) of every copy and hand over the episodes that it ends.

        `ended=False` promises that no row is_last, which spares a GPU the wait for an answer.
        """
        if self._rows is None:
            num_envs = len(rows["is_last"])
            self._rows = Replay(64 * num_envs, num_envs, self.spaces, rows["is_last"].device)
            self._begins = np.zeros(num_envs, dtype=np.int64)  # no copy needs rows written earlier
        if self._rows.written - self._begins.min() == self._rows.length:
            self._make_room()
        self._rows.add(rows)
        if ended is not False and len(copies := np.flatnonzero(rows["is_last"].cpu().numpy())):
            self._hand_over(copies)
        endless = self._rows.written - self._begins > self.limit_steps + 1
        if endless.any():
            self._begins[endless] = self._rows.written
            self._problem = f"an episode is longer than the {self.limit_steps} steps of its folder"
        self._report()

    def close(self) -> None:
        """Wait until every episode handed over is written; `add` would start anew."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._report()

    def find(self, max_steps: int | None = None) -> list[tuple[Path, int]]:
        """The files of the newest episodes and their rows, `max_steps` steps at most, oldest first.

        Every file is read to see if it holds an episode of these spaces, or else skipped with a
        warning.
        """
        found, steps = [], 0
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            if (episode := self._try_read(path)) is None:
                continue
            rows = len(episode["is_first"])
            steps += rows - 1
            if max_steps is not None and steps > max_steps:
                break
            found.append((path, rows))
        return found[::-1]

    def episodes(self, paths: Iterable[Path]) -> Iterator[Episode]:
        """What is in these files, one after the other; skipped, with a warning, as in `find`."""
        return filter(None, map(self._try_read, paths))

    def state_dict(self) -> dict:
        """The stamp of the newest file, and the episodes under way if there are any."""
        self.close()
        state = {"stamp": self._stamp}
        if self._rows is None or self._begins.min() == self._rows.written:
            return state
        begin = int(self._begins.min())
        time = torch.arange(begin, self._rows.written, device=self._rows.device)
        time = time % self._rows.length
        rows = {key: ring.index_select(0, time) for key, ring in self._rows.rings.items()}
        return state | {"rows": rows, "begins": (self._begins - begin).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the episodes that `state_dict` returned.

        Files that were written later are deleted: their steps are played once more.
        """
        while self._files and _stamp(self._files[-1][0]) > state["stamp"]:
            self._delete(*self._files.pop())
        if "rows" in state:
            for step in range(len(state["rows"]["is_last"])):
                self.add({key: rows[step] for key, rows in state["rows"].items()}, ended=False)
            self._begins[:] = state["begins"]

    def _make_room(self) -> None:
        old = self._rows
        self._rows = Replay(2 * len(old), old.num_envs, self.spaces, old.device)
        for key, ring in old.rings.items():
            self._rows.rings[key][: old.length] = ring.roll(-(old.written % old.length), 0)
        self._rows.written = old.length
        self._begins -= old.written - old.length

    def _hand_over(self, copies: np.ndarray) -> None:
        """Give the writer the episodes that the newest row of `copies` ends."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        start, end = int(self._begins[copies].min()), self._rows.written
        time = torch.arange(start, end, device=self._rows.device) % self._rows.length
        chosen = torch.from_numpy(copies).to(self._rows.device)
        rows = {  # one transfer a key, however many episodes end
            key: ring.index_select(1, chosen).index_select(0, time).cpu().numpy()
            for key, ring in self._rows.rings.items()
        }
        for column, copy in enumerate(copies):
            # From the latest beginning on: what a reset interrupted before it is dropped.
            begins = start + np.flatnonzero(rows["is_first"][:, column])
            if len(begins) and self._begins[copy] <= begins[-1] < end - 1:
                part = slice(begins[-1] - start, None)
                self._queue.put({key: value[part, column].copy() for key, value in rows.items()})
        self._begins[copies] = end

    def _work(self) -> None:
        for episode in iter(self._queue.get, None):
            try:
                self._write(episode)
            except Exception as error:  # whatever it is, recording must not end the run
                self._problem = f"an episode is lost: {str(error) or repr(error)}"

    def _write(self, episode: Episode) -> None:
        # Names must sort by age even when the clock stands still or jumps back.
        now = datetime.datetime.now(datetime.UTC)
        self._stamp = max(int(f"{now:%Y%m%d%H%M%S%f}"), self._stamp + 1)
        day, time = divmod(self._stamp, 10**12)
        steps = len(episode["is_first"]) - 1
        name = f"{day:08}T{time:012}-{uuid.uuid4().hex[:8]}-{steps}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        # One temporary name for all: what a kill leaves is overwritten.
        with replacing(self.folder / name, temporary=self.folder / ".episode.tmp") as file:
            np.savez_compressed(file, **episode)
        self._files.append((name, steps))
        self._steps += steps
        while self._steps > self.limit_steps:
            self._delete(*self._files.popleft())

    def _delete(self, name: str, steps: int) -> None:
        self._steps -= steps
        (self.folder / name).unlink(missing_ok=True)

    def _report(self) -> None:
        """Warn of the first problem only, in the caller's thread, where a warning may raise."""
        if self._problem and not self._warned:
            self._warned = True
            warnings.warn(self._problem, stacklevel=3)

    def _try_read(self, path: Path) -> Episode | None:
        try:
            return self.read(path)
        except Exception as error:  # a hostile archive can raise nearly anything
            warnings.warn(f"skipping {path}: {str(error) or repr(error)}", stacklevel=3)
            return None

    def read(self, path: Path) -> Episode:
        """The episode in a file. Raises nearly anything if there is none of these spaces."""
        if not path.exists():  # it was pruned, by the run that writes here
            raise ValueError("it is gone")
        if not (path.is_file() and zipfile.is_zipfile(path)):  # opening a pipe would never return
            raise ValueError("not a whole .npz archive")
        episode, most = {}, self.limit_steps + 1
        with np.load(path, allow_pickle=False) as archive:
            for key, (shape, dtype) in self.spaces.items():
                row = torch.empty(shape, dtype=dtype).numpy()
                if key not in archive.files:
                    raise ValueError(f"it lacks {key}")
                # A small file may unpack to more than the memory holds: look before.
                if archive.zip.getinfo(f"{key}.npy").file_size > most * row.nbytes + 4096:
                    raise ValueError(f"{key} has more than {most} rows")
                value = episode[key] = archive[key]
                if (value.shape[1:], value.dtype) != (row.shape, row.dtype):
                    kind = f"{value.dtype} {value.shape[1:]}"
                    raise ValueError(f"{key} is {kind} a row, not {row.dtype} {shape}")
                if not np.isfinite(value).all():
                    raise ValueError(f"{key} holds NaN or infinity")
        sizes = {len(value) for value in episode.values()}
        if len(sizes) > 1 or not 2 <= min(sizes) <= most:
            raise ValueError(f"it has {sorted(sizes)} rows, not one number from 2 to {most}")
        for key, place in (("is_first", 0), ("is_last", min(sizes) - 1)):
            if list(np.flatnonzero(episode[key])) != [place]:
                raise ValueError(f"{key} is not true in row {place} alone")
        return episode
