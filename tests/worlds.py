"""What the world models of tests see, and states for them."""

import torch
import torch.nn.functional as F

VECTORS, IMAGE = {"agent0": (3,), "agent1": (2,)}, {"image": (16, 16, 3)}


def states(world, batch=2, time=3):
    """States (batch, time, ...) of a world model that are as random as can be."""
    stoch = F.one_hot(torch.randint(0, 4, (batch, time, 3)), 4).float()
    deter, vectors = (
        torch.randn(batch, time, width) for width in (world.rssm.deter, sum(world.widths))
    )
    return deter, stoch, vectors
