"""MAPPO and IDDPG of BenchMARL, measured as dreamer.py measures its teams.

    pip install -r benchmarks/requirements-baseline.txt   # in an environment of its own
    python benchmarks/benchmarl_baseline.py --algorithm mappo --task vmas_balance --frames 240000 \
        --seed 0 --output benchmarks/runs/balance-mappo-s0.jsonl

Tasks have BenchMARL's arguments, and algorithms its settings for VMAS (`fine_tuned/vmas`: discount
0.9, 600 copies, 60,000 frames a batch of MAPPO in minibatches of 4,096). The batch alone differs,
because two updates in 120,000 frames say little: without `--published` MAPPO collects 6,000 frames
from 60 copies, in minibatches of 400, as BenchMARL's base configuration does.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarl.algorithms import IddpgConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict import TensorDictBase

ALGORITHMS = {"mappo": MappoConfig, "iddpg": IddpgConfig}


class Metrics(Callback):
    """Writes the lines of a `metrics.jsonl`; steps are counted over copies, not times agents."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path  # not a file: BenchMARL pickles its callbacks
        path.write_text("")
        self.last = 0, time.monotonic()

    def on_evaluation_end(self, rollouts: list[TensorDictBase]) -> None:
        """One line from the episodes of an evaluation, which are cut at their first end."""
        groups = self.experiment.group_map
        rewards = [  # (T, N) an episode
            torch.cat([episode["next", group, "reward"] for group in groups], -2).squeeze(-1)
            for episode in rollouts
        ]
        now = self.experiment.total_frames, time.monotonic()
        steps, seconds = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        line = {
            "step": now[0],
            "eval_return": sum(r.sum(0).mean().item() for r in rewards) / len(rewards),
            "eval_length": sum(len(r) for r in rewards) / len(rewards),
            "fps": steps / seconds,
        }
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)


def settings(args: argparse.Namespace, folder: str) -> ExperimentConfig:
    """BenchMARL's settings for VMAS, with the batch and the evaluation that were asked for."""
    config = ExperimentConfig.get_from_yaml()
    config.gamma = 0.9
    config.exploration_anneal_frames = 1_000_000
    config.off_policy_n_envs_per_worker = 60
    if args.published:
        config.on_policy_collected_frames_per_batch = 60_000
        config.on_policy_n_envs_per_worker = 600
        config.on_policy_minibatch_size = 4096
    else:
        config.on_policy_n_envs_per_worker = 60
    config.max_n_frames = args.frames
    config.evaluation_interval = args.eval_every
    config.evaluation_episodes = args.episodes
    config.render, config.loggers = False, []
    config.save_folder = folder  # of a JSON file that is not kept; without it nothing is evaluated
    return config


def main(args: argparse.Namespace) -> None:
    """Train and evaluate; the file of metrics grows with every evaluation."""
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Experiment(
            task=VmasTask[args.task.removeprefix("vmas_").upper()].get_from_yaml(),
            algorithm_config=ALGORITHMS[args.algorithm].get_from_yaml(),
            model_config=MlpConfig.get_from_yaml(),
            critic_model_config=MlpConfig.get_from_yaml(),
            seed=args.seed,
            config=settings(args, folder),
            callbacks=[Metrics(args.output)],
        ).run()


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; a wrong one ends here."""
    tasks = [f"vmas_{task.name.lower()}" for task in VmasTask]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, required=True)
    parser.add_argument("--task", choices=tasks, required=True, metavar="vmas_SCENARIO")
    parser.add_argument("--frames", type=int, default=240_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="the file of metrics to write")
    parser.add_argument("--published", action="store_true", help="60,000 frames a batch of MAPPO")
    parser.add_argument("--eval_every", type=int, default=12_000, help="frames")
    parser.add_argument("--episodes", type=int, default=200, help="of an evaluation")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    batch = 60_000 if args.published and args.algorithm == "mappo" else 6_000
    if args.eval_every % batch:
        parser.error(f"--eval_every {args.eval_every}: must be a multiple of the batch, {batch}")
    return args


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
