"""Train a team of Dreamers: one world model, one critic and an actor per agent.

python dreamer.py --configs vmas --task vmas_simple_spread --logdir ./logdir/vmas_simple_spread
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

import distributed
from build import (
    FIXED,
    NETWORKS,
    check_reward,
    check_values,
    make_dreamer,
    make_env,
    set_up_torch,
    share,
)
from checkpoint import Checkpoints, load_training, sole_writer
from config import Config, check_compatible, load_config, read_yaml
from envs.scenarios import ScenarioError
from episodes import EpisodeFolder
from gifs import GIF_FRAMES, encode_gif, tile
from latents import LATENTS
from learner import Learner
from models import Dreamer
from replay import Replay
from rollout import Episodes, play_episodes, summarise
from run import Run
from tools import GracefulExit, Logger, UserError, readable, replacing, resolve_device

EVAL_SEED = 1_000_000  # evaluation's scenes are never those of training
EVAL_DRAWS = 2**29  # from its seed to that of the states that it draws: another stream than scenes
EVAL_KEPT = 4  # episodes of an evaluation that are recorded and shown
RETURNS = ("train_return", "eval_return")  # shown beside the progress
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


def train(config: Config, logdir: Path, learner: Learner, run: Run) -> None:
    """Alternate rollout and training until the steps are used up or a signal asks to stop.

    Every rank does (see `distributed.py`): all step and learn, the first one reports and saves.
    """
    recorder, meter, logger, begin = run.recorder, run.meter, run.logger, run.step
    row_steps = config.envs * config.action_repeat
    replayed = config.batch_size * config.batch_length
    periods = (config.log_every, config.eval_every, config.save_every)
    should_log, should_evaluate, should_save = (Every(period, begin) for period in periods)

    with GracefulExit() as stop, closing(logger), closing(recorder.folder), closing(run.progress):
        while run.step < config.steps and not distributed.anywhere(stop.requested):
            if not config.offline_traindir:
                rows = run.player.step(random=run.step < config.prefill)
                recorder.add(rows)
                meter.tally.add(rows)
            run.step += row_steps
            too_few = distributed.anywhere(recorder.replay.steps_per_copy <= config.batch_length)
            if not too_few:
                run.owed += row_steps * config.train_ratio / replayed
            while run.owed >= 1:
                run.owed -= 1
                logger.scalars(learner.learn(recorder))
            if should_save(run.step) and run.step < config.steps:
                run.save()  # before an evaluation, which may take longer than a killer waits
            figures = {}
            evaluated = should_evaluate(run.step) or run.step >= config.steps
            if evaluated and run.first:
                evaluate(config, learner.dreamer, logdir / "eval_eps", logger)
                show_predictions(recorder.pictures, learner.dreamer, logger)
            if should_log(run.step) or evaluated:
                logger.scalars(meter.take(run.step, learner.updates))
                figures = logger.write(run.step)
                learner.check(figures, recorder.replay)
            returns = {key: figures[key] for key in figures if key in RETURNS}
            run.progress.update(run.step, learner.updates, **returns)
        if run.step > begin:
            run.end(stopped=distributed.anywhere(stop.requested))
    if run.step > begin and run.first:
        with suppress(OSError):  # whoever read it may be gone
            done = f"step {run.step:,}, after {learner.updates:,} updates"
            print(f"{done}, is saved in {logdir}", file=sys.stderr)


def play(
    config: Config, dreamer: Dreamer, size: int, copies: int, keep: Callable[[Rows], None]
) -> tuple[Episodes, Tensor]:
    """Play `eval_episode_num` episodes with the actors' modes, in scenes of their own.

    Random states outside are left as they were. Returns them, and frames (T, copies, size, size,
    3) of some copies of the first round, as many as a gif shows; `keep` gets all rows of it.
    """
    seed, count, frames = EVAL_SEED + config.seed, config.eval_episode_num, []
    env = make_env(config, dreamer.device, min(config.eval_envs, count), seed)

    def watch(rows: Rows) -> None:
        if len(frames) < GIF_FRAMES:
            frames.append(env.render(size, copies=min(copies, env.num_envs), legible=True))
        keep(rows)

    with draws_of_its_own(dreamer.device, seed + EVAL_DRAWS):
        episodes = play_episodes(env, dreamer, count, watch)
    return episodes, torch.stack(frames)


@contextmanager
def draws_of_its_own(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch inside, and leave its random states outside as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def evaluate(config: Config, dreamer: Dreamer, folder: Path, logger: Logger) -> None:
    """Log how the team does now; a few of the episodes go to a gif and to the folder."""
    few = min(config.eval_envs, config.eval_episode_num, EVAL_KEPT)
    recorded = None

    def keep(rows: Rows) -> None:
        nonlocal recorded
        some = {key: value[:few] for key, value in rows.items() if key not in LATENTS}
        if recorded is None:
            spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in some.items()}
            recorded = EpisodeFolder(folder, few * config.time_limit, spaces)
        recorded.add(some)

    episodes, frames = play(config, dreamer, 128, few, keep)
    recorded.close()
    logger.scalars(summarise(episodes, "eval"))
    logger.video("eval_policy", tile(frames, columns=few))


def show_predictions(pictures: Replay, dreamer: Dreamer, logger: Logger) -> None:
    """Log a gif of what the world model expects of recorded episodes, beside the truth."""
    if not dreamer.draws or pictures.steps_per_copy <= OPEN_LOOP:
        return
    sampler = pictures.random_state()
    with draws_of_its_own(dreamer.device, EVAL_SEED):
        logger.video("train_openl", dreamer.video_pred(pictures.sample_episodes(6, OPEN_LOOP)))
    pictures.set_random_state(sampler)


def evaluate_run(config: Config, dreamer: Dreamer, logdir: Path) -> None:
    """Play, write `eval.gif`, and print a line of JSON."""
    episodes, frames = play(config, dreamer, 256, 4, lambda rows: None)
    with replacing(logdir / "eval.gif") as file:
        file.write(encode_gif(tile(frames, columns=2), fps=20))
    team = episodes.returns.mean(-1)
    error = team.std().item() / len(team) ** 0.5 if len(team) > 1 else None
    figures = {
        "eval_return_mean": team.mean().item(),
        "eval_return_ci95": error and 1.96 * error,
        "eval_length_mean": episodes.lengths.mean().item(),
        "episodes": len(team),
    }
    more = summarise(episodes, "eval")
    figures |= {key: more[key] for key in more if key not in ("eval_return", "eval_length")}
    print(json.dumps(figures))


def keep_origin(config: Config, begun: dict) -> Config:
    """The settings with the `from_checkpoint` that the run has `begun` with, if none is given now.

    Raises `UserError` if another is given.
    """
    source, origin = config.from_checkpoint, begun.get("from_checkpoint", "")
    if source not in ("", origin):
        holds = f"{config.logdir} holds a run that began otherwise"
        raise UserError(f"--from_checkpoint {source}: {holds}; expected another --logdir")
    return Config(config.as_dict() | {"from_checkpoint": origin})


def take_up(config: Config, learner: Learner, saved: dict | None) -> None:
    """Give the learner what a run `saved`, or a new run the networks that it is to start from.

    Raises `UserError` if something does not fit.
    """
    if saved:
        learner.load_state_dict(saved, config.logdir)
        return
    check_reward(config)
    if source := config.from_checkpoint:
        state = load_training(Path(source), learner.dreamer.device)
        learner.load_weights(state, f"--from_checkpoint {source}")


def main(argv: list[str]) -> None:
    """Do what the command line asks for. Raises `UserError`, `ScenarioError` and `RankLost`."""
    settings = Path(__file__).with_name("configs.yaml")
    config = load_config(argv, settings)
    logdir = readable(Path(config.logdir), "--logdir")
    written = logdir / "config.yaml"
    if config.eval_only and not written.exists():
        raise UserError(f"--logdir {logdir}: there is no run to evaluate")
    presets = any(word.partition("=")[0] == "--configs" for word in argv)
    if written.exists() and (config.eval_only or not presets):
        # A trained team is played with the settings that it was trained with, and goes on so.
        config = load_config(argv, settings, saved=written)
    check_values(config)
    own = share(config, *distributed.started())  # `config` holds the totals of all ranks
    device = resolve_device(distributed.join(config.device))
    set_up_torch(config)
    torch.manual_seed(config.seed)  # all ranks begin with the same weights
    env = make_env(own, device, own.envs, own.seed, training=True)
    learner, checkpoints = Learner(own, make_dreamer(own, env)), Checkpoints(logdir)
    begun = read_yaml(written) if written.exists() else {}
    if begun:
        try:
            check_compatible(begun, config, NETWORKS if config.eval_only else FIXED)
        except UserError as error:
            repeat = "expected its own settings again, no --configs, or another --logdir"
            raise UserError(f"--logdir {logdir}: {error}; {repeat}") from None
        config = keep_origin(config, begun)
    if config.eval_only:
        if not (saved := checkpoints.load(device)):
            raise UserError(f"--logdir {logdir}: there is no latest.pt to evaluate")
        learner.load_weights(saved, str(logdir))
        if distributed.rank() == 0:
            evaluate_run(config, learner.dreamer, logdir)
        return
    with distributed.first_enters(sole_writer(logdir)):
        saved = checkpoints.load(device)
        take_up(config, learner, saved)
        if saved and saved["step"] >= config.steps:
            if distributed.rank() == 0:
                print(f"{logdir} has its {saved['step']:,} steps; give a larger --steps for more")
            return
        if distributed.rank():
            torch.manual_seed(own.seed)
        run = Run(config, own, logdir, env, learner, checkpoints, saved)
        del saved  # as much again as is learned
        train(config, logdir, learner, run)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        distributed.leave()
    except (UserError, ScenarioError, distributed.RankLost) as error:
        print(f"dreamer.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside of training, which saves first
        sys.exit(130)
