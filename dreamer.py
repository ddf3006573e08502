"""Train a team of Dreamers: one world model, one critic and an actor per agent.

python dreamer.py --configs vmas --task vmas_simple_spread --logdir ./logdir/vmas_simple_spread
"""

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from build import EXACT, FIXED, LATENTS, check_reward, check_values, make_dreamer, make_env
from checkpoint import Checkpoints, load_training, sole_writer
from config import Config, check_compatible, load_config, read_yaml, save_config
from envs.vmas import ScenarioError, Vmas
from episodes import EpisodeFolder
from learner import Learner
from models import Dreamer
from recorder import Recorder
from replay import Replay
from rollout import Meter, Player, play_episodes, summarise
from tools import (
    GracefulExit,
    Logger,
    Progress,
    UserError,
    encode_gif,
    get_random_state,
    replacing,
    resolve_device,
    set_random_state,
    tile,
)

EVAL_SEED = 1_000_000  # evaluation's scenes are never those of training
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


def train(
    config: Config,
    logdir: Path,
    env: Vmas,
    learner: Learner,
    checkpoints: Checkpoints,
    saved: dict | None,
) -> None:
    """Alternate rollout and training until the steps are used up or a signal asks to stop."""
    begin, owed = (saved["step"], saved["owed"]) if saved else (0, 0.0)
    row_steps = config.envs * config.action_repeat
    replayed = config.batch_size * config.batch_length
    recorder, moment = take_up(config, logdir, env, learner, checkpoints, saved)
    player, meter, logger = moment["player"], moment["meter"], moment["logger"]
    progress = Progress(config.steps, begin, config.log_every, learner.updates)
    periods = (config.log_every, config.eval_every, config.save_every)
    should_log, should_evaluate, should_save = (Every(period, begin) for period in periods)

    step = begin
    with GracefulExit() as stop, closing(logger), closing(recorder.folder), closing(progress):
        while step < config.steps and not stop.requested:
            if not config.offline_traindir:
                rows = player.step(random=step < config.prefill)
                recorder.add(rows)
                meter.tally.add(rows)
            step += row_steps
            if step >= config.prefill or config.offline_traindir:
                owed += row_steps * config.train_ratio / replayed
            while owed >= 1 and recorder.replay.steps_per_copy > config.batch_length:
                owed -= 1
                logger.scalars(learner.learn(recorder))
            figures = {}
            if evaluated := should_evaluate(step) or step >= config.steps:
                evaluate(config, learner.dreamer, logdir / "eval_eps", logger)
                show_predictions(recorder.pictures, learner.dreamer, logger)
            if should_log(step) or evaluated:
                logger.scalars(meter.take(step, learner.updates))
                figures = logger.write(step)
                learner.check(figures, recorder.replay)
            returns = {key: figures[key] for key in figures if key in RETURNS}
            progress.update(step, learner.updates, **returns)
            if should_save(step) and step < config.steps:
                checkpoints.try_save(state_of(step, owed, learner, env, recorder.replay))
        if step > begin:
            state = state_of(step, owed, learner, env, recorder.replay)
            if stop.requested:
                state["settings"] = config.as_dict()
                state["moment"] = {name: part.state_dict() for name, part in moment.items()}
            checkpoints.save(state, recorder.rings if stop.requested else None)


def take_up(
    config: Config,
    logdir: Path,
    env: Vmas,
    learner: Learner,
    checkpoints: Checkpoints,
    saved: dict | None,
) -> tuple[Recorder, dict]:
    """The recorder, and by name the parts of a run that remember, as they were if `saved` tells."""
    recorder = Recorder(config, env, logdir)
    exact = load_replay(config, saved, checkpoints, recorder, learner.dreamer)
    save_config(config, logdir / "config.yaml")
    step, replayed = saved["step"] if saved else 0, config.batch_size * config.batch_length
    moment = {
        "env": env,
        "player": Player(env, learner.dreamer, explore=True),
        "meter": Meter(env, replayed, step, learner.updates),
        "logger": Logger(logdir, step),
        "folder": recorder.folder,
    }
    if exact:
        for name, part in moment.items():
            part.load_state_dict(saved["moment"][name])
    if saved:
        restore_random_states(saved["random"], env, recorder.replay)
    return recorder, moment


def state_of(step: int, owed: float, learner: Learner, env: Vmas, replay: Replay) -> dict:
    """What every checkpoint holds."""
    random = random_states(env, replay)
    return {"step": step, "owed": owed, "random": random, **learner.state_dict()}


def load_replay(
    config: Config,
    saved: dict | None,
    checkpoints: Checkpoints,
    recorder: Recorder,
    dreamer: Dreamer,
) -> bool:
    """Fill the replay as it was when a signal stopped the run, or else from recorded episodes.

    Returns whether it is as it was, so that the episodes under way can be gone on with too.
    """
    device, mib = recorder.env.device, recorder.replay.nbytes / 2**20
    print(f"replay: {mib:,.0f} MiB on {device}", file=sys.stderr)
    alike = saved and is_alike(saved, config, recorder.env)
    if alike and checkpoints.load_replay(saved, recorder.rings):
        return True
    if saved or config.offline_traindir:
        recorder.load(dreamer, config.offline_traindir)
    return False


def is_alike(saved: dict, config: Config, env: Vmas) -> bool:
    """Whether a signal stopped the run, and it goes on with what shapes its episodes and replay."""
    if "moment" not in saved or saved["random"]["env"]["device"] != env.device.type:
        return False
    try:
        check_compatible(saved["settings"], config, EXACT)
    except UserError as error:
        warnings.warn(f"{error}; going on from the recorded episodes", stacklevel=2)
        return False
    return True


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
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(config, device, config.envs, config.seed, training=True)
    learner, checkpoints = Learner(config, make_dreamer(config, env)), Checkpoints(logdir)
    if (logdir / "config.yaml").exists():
        check_compatible(read_yaml(logdir / "config.yaml"), config, FIXED)
    if config.eval_only:
        if not (saved := checkpoints.load(device)):
            raise UserError(f"--logdir {logdir}: there is no latest.pt to evaluate")
        learner.load_weights(saved, str(logdir))
        evaluate_run(config, learner.dreamer, logdir)
        return
    with sole_writer(logdir):
        if saved := checkpoints.load(device):
            learner.load_state_dict(saved, str(logdir))
        else:
            check_reward(config)
        if config.from_checkpoint and not saved:
            source = Path(config.from_checkpoint)
            learner.load_weights(load_training(source, device), f"--from_checkpoint {source}")
        train(config, logdir, env, learner, checkpoints, saved)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ScenarioError) as error:
        print(f"dreamer.py: {error}", file=sys.stderr)
        sys.exit(2)
