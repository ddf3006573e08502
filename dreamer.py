"""Train a team of Dreamers: one world model, one critic and an actor per agent.

python dreamer.py --configs vmas --task vmas_simple_spread --logdir ./logdir/vmas_simple_spread
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from build import FIXED, check_values, make_dreamer, make_env, row_spaces
from config import Config, check_compatible, load_config, read_yaml, save_config
from envs.vmas import ScenarioError, Vmas
from models import Dreamer
from optimizer import LaProp
from replay import EpisodeFolder, Replay, fill
from rollout import Player, Tally, play_episodes, summarise
from tools import (
    GracefulExit,
    Logger,
    Progress,
    UserError,
    encode_gif,
    get_random_state,
    load_checkpoint,
    replacing,
    resolve_device,
    save_checkpoint,
    set_random_state,
)

EVAL_SEED = 1_000_000  # evaluation's scenes are never those of training
EVAL_KEPT = 4  # episodes of an evaluation that are recorded and shown
OPEN_LOOP = 50  # steps of the gif that shows predictions
LATENTS = ("deter", "stoch")
Rows = dict[str, Tensor]


class Learner:
    """The networks with their optimisers; a call of `update` is one step of training."""

    def __init__(self, config: Config, dreamer: Dreamer):
        self.dreamer, self.updates = dreamer, 0
        behavior = dreamer.behavior
        groups = [
            {"params": behavior.actors.parameters(), "lr": config.actor.lr},
            {"params": behavior.critic.parameters(), "lr": config.critic.lr},
        ]
        self.optimizers = {
            "model": LaProp(dreamer.world.parameters(), **config.model.as_dict()),
            "behavior": LaProp(groups, **config.behavior.as_dict()),
        }
        if dreamer.probe:
            self.optimizers["probe"] = LaProp(dreamer.probe.parameters(), lr=config.probe.lr)

    def update(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Learn from a batch of replayed sequences; the metrics stay on the device."""
        data, index = replay.sample(batch, length)
        loss, state, metrics = self.dreamer.losses(data)
        self._descend(loss, ("model", "behavior"), metrics)
        self.dreamer.behavior.update_slow()
        replay.write_back(index, self.dreamer.world.rssm.pack(state))
        self.updates += 1
        return metrics

    def update_probe(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Teach the image head what the states of a few sequences look like."""
        data, index = replay.sample(batch, length)
        state = self.dreamer.infer(data)
        feat = self.dreamer.world.rssm.features(state)
        loss = self.dreamer.probe.loss(feat, data["image"]).mean()
        metrics = {"image_loss": loss.detach()}
        self._descend(loss, ("probe",), metrics)
        replay.write_back(index, self.dreamer.world.rssm.pack(state))
        return metrics

    def _descend(self, loss: Tensor, names: tuple[str, ...], metrics: dict[str, Tensor]) -> None:
        for name in names:
            self.optimizers[name].zero_grad()
        loss.backward()
        for name in names:
            metrics[f"{name}_grad_norm"] = self.optimizers[name].step()

    def state_dict(self) -> dict:
        """All that is learned, for a checkpoint."""
        return {
            "dreamer": self.dreamer.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.dreamer.load_state_dict(state["dreamer"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.updates = state["updates"]


class Recorder:
    """Where rows go: the replay, the folder of episodes, and the few with images for the probe."""

    def __init__(self, config: Config, env: Vmas, logdir: Path):
        spaces = row_spaces(config, env, image=bool(env.image_size))
        self.env = env
        self.replay = self._ring(config.dataset_size, config.envs, spaces, config.seed)
        recorded = {key: space for key, space in spaces.items() if key not in LATENTS}
        self.folder = EpisodeFolder(logdir / "train_eps", config.dataset_size, recorded)
        self.pictures, self.pictured = self.replay, 0
        if not env.image_size and config.probe.envs:
            spaces = row_spaces(config, env, image=True)
            self.pictured = min(config.probe.envs, config.envs)
            size = config.probe.dataset_size
            self.pictures = self._ring(size, self.pictured, spaces, config.seed)

    def _ring(self, capacity: int, copies: int, spaces: dict, seed: int) -> Replay:
        return Replay(capacity, copies, spaces, self.env.device, seed, LATENTS)

    def add(self, rows: Rows) -> None:
        """Take in the next row of every copy."""
        self.replay.add(rows)
        self.folder.add(rows)
        if self.pictured:
            image = self.env.render(copies=self.pictured)
            some = {key: value[: self.pictured] for key, value in rows.items()}
            self.pictures.add(some | {"image": image})

    def can_draw(self, length: int) -> bool:
        """Whether there are pictures of their own to teach the probe with."""
        return self.pictured > 0 and self.pictures.steps_per_copy > length

    def load(self, dreamer: Dreamer, folder: Path | None = None, chunk: int = 64) -> None:
        """Take up recorded episodes again; the world model infers their latents anew."""
        own = self.folder
        source = EpisodeFolder(folder, own.limit_steps, own.spaces) if folder else own
        if fill(self.replay, source.load(own.limit_steps)):
            for data, index in self.replay.streams(chunk):
                self.replay.write_back(index, dreamer.world.rssm.pack(dreamer.infer(data)))


class Every:
    """True once each time that another `period` steps have gone by."""

    def __init__(self, period: int, step: int):
        self.period, self.last = period, step

    def __call__(self, step: int) -> bool:
        due = step // self.period > self.last // self.period
        self.last = step
        return due


class Meter:
    """What happened since the last report: finished episodes, speed, the achieved train ratio."""

    def __init__(self, env: Vmas, replayed: int, step: int, updates: int):
        self.tally = Tally(env.num_envs, env.n_agents, env.device)
        self.replayed = replayed  # steps an update
        self.last = step, updates, time.monotonic()

    def take(self, step: int, updates: int) -> dict[str, float]:
        """Metrics since the last call."""
        now = step, updates, time.monotonic()
        steps, updates, seconds = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        return {
            **summarise(*self.tally.take(), "train"),
            "fps": steps / seconds,
            "updates_per_second": updates / seconds,
            "train_ratio": updates * self.replayed / max(steps, 1),
        }


def train(config: Config, logdir: Path, env: Vmas, learner: Learner, saved: dict | None) -> None:
    """Alternate rollout and training until the steps are used up or a signal asks to stop."""
    recorder = Recorder(config, env, logdir)
    replay, batch, length = recorder.replay, config.batch_size, config.batch_length
    print(f"replay: {replay.nbytes / 2**20:,.0f} MiB on {env.device}", file=sys.stderr)
    load_episodes(config, recorder, learner.dreamer, resuming=saved is not None)
    step, owed = (saved["step"], saved["owed"]) if saved else (0, 0.0)
    if saved:
        restore_random_states(saved["random"], env, replay)
    logger = Logger(logdir, step)
    progress = Progress(config.steps, step, config.log_every, learner.updates)
    meter = Meter(env, batch * length, step, learner.updates)
    periods = (config.log_every, config.eval_every, config.save_every)
    should_log, should_evaluate, should_save = (Every(period, step) for period in periods)
    player = Player(env, learner.dreamer, explore=True)
    row_steps = config.envs * config.action_repeat

    with GracefulExit() as stop:
        while step < config.steps and not stop.requested:
            if not config.offline_traindir:
                rows = player.step(random=step < config.prefill)
                recorder.add(rows)
                meter.tally.add(rows)
            step += row_steps
            if step >= config.prefill and replay.steps_per_copy > length:
                owed += row_steps * config.train_ratio / (batch * length)
            while owed >= 1 and not stop.requested:
                owed -= 1
                logger.scalars(learner.update(replay, batch, length))
                if learner.updates % config.probe.every == 0 and recorder.can_draw(length):
                    few = config.probe.batch_size
                    logger.scalars(learner.update_probe(recorder.pictures, few, length))
            finished = step >= config.steps
            if evaluated := should_evaluate(step) or finished:
                evaluate(config, learner.dreamer, logdir / "eval_eps", logger)
                show_predictions(recorder.pictures, learner.dreamer, logger)
            if should_log(step) or evaluated:
                logger.scalars(meter.take(step, learner.updates))
                figures = logger.write(step)
                returns = {k: figures[k] for k in ("train_return", "eval_return") if k in figures}
                progress.update(step, learner.updates, **returns)
            progress.update(step, learner.updates)
            if should_save(step) or finished or stop.requested:
                random = random_states(env, replay)
                state = {"step": step, "owed": owed, "random": random, **learner.state_dict()}
                save_checkpoint(logdir / "latest.pt", state)
    for closing in (progress, recorder.folder, logger):
        closing.close()


def load_episodes(config: Config, recorder: Recorder, dreamer: Dreamer, resuming: bool) -> None:
    """Fill the replay with what the run recorded before, or with the offline episodes."""
    if config.offline_traindir:
        recorder.load(dreamer, Path(config.offline_traindir))
        if recorder.replay.steps_per_copy <= config.batch_length:
            raise UserError(
                f"--offline_traindir {config.offline_traindir}: expected at least "
                f"{config.envs * (config.batch_length + 1)} steps in episodes of this task"
            )
    elif resuming:
        recorder.load(dreamer)


def random_states(env: Vmas, replay: Replay) -> dict:
    """Every source of chance in a run."""
    return {
        "process": get_random_state(),
        "env": env.random_state(),
        "replay": replay.random_state(),
    }


def restore_random_states(states: dict, env: Vmas, replay: Replay) -> None:
    """Go on with what `random_states` returned."""
    set_random_state(states["process"])
    env.set_random_state(states["env"])
    replay.set_random_state(states["replay"])


def play(
    config: Config, dreamer: Dreamer, size: int, copies: int, keep: Callable[[Rows], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Play `eval_episode_num` episodes with the actors' modes, in scenes of their own.

    Random states outside are left as they were. Returns the agents' returns (episodes, N),
    lengths (episodes,) and frames (T, copies, size, size, 3) of some copies; `keep` gets all rows.
    """
    seed, frames = EVAL_SEED + config.seed, []
    env = make_env(config, dreamer.device, config.eval_episode_num, seed)

    def watch(rows: Rows) -> None:
        frames.append(env.render(size, copies=min(copies, env.num_envs), legible=True))
        keep(rows)

    gpu = [dreamer.device] if dreamer.device.type == "cuda" else []
    with torch.random.fork_rng(gpu):
        torch.manual_seed(seed)
        returns, lengths = play_episodes(env, dreamer, watch)
    return returns, lengths, torch.stack(frames)


def evaluate(config: Config, dreamer: Dreamer, folder: Path, logger: Logger) -> None:
    """Log how the team does now; a few of the episodes go to a gif and to the folder."""
    few = min(config.eval_episode_num, EVAL_KEPT)
    recorded = None

    def keep(rows: Rows) -> None:
        nonlocal recorded
        some = {key: value[:few] for key, value in rows.items() if key not in LATENTS}
        if recorded is None:
            spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in some.items()}
            recorded = EpisodeFolder(folder, few * config.time_limit, spaces)
        recorded.add(some)

    returns, lengths, frames = play(config, dreamer, 128, few, keep)
    recorded.close()
    logger.scalars(summarise(returns, lengths, "eval"))
    logger.video("eval_policy", torch.cat(list(frames.unbind(1)), 2))


