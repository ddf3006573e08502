"""LaProp with adaptive gradient clipping and warm-up: the optimiser of DreamerV3."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class LaProp(torch.optim.Optimizer):
    """RMS-normalised gradients, then momentum (Ziyin et al., arXiv 2002.04839).

    Each tensor's gradient is first clipped to `agc` times the norm of its parameter (adaptive
    gradient clipping, Brock et al., arXiv 2102.06171). The rate rises linearly over `warmup` steps
    and, if `decay` is not 0, falls with the square root of the steps after that many. Everything
    is on the parameters' device, the count of steps too, so that a step can be captured as a graph.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-20,
        agc: float = 0.3,
        warmup: int = 1000,
        decay: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "agc": agc}
        super().__init__(parameters, defaults | {"warmup": warmup, "decay": decay})

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is optimised."""
        return (p for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up averages and counts; rates and other settings stay as they are here."""
        own = [{key: group[key] for key in self.defaults} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)
            if "count" in group:  # a plain number in older checkpoints
                device = group["params"][0].device
                group["count"] = torch.as_tensor(group["count"], dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, sound: Tensor | None = None) -> Tensor:
        """Update the parameters and return the norm of all gradients before clipping.

        Where `sound`, a 0-d bool, is false, nothing moves, and no device is asked to find out.
        """
        norms = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                sound = params[0].new_ones((), dtype=torch.bool) if sound is None else sound
                norms += self._step_group(group, params, sound)
        return torch.stack(norms).norm()

    def _step_group(self, group: dict, params: list[nn.Parameter], sound: Tensor) -> list[Tensor]:
        for param in params:
            if not self.state[param]:
                self.state[param]["square"] = torch.zeros_like(param)
                self.state[param]["momentum"] = torch.zeros_like(param)
        grads = [p.grad for p in params]
        squares = [self.state[p]["square"] for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        norms = clip_adaptively(params, grads, group["agc"])
        count = group.setdefault("count", norms[0].new_zeros((), dtype=torch.float64)).add_(1)
        beta1, beta2 = group["betas"]
        for grad in grads:
            grad.masked_fill_(~sound, 0)
        torch._foreach_mul_(squares, torch.where(sound, beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - beta2**count).sqrt().float())
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_mul_(momenta, torch.where(sound, beta1, 1.0))
        torch._foreach_addcdiv_(momenta, grads, scales, 1 - beta1)
        rate = group["lr"] * (count / max(1, group["warmup"])).clamp(max=1) / (1 - beta1**count)
        if group["decay"]:
            rate = rate * (group["decay"] / count).clamp(max=1).sqrt()
        rate = torch.where(sound, rate, 0.0).float()
        torch._foreach_sub_(params, torch._foreach_mul(momenta, rate))
        return norms


def clip_adaptively(
    params: list[nn.Parameter], grads: list[Tensor], limit: float, smallest: float = 1e-3
) -> list[Tensor]:
    """Scale each gradient down to `limit` times its parameter's norm; returns the norms before.

    Parameters near zero count as having the norm `smallest`, or they could never leave it.
    """
    norms = torch._foreach_norm(grads)
    allowed = torch.stack(torch._foreach_norm(params)).clamp(min=smallest) * limit
    factors = (allowed / torch.stack(norms).clamp(min=1e-12)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(factors.unbind()))
    return norms
