"""Rows and episodes that say where they are from, for the tests of ring and folder."""

import numpy as np
import torch

SPACES = {
    "copy": ((), torch.int64),
    "time": ((), torch.int64),
    "agent0": ((3,), torch.float32),
    "image": ((2, 2, 3), torch.uint8),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "action": ((2, 2), torch.float32),
}
LATENTS = {"deter": ((4,), torch.float16), "stoch": ((3,), torch.uint8)}
KEYS = list(SPACES)


def make_row(time, lengths):
    """Row `time` of copies whose episodes have `lengths` rows; it says where it is from."""
    copies, lengths = torch.arange(len(lengths)), torch.tensor(lengths)
    noise = torch.Generator().manual_seed(time)
    return {
        "copy": copies,
        "time": torch.full_like(copies, time),
        "agent0": torch.randn(len(lengths), 3, generator=noise),
        "image": torch.randint(0, 256, (len(lengths), 2, 2, 3), generator=noise),
        "is_first": time % lengths == 0,
        "is_last": time % lengths == lengths - 1,
        "action": torch.randn(len(lengths), 2, 2, generator=noise),
        "deter": latent(copies, time, 4),
        "stoch": latent(copies, time, 3),
    }


def latent(copy, time, width):
    """Small whole numbers, exact in float16 and uint8, and never zero."""
    return ((copy * 31 + time) % 200 + 1)[:, None].expand(-1, width)


def make_episode(rows, start=0):
    """An episode as `EpisodeFolder.load` gives it."""
    episode = [make_row(start + time, [10**6]) for time in range(rows)]
    arrays = {
        key: torch.cat([row[key] for row in episode]).to(dtype).numpy()
        for key, (_, dtype) in SPACES.items()
    }
    arrays["is_first"][:], arrays["is_last"][:] = np.eye(rows, dtype=bool)[[0, -1]]
    return arrays
