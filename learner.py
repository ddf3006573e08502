"""Training: the networks with their optimisers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from capture import captured
from config import Config
from distributed import average
from latents import LATENTS
from models import Dreamer
from optimizer import LaProp
from recorder import Recorder
from replay import Replay
from tools import UserError

PATIENCE = 10  # updates in a row that may fail


class Learner:
    """The networks with their optimisers; a call of `update` is one step of training.

    An update whose loss or gradient is not finite on any rank moves no trained weight on any of
    them. That is decided on the device.
    """

    def __init__(self, config: Config, dreamer: Dreamer):
        self.dreamer, self.updates = dreamer, 0
        self.batch, self.length, self.probe = config.batch_size, config.batch_length, config.probe
        self.bfloat16, self.imag_gradient = config.precision == "bfloat16", config.imag_gradient
        self.failed = torch.zeros((), dtype=torch.int64, device=dreamer.device)  # in a row
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
        self.capture = config.capture
        if config.compile and not config.eval_only:
            dreamer.compile_steps()
        self._set_out()

    def learn(self, recorder: Recorder) -> dict[str, Tensor]:
        """One update, of the image head too when its turn comes; the metrics are on the device."""
        metrics = self.update(recorder.replay, self.batch, self.length)
        turn = self.dreamer.probe is not None and self.updates % self.probe.every == 0
        if turn and recorder.can_draw(self.length):
            few = self.probe.batch_size
            drawn = self.update_probe(recorder.pictures, few, self.length)
            skipped = torch.maximum(metrics["skipped_updates"], drawn["skipped_updates"])
            metrics = metrics | drawn | {"skipped_updates": skipped}
        return metrics

    def update(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Learn from a batch of replayed sequences; the metrics stay on the device."""
        data, index = replay.sample(batch, length)
        metrics, latents = self._teach_team(data)
        replay.write_back(index, latents)
        self.updates += 1
        return metrics

    def update_probe(self, replay: Replay, batch: int, length: int) -> dict[str, Tensor]:
        """Teach the image head what the states of a few sequences look like."""
        data, index = replay.sample(batch, length)
        metrics, latents = self._teach_probe(data)
        replay.write_back(index, latents)
        return metrics

    def _set_out(self) -> None:
        """Begin with updates that are not captured yet."""
        self._teach_team = captured(self._learn_all, self.capture)
        self._teach_probe = captured(self._learn_images, self.capture)

    def _learn_all(self, data: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An update of all but the image head: metrics, and the latents inferred on the way."""
        buffers = [(buffer, buffer.clone()) for buffer in self.dreamer.buffers()]
        with self._autocast():
            loss, state, metrics = self.dreamer.losses(data)
        sound = self._descend(loss, ("model", "behavior"), metrics)
        for buffer, before in buffers:
            buffer.copy_(torch.where(sound, buffer, before))
        self.failed.copy_(torch.where(sound, 0, self.failed + 1))
        self.dreamer.behavior.update_slow()
        return metrics, self.dreamer.world.rssm.pack(state)

    def _learn_images(self, data: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An update of the image head: as `_learn_all`."""
        with self._autocast():
            state = self.dreamer.infer(data)
            feat = self.dreamer.world.features(state)
            loss = self.dreamer.probe.loss(feat, data["image"]).mean()
        metrics = {"image_loss": loss.detach()}
        self._descend(loss, ("probe",), metrics)
        return metrics, self.dreamer.world.rssm.pack(state)

    def _autocast(self) -> torch.autocast:
        """Inside, products are in bfloat16, if `precision` says so.

        Weights that a rollout without gradients has cast must not be reused where actors learn.
        """
        device, dynamics = self.dreamer.device.type, self.imag_gradient == "dynamics"
        return torch.autocast(device, torch.bfloat16, self.bfloat16, cache_enabled=dynamics)

    def _descend(self, loss: Tensor, names: tuple[str, ...], metrics: dict[str, Tensor]) -> Tensor:
        """Take a step, if loss and gradients are finite; returns whether (0-d, on the device)."""
        optimizers = {name: self.optimizers[name] for name in names}
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        params = [p for optimizer in optimizers.values() for p in optimizer.parameters()]
        # After averaging, what is not finite on one rank is so on all: they skip alike.
        checked = [loss.detach().clone(), *(p.grad for p in params if p.grad is not None)]
        average(checked)
        sound = torch.nn.utils.get_total_norm(checked).isfinite()
        for name, optimizer in optimizers.items():
            metrics[f"{name}_grad_norm"] = optimizer.step(sound)
        metrics["skipped_updates"] = (~sound).float()
        return sound

    def check(self, figures: Mapping[str, float], replay: Replay) -> None:
        """Raise `UserError` if the last updates were all skipped. Waits for the device."""
        if (failed := int(self.failed)) < PATIENCE:
            return
        wrong = [key for key, value in figures.items() if not torch.tensor(value).isfinite()]
        rows = [key for key, ring in replay.rings.items() if key not in LATENTS]
        held = [key for key in rows if not replay.rings[key].isfinite().all()]
        seen = f"; what was not finite in the replay: {', '.join(held)}" if held else ""
        raise UserError(
            f"the last {failed} updates were skipped, as loss or gradients were not finite{seen}; "
            f"what was logged and is not: {', '.join(wrong) or 'see the first rank'}; "
            "checkpoints, if there are any, are from before"
        )

    def state_dict(self) -> dict:
        """All that is learned, for a checkpoint."""
        return {
            "dreamer": self.dreamer.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "updates": self.updates,
            "failed": self.failed,
        }

    def load_state_dict(self, state: dict, source: str = "the checkpoint") -> None:
        """Go on from what `state_dict` returned; `source` says where it was."""
        self.load_weights(state, source)
        for name, optimizer in self.optimizers.items():
            if name not in state["optimizers"]:
                if name == "probe":
                    continue  # the image head begins anew
                raise UserError(f"{source} does not fit: it has no optimiser '{name}'")
            try:
                optimizer.load_state_dict(state["optimizers"][name])
            except ValueError as error:
                raise UserError(f"{source} does not fit: optimiser '{name}': {error}") from error
        self.updates = state["updates"]
        self.failed.fill_(state.get("failed", 0))
        self._set_out()

    def load_weights(self, state: dict, source: str) -> None:
        """Take over the networks alone. Raises `UserError` that names what does not fit.

        The image head is not needed: it may be missing here, or there, where it then begins anew.
        """
        weights, present = state["dreamer"], self.dreamer.state_dict()
        if len({any(map(_of_probe, networks)) for networks in (weights, present)}) > 1:
            weights, present = (
                {key: value for key, value in networks.items() if not _of_probe(key)}
                for networks in (weights, present)
            )
        saved, own = (
            {key: tuple(value.shape) for key, value in networks.items()}
            for networks in (weights, present)
        )
        differences = [
            f"{key}: saved {saved.get(key, 'nothing')}, now {own.get(key, 'nothing')}"
            for key in {**own, **saved}
            if saved.get(key) != own.get(key)
        ]
        if differences:
            shown, rest = differences[:5], len(differences) - 5
            shown += [f"and {rest} more"] if rest > 0 else []
            needed = "expected networks of this version of the code, for as many agents that see "
            needed += "and do as much"
            raise UserError(f"{source} does not fit: {'; '.join(shown)}; {needed}")
        self.dreamer.load_state_dict(weights, strict=False)


def _of_probe(key: str) -> bool:
    return key.startswith("probe.")
