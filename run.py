"""A run's moving parts: taken up where a checkpoint left them, and written to the next one."""

import sys
import warnings
from pathlib import Path

import distributed
from build import EXACT
from checkpoint import Checkpoints
from config import Config, check_compatible, save_config
from envs import Environment
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
        env: Environment,
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
        moment = self._fill_replay(saved)
        self.player = Player(env, learner.dreamer, explore=True, capture=config.capture)
        replayed = config.batch_size * config.batch_length
        self.meter = Meter(env, replayed, self.step, learner.updates)
        self.logger = self.progress = distributed.Muted()
        if self.first:
            save_config(config, logdir / "config.yaml")
            self.logger = Logger(logdir, self.step)
            self.progress = Progress(config.steps, self.step, config.log_every, learner.updates)
        if moment:
            for name, part in self._parts().items():
                part.load_state_dict(moment[name])
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
        state = self._state()
        moment = self._moment() if stopped and distributed.ranks() == 1 else None
        if self.first:
            self.checkpoints.save(state, moment, self.recorder.rings)

    def _moment(self) -> dict | None:
        """All that a checkpoint lacks, so that the run can go on as if it had never stopped."""
        try:
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            simulator = self.env.state_dict()
        except Exception as error:  # a scenario may keep anything
            warnings.warn(f"the episodes under way are not saved: {error}", stacklevel=3)
            return None
        return {"settings": self.config.as_dict(), "env": simulator, **parts}

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

    def _parts(self) -> dict:
        """What remembers, beside the environment, the episodes under way and what is unreported."""
        return {
            "player": self.player,
            "meter": self.meter,
            "logger": self.logger,
            "folder": self.recorder.folder,
        }

    def _fill_replay(self, saved: dict | None) -> dict | None:
        """Fill the replay as it was when a signal stopped the run, or else from recorded episodes.

        Returns the moment of that stop, if the episodes under way can be gone on with too.
        """
        recorder, folder = self.recorder, self.config.offline_traindir
        if self.first:
            weights = sum(weight.numel() for weight in self.learner.dreamer.parameters())
            parts = f"{self.env.n_agents} agents, {weights:,} weights"
            size = f"a replay of {recorder.replay.nbytes / 2**20:,.0f} MiB"
            where = f"on {self.env.device}"
            print(f"{self.config.task}: {parts}, {size}, {where}", file=sys.stderr)
        moment = self._take_up(saved) if saved and distributed.ranks() == 1 else None
        if moment and self.checkpoints.load_replay(saved, recorder.rings):
            return moment
        if saved or folder:
            recorder.load(self.learner.dreamer, folder)
        return None

    def _take_up(self, saved: dict) -> dict | None:
        """The moment at which a signal stopped the run, with the environment as it was then.

        None if there is none, or its episodes and replay are not those of this run any more.
        """
        if saved["random"][0]["env"]["device"] != self.env.device.type:
            return None
        moment = self.checkpoints.load_moment(saved, self.env.device)
        if moment is None:
            return None
        try:
            check_compatible(moment["settings"], self.config, EXACT)
            if not self.env.is_of_this_code(moment["env"]):
                raise UserError(f"the code of {self.config.task} has changed since the run stopped")
            self.env.load_state_dict(moment["env"])
        except (UserError, ValueError) as error:
            warnings.warn(f"{error}; going on from the recorded episodes", stacklevel=2)
            return None
        return moment
