"""Frames as GIFs and as one picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from gifs import encode_gif, tile


def decoded(gif):
    return np.stack(
        [np.array(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(io.BytesIO(gif)))]
    )


def test_tile_puts_scenes_beside_and_below_each_other():
    frames = torch.arange(2 * 3 * 4 * 5 * 3).view(2, 3, 4, 5, 3).to(torch.uint8)
    picture = tile(frames, columns=2)
    assert picture.shape == (2, 8, 10, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 5), (4, 0)]):
        scene = picture[:, top : top + 4, left : left + 5]
        assert torch.equal(scene[:, :-1, :-1], frames[:, index, :-1, :-1])
        assert (scene[:, -1] == 200).all() and (scene[:, :, -1] == 200).all()
    assert (picture[:, 4:, 5:] == 255).all()


@pytest.mark.parametrize("fps", [5, 15, 30])
def test_gif_is_exact_for_few_colours(fps):
    colours = torch.randint(0, 256, (256, 3), dtype=torch.uint8)
    frames = colours[torch.randint(0, 256, (30, 12, 20))]
    gif = encode_gif(frames, fps)
    assert np.array_equal(decoded(gif), frames.numpy())
    image = Image.open(io.BytesIO(gif))
    assert image.info["loop"] == 0  # for ever
    durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert sum(durations) == pytest.approx(30 * 1000 / fps, abs=10)


def test_gif_of_many_colours_is_close_and_flat_where_it_was_flat():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = np.full((20, 64, 64, 3), 255, np.uint8)
    frames[:, :32, :, 0] = ramp
    frames[:, :32, :, 1] = ramp[:32, None]
    frames[:, :32, :, 2] = np.arange(20, dtype=np.uint8)[:, None, None]
    frames[:, 40:50, 10:50] = (229, 115, 89)
    gif = encode_gif(frames, 10)
    # Frames that look the same are stored once and last longer.
    held = [f.info["duration"] // 100 for f in ImageSequence.Iterator(Image.open(io.BytesIO(gif)))]
    shown = decoded(gif).repeat(held, axis=0)
    assert np.array_equal(shown[:, 32:], frames[:, 32:])
    assert np.abs(shown.astype(int) - frames).mean() < 6
    assert np.abs(shown.astype(int) - frames).max() < 40


def test_gif_keeps_the_colours_of_small_things_on_a_noisy_background():
    frames = np.random.default_rng(0).normal(250, 4, (20, 64, 64, 3)).clip(0, 255).astype(np.uint8)
    agents = {(10, 12): (230, 20, 20), (30, 40): (20, 200, 30), (50, 20): (30, 30, 220)}
    for (row, column), colour in agents.items():
        frames[:, row : row + 2, column : column + 2] = colour
    shown = decoded(encode_gif(frames, 10)).astype(int)
    assert shown.shape == frames.shape
    assert np.abs(shown - frames).max() <= 16
    assert np.abs(shown - frames).mean() < 2


def test_gif_of_one_frame_and_of_noise():
    one = torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)
    assert np.array_equal(decoded(encode_gif(one, 15)), one.numpy())
    noise = torch.randint(0, 256, (3, 50, 70, 3), dtype=torch.uint8)
    assert decoded(encode_gif(noise, 100)).shape == noise.shape