def show_predictions(pictures: Replay, dreamer: Dreamer, logger: Logger) -> None:
    """Log a gif of what the world model expects of recorded episodes, beside the truth."""
    if dreamer.draws and pictures.steps_per_copy > OPEN_LOOP:
        batch = pictures.sample_episode_starts(6, OPEN_LOOP)
        logger.video("train_openl", dreamer.video_pred(batch))


def evaluate_run(config: Config, dreamer: Dreamer, logdir: Path) -> None:
    """Play, write `eval.gif`, and print a line of JSON."""
    returns, lengths, frames = play(config, dreamer, 256, 4, lambda rows: None)
    with replacing(logdir / "eval.gif") as file:
        file.write(encode_gif(tile(frames), fps=20))
    team = returns.mean(-1)
    spread = team.std().item() if len(team) > 1 else float("nan")
    figures = {
        "eval_return_mean": team.mean().item(),
        "eval_return_ci95": 1.96 * spread / len(team) ** 0.5,
        "eval_length_mean": lengths.mean().item(),
        "episodes": len(team),
    }
    print(json.dumps(figures))


def tile(frames: Tensor) -> Tensor:
    """Frames (T, copies, h, w, 3) side by side, two in a row where they pair up."""
    rows = frames.split(2, 1) if frames.shape[1] % 2 == 0 else [frames]
    return torch.cat([torch.cat(list(row.unbind(1)), 2) for row in rows], 1)


