"""A run's moving parts: taken up where a checkpoint left them, and written to the next one."""

import sys
import warnings
from pathlib import Path

import distributed
from build import EXACT
from checkpoint import Checkpoints
from config import Config, check_compatible, save_config
from envs.vmas import Vmas
from learner import Learner
from recorder import Recorder
from rollout import Meter, Player
from tools import Logger, Progress, UserError, get_random_state, set_random_state


class Run:
    """Rollout, replay and reports of a run, and how far it has come.

    `config` holds the totals of all ranks, `own` the share of this one; the first rank reports and
    saves. With `saved`, a checkpoint, the run goes on: exactly where it was if a signal had stopped
    it and it has one rank, else from its recorded episodes.
    """

    def __init__(
        self,
        config: Config,
        own: Config,
        logdir: Path,
        env: Vmas,
        learner: Learner,
        checkpoints: Checkpoints,
        saved: dict | None,
    ):
        """Raises `UserError` if there is nothing to learn from in a folder of episodes."""
        self.config, self.env, self.learner, self.checkpoints = config, env, learner, checkpoints
        self.step, self.owed = (saved["step"], saved["owed"]) if saved else (0, 0.0)
        rank = distributed.rank()
        self.first = rank == 0
        self.recorder = Recorder(own, env, logdir if self.first else logdir / f"rank{rank}")
        exact = self._fill_replay(saved)
        self.player = Player(env, learner.dreamer, explore=True, capture=config.capture)
        replayed = config.batch_size * config.batch_length
        self.meter = Meter(env, replayed, self.step, learner.updates)
        self.logger = self.progress = distributed.Muted()
        if self.first:
            save_config(config, logdir / "config.yaml")
            self.logger = Logger(logdir, self.step)
            self.progress = Progress(config.steps, self.step, config.log_every, learner.updates)
        if exact:
            for name, part in self._moment().items():
                part.load_state_dict(saved["moment"][name])
        if saved and rank < len(saved["random"]):
            self._restore_random_states(saved["random"][rank])

    def save(self) -> None:
        """Write a checkpoint, or warn that the disk refuses. All ranks must call this together."""
        state = self._state()
        if self.first:
            self.checkpoints.try_save(state)

    def end(self, stopped: bool) -> None:
        """Write the last checkpoint, all ranks together; raises `UserError` if the disk refuses.

        If the run was `stopped` before its end and has one rank, all goes in that it holds now.
        """
        state, exact = self._state(), stopped and distributed.ranks() == 1
        if exact:
            state["settings"] = self.config.as_dict()
            state["moment"] = {name: part.state_dict() for name, part in self._moment().items()}
        if self.first:
            self.checkpoints.save(state, self.recorder.rings if exact else None)

    def _state(self) -> dict:
        """What every checkpoint holds."""
        random = {
            "process": get_random_state(),
            "env": self.env.random_state(),
            "replay": self.recorder.replay.random_state(),
        }
        everyone = distributed.gather(random)
        progress = {"step": self.step, "owed": self.owed, "random": everyone}
        return progress | self.learner.state_dict()

    def _restore_random_states(self, states: dict) -> None:
        set_random_state(states["process"])
        self.env.set_random_state(states["env"])
        self.recorder.replay.set_random_state(states["replay"])

    def _moment(self) -> dict:
        """What remembers the episodes under way and what was not reported yet."""
        return {
            "env": self.env,
            "player": self.player,
            "meter": self.meter,
            "logger": self.logger,
            "folder": self.recorder.folder,
        }

    def _fill_replay(self, saved: dict | None) -> bool:
        """Fill the replay as it was when a signal stopped the run, or else from recorded episodes.

        Returns whether it is as it was, so that the episodes under way can be gone on with too.
        """
        recorder, folder = self.recorder, self.config.offline_traindir
        if self.first:
            weights = sum(weight.numel() for weight in self.learner.dreamer.parameters())
            parts = f"{self.env.n_agents} agents, {weights:,} weights"
            size = f"a replay of {recorder.replay.nbytes / 2**20:,.0f} MiB"
            where = f"on {self.env.device}"
            print(f"{self.config.task}: {parts}, {size}, {where}", file=sys.stderr)
        if saved and self._is_alike(saved) and self.checkpoints.load_replay(saved, recorder.rings):
            return True
        if saved or folder:
            recorder.load(self.learner.dreamer, folder)
        return False

    def _is_alike(self, saved: dict) -> bool:
        """Whether a signal stopped this run, and its episodes and replay are still of one shape."""
        if "moment" not in saved or distributed.ranks() > 1:
            return False
        if saved["random"][0]["env"]["device"] != self.env.device.type:
            return False
        try:
            check_compatible(saved["settings"], self.config, EXACT)
            if not self.env.is_of_this_code(saved["moment"]["env"]):
                raise UserError(f"the code of {self.config.task} has changed since the run stopped")
        except UserError as error:
            warnings.warn(f"{error}; going on from the recorded episodes", stacklevel=2)
            return False
        return True
