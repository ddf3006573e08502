"""Where the rows of a run are kept."""

from pathlib import Path

import torch
from torch import Tensor

import distributed
from build import row_spaces
from config import Config
from envs import Environment
from episodes import EpisodeFolder
from latents import LATENTS
from models import Dreamer
from replay import Replay, fill
from tools import UserError, readable


class Recorder:
    """Where rows go: the replay, the folder of episodes, and a few with images for the probe.

    Where the rows of the replay have images, the probe learns from those. Raises `UserError` if
    there is too little memory.
    """

    def __init__(self, config: Config, env: Environment, logdir: Path):
        spaces = row_spaces(config, env, image=bool(env.image_size))
        self.env, self.least, self.image_size = env, config.batch_length, config.image_size
        self.seed, self.recency = config.seed, config.recency
        self.replay = self._ring("dataset_size", config.dataset_size, config.envs, spaces)
        recorded = {key: space for key, space in spaces.items() if key not in LATENTS}
        self.folder = EpisodeFolder(logdir / "train_eps", config.dataset_size, recorded)
        self.pictures, self.pictured = self.replay, 0
        if not env.image_size and config.probe.envs:
            spaces = row_spaces(config, env, image=True)
            self.pictured = min(config.probe.envs, config.envs)
            size = config.probe.dataset_size
            self.pictures = self._ring("probe.dataset_size", size, self.pictured, spaces)

    def _ring(self, key: str, capacity: int, copies: int, spaces: dict) -> Replay:
        try:
            device = self.env.device
            return Replay(capacity, copies, spaces, device, self.seed, LATENTS, self.recency)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(f"--{key} {capacity}: too many rows for the memory: {error}") from error

    def add(self, rows: dict[str, Tensor]) -> None:
        """Take in the next row of every copy."""
        self.replay.add(rows)
        self.folder.add(rows, ended=self.env.ended)
        if self.pictured:
            image = self.env.render(self.image_size, copies=self.pictured)
            some = {key: value[: self.pictured] for key, value in rows.items()}
            self.pictures.add(some | {"image": image})

    @property
    def rings(self) -> dict[str, Replay]:
        """The replay, and the one with images if it is another."""
        rings = {"replay": self.replay}
        return rings | {"pictures": self.pictures} if self.pictured else rings

    def can_draw(self, length: int) -> bool:
        """Whether there are rows enough to teach the probe with."""
        return self.pictures.steps_per_copy > length

    def load(self, dreamer: Dreamer, folder: str = "", chunk: int = 64) -> None:
        """Take up this run's episodes, or those of `folder`; latents are inferred anew.

        Raises `UserError` if `folder` holds too little to learn from.
        """
        if folder and not readable(Path(folder), "--offline_traindir").is_dir():
            raise UserError(f"--offline_traindir {folder}: there is no such folder")
        own = self.folder
        source = EpisodeFolder(folder, own.limit_steps, own.spaces) if folder else own
        # Ranks share a folder of episodes; each has one of its own as well.
        count, place = (distributed.ranks(), distributed.rank()) if folder else (1, 0)
        found = source.find(own.limit_steps * count)[place::count]
        episodes = source.episodes(path for path, _ in found)
        if fill(self.replay, [rows for _, rows in found], episodes):
            for data, index in self.replay.streams(chunk):
                latents = dreamer.world.rssm.pack(dreamer.infer(data))
                self.replay.write_back(index, latents)
        if folder and self.replay.steps_per_copy <= self.least:
            steps = self.replay.num_envs * (self.least + 1)
            raise UserError(
                f"--offline_traindir {folder}: expected at least {steps} steps of this task, "
                f"found {len(self.replay)}"
            )