def main(argv: list[str]) -> None:
    """Do what the command line asks for. Raises `UserError` and `ScenarioError`."""
    settings = Path(__file__).with_name("configs.yaml")
    config = load_config(argv, settings)
    logdir = Path(config.logdir)
    if config.eval_only:  # a trained team is played with the settings that it was trained with
        config = load_config(argv, settings, saved=logdir / "config.yaml")
    check_values(config)
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(config, device, config.envs, config.seed)
    learner = Learner(config, make_dreamer(config, env))
    saved = find_checkpoint(config, logdir, device)
    if saved:
        learner.load_state_dict(saved)
    if config.eval_only:
        if not saved:
            raise UserError(f"--logdir {logdir}: there is no latest.pt to evaluate")
        evaluate_run(config, learner.dreamer, logdir)
        return
    make_logdir(logdir)
    save_config(config, logdir / "config.yaml")
    train(config, logdir, env, learner, saved)


def find_checkpoint(config: Config, logdir: Path, device: torch.device) -> dict | None:
    """The state that the run in `logdir` was left in, if there is one and it fits."""
    if (logdir / "config.yaml").exists():
        check_compatible(read_yaml(logdir / "config.yaml"), config, FIXED)
    if not (logdir / "latest.pt").exists():
        return None
    return load_checkpoint(logdir / "latest.pt", device)


def make_logdir(logdir: Path) -> None:
    try:
        logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logdir {logdir}: {error.strerror}") from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ScenarioError) as error:
        print(f"dreamer.py: {error}", file=sys.stderr)
        sys.exit(2)
