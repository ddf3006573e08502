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

import distributed
from build import FIXED, LATENTS, check_reward, check_values, make_dreamer, make_env
from config import Config, check_compatible, load_config, read_yaml, save_config
from envs.vmas import ScenarioError, Vmas
from learner import Learner
from models import Dreamer
from recorder import Recorder
from replay import EpisodeFolder, Replay
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
    tile,
)

EVAL_SEED = 1_000_000  # evaluation's scenes are never those of training
EVAL_KEPT = 4  # episodes of an evaluation that are recorded and shown
OPEN_LOOP = 50  # steps of the gif that shows predictions
Rows = dict[str, Tensor]


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


def train(
    config: Config,
    logdir: Path,
    env: Vmas,
    learner: Learner,
    recorder: Recorder,
    saved: dict | None,
) -> None:
    """Alternate rollout and training until the steps are used up or a signal asks to stop.

    `config` holds the totals of all ranks (see `distributed.py`), of which the first one reports.
    """
    first = distributed.rank() == 0
    replay, batch, length = recorder.replay, config.batch_size, config.batch_length
    print(f"replay: {replay.nbytes / 2**20:,.0f} MiB on {env.device}", file=sys.stderr)
    step, owed = (saved["step"], saved["owed"]) if saved else (0, 0.0)
    if saved and distributed.rank() < len(saved["random"]):
        restore_random_states(saved["random"][distributed.rank()], env, replay)
    logger = Logger(logdir, step) if first else distributed.Muted()
    shown = config.steps, step, config.log_every, learner.updates
    progress = Progress(*shown) if first else distributed.Muted()
    meter = Meter(env, batch * length, step, learner.updates)
    periods = (config.log_every, config.eval_every, config.save_every)
    should_log, should_evaluate, should_save = (Every(period, step) for period in periods)
    player = Player(env, learner.dreamer, explore=True)
    row_steps = config.envs * config.action_repeat

    with GracefulExit() as own:
        stop = distributed.Agreed(own)
        while step < config.steps and not stop.requested:
            if not config.offline_traindir:
                rows = player.step(random=step < config.prefill)
                recorder.add(rows)
                meter.tally.add(rows)
            step += row_steps
            if step >= config.prefill or config.offline_traindir:
                owed += row_steps * config.train_ratio / (batch * length)
            ready = min(distributed.gather(replay.steps_per_copy)) > length
            while owed >= 1 and ready and not stop.requested:
                owed -= 1
                logger.scalars(learner.update(replay, batch // distributed.ranks(), length))
                if learner.updates % config.probe.every == 0 and recorder.can_draw(length):
                    few = config.probe.batch_size
                    logger.scalars(learner.update_probe(recorder.pictures, few, length))
            finished, returns = step >= config.steps, {}
            if (evaluated := should_evaluate(step) or finished) and first:
                evaluate(config, learner.dreamer, logdir / "eval_eps", logger)
                show_predictions(recorder.pictures, learner.dreamer, logger)
            if should_log(step) or evaluated:
                logger.scalars(meter.take(step, learner.updates))
                figures = logger.write(step)
                returns = {k: figures[k] for k in ("train_return", "eval_return") if k in figures}
            progress.update(step, learner.updates, **returns)
            if should_save(step) or finished or stop.requested:
                random = distributed.gather(random_states(env, replay))
                state = {"step": step, "owed": owed, "random": random, **learner.state_dict()}
                if first:
                    save_checkpoint(logdir / "latest.pt", state)
    for closing in (progress, recorder.folder, logger):
        closing.close()


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
    logger.video("eval_policy", tile(frames, columns=few))


def show_predictions(pictures: Replay, dreamer: Dreamer, logger: Logger) -> None:
    """Log a gif of what the world model expects of recorded episodes, beside the truth."""
    if dreamer.draws and pictures.steps_per_copy > OPEN_LOOP:
        batch = pictures.sample_episode_starts(6, OPEN_LOOP)
        logger.video("train_openl", dreamer.video_pred(batch))


def evaluate_run(config: Config, dreamer: Dreamer, logdir: Path) -> None:
    """Play, write `eval.gif`, and print a line of JSON."""
    returns, lengths, frames = play(config, dreamer, 256, 4, lambda rows: None)
    with replacing(logdir / "eval.gif") as file:
        file.write(encode_gif(tile(frames, columns=2), fps=20))
    team = returns.mean(-1)
    error = team.std().item() / len(team) ** 0.5 if len(team) > 1 else None
    figures = {
        "eval_return_mean": team.mean().item(),
        "eval_return_ci95": error and 1.96 * error,
        "eval_length_mean": lengths.mean().item(),
        "episodes": len(team),
    }
    print(json.dumps(figures))


def main(argv: list[str]) -> None:
    """Do what the command line asks for. Raises `UserError` and `ScenarioError`."""
    settings = Path(__file__).with_name("configs.yaml")
    config = load_config(argv, settings)
    logdir = Path(config.logdir)
    if config.eval_only:  # a trained team is played with the settings that it was trained with
        config = load_config(argv, settings, saved=logdir / "config.yaml")
    check_values(config)
    own = distributed.join(config)
    device = resolve_device(own.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(own, device, own.envs, own.seed, training=True)
    learner = Learner(own, make_dreamer(own, env))
    saved = find_checkpoint(config, logdir, device)
    if saved:
        learner.load_state_dict(saved)
    if config.eval_only:
        if not saved:
            raise UserError(f"--logdir {logdir}: there is no latest.pt to evaluate")
        if not distributed.rank():
            evaluate_run(config, learner.dreamer, logdir)
        return
    if not saved:
        check_reward(config)
    if rank := distributed.rank():
        torch.manual_seed(own.seed)  # after the weights, which all ranks begin with
    recorder = Recorder(own, env, logdir / f"rank{rank}" if rank else logdir)
    if config.offline_traindir or saved:
        recorder.load(learner.dreamer, config.offline_traindir)
    make_logdir(logdir)
    if not rank:
        save_config(config, logdir / "config.yaml")
    train(config, logdir, env, learner, recorder, saved)
    distributed.leave()


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
