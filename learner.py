"""Training: the networks with their optimisers."""

import torch
from torch import Tensor

from config import Config
from distributed import average_gradients
from models import Dreamer
from optimizer import LaProp
from replay import Replay


class Learner:
    """The networks with their optimisers; a call of `update` is one step of training."""

    def __init__(self, config: Config, dreamer: Dreamer):
        self.dreamer, self.updates = dreamer, 0
        self.bfloat16, self.imag_gradient = config.precision == "bfloat16", config.imag_gradient
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
            rates = {"lr": config.probe.lr, "warmup": config.probe.warmup}
            self.optimizers["probe"] = LaProp(dreamer.probe.parameters(), **rates)

    def update(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Learn from a batch of replayed sequences; the metrics stay on the device."""
        data, index = replay.sample(batch, length)
        with self._autocast():
            loss, state, metrics = self.dreamer.losses(data)
        self._descend(loss, ("model", "behavior"), metrics)
        self.dreamer.behavior.update_slow()
        replay.write_back(index, self.dreamer.world.rssm.pack(state))
        self.updates += 1
        return metrics

    def update_probe(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Teach the image head what the states of a few sequences look like."""
        data, index = replay.sample(batch, length)
        with self._autocast():
            state = self.dreamer.infer(data)
            feat = self.dreamer.world.rssm.features(state)
            loss = self.dreamer.probe.loss(feat, data["image"]).mean()
        metrics = {"image_loss": loss.detach()}
        self._descend(loss, ("probe",), metrics)
        replay.write_back(index, self.dreamer.world.rssm.pack(state))
        return metrics

    def _autocast(self) -> torch.autocast:
        """Inside, products are in bfloat16, if `precision` says so.

        Weights that a rollout without gradients has cast must not be reused where actors learn.
        """
        device, dynamics = self.dreamer.device.type, self.imag_gradient == "dynamics"
        return torch.autocast(device, torch.bfloat16, self.bfloat16, cache_enabled=dynamics)

    def _descend(self, loss: Tensor, names: tuple[str, ...], metrics: dict[str, Tensor]) -> None:
        for name in names:
            self.optimizers[name].zero_grad()
        loss.backward()
        average_gradients(p for name in names for p in self.optimizers[name].parameters())
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
