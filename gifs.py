"""Frames as animated pictures."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GIF_FRAMES = 200  # at most: TensorBoard keeps every GIF in memory
CHUNK = 16  # frames whose colours are counted at once, as numbers are larger than bytes


def check_frames(frames: Tensor) -> None:
    """Raise ValueError unless frames are (T, H, W, 3) uint8."""
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"expected (T, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")


def encode_gif(frames: Tensor | np.ndarray, fps: float) -> bytes:
    """A GIF that loops for ever, of frames (T, H, W, 3) uint8; exact up to 256 colours in all."""
    frames = torch.as_tensor(frames)
    check_frames(frames)
    indices, palette = _quantised(frames.cpu().numpy())
    images = [Image.fromarray(index) for index in indices]
    for image in images:
        image.putpalette(palette.tobytes())
    # GIF counts in hundredths of a second, and viewers take less than two for a mistake.
    ticks = np.round(np.arange(len(images) + 1) * 100 / fps)
    durations = [10 * max(2, int(tick)) for tick in np.diff(ticks)]
    options = {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", **options)
    return buffer.getvalue()


def _quantised(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W) uint8 as indices into a palette (P, 3) that they share, so none flickers."""
    chunks = [rgb[start : start + CHUNK] for start in range(0, len(rgb), CHUNK)]
    counts = sum(np.bincount(_pack(chunk).ravel(), minlength=1 << 24) for chunk in chunks)
    colours = np.flatnonzero(counts)
    # Neighbours in colour share an entry: nearly as good, and noise has millions of colours.
    cells, cell = np.unique(colours & 0xFCFCFC, return_inverse=True)
    centres = _unpack(cells | 0x020202)
    palette = colours if len(colours) <= 256 else _palette(counts, centres)
    table = np.zeros(1 << 24, np.uint8)
    table[colours] = _closest(centres, _unpack(palette))[cell]
    table[palette] = np.arange(len(palette))
    return np.concatenate([table[_pack(chunk)] for chunk in chunks]), _unpack(palette)


def _palette(counts: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Up to 256 packed colours: areas of one colour as they are, the rest from `centres` (C, 3)."""
    flat = np.flatnonzero(counts > counts.sum() // 1000)
    flat = flat[np.argsort(counts[flat])[-64:]]
    # By range, not by frequency: a small agent's colour counts as much as the wide background.
    spread = Image.fromarray(centres[None]).quantize(256 - len(flat), Image.Quantize.MAXCOVERAGE)
    return np.union1d(flat, _pack(np.array(spread.getpalette()).reshape(-1, 3)))


def _pack(rgb: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 as whole numbers 0xRRGGBB (...)."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Colours (C,) as whole numbers 0xRRGGBB to (C, 3) uint8."""
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1).astype(np.uint8)


def _closest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The index in `palette` (P, 3) nearest to each of `colours` (C, 3)."""
    palette = torch.from_numpy(palette).float()
    chunks = torch.from_numpy(colours).float().split(1 << 14)
    return torch.cat([torch.cdist(chunk, palette).argmin(1) for chunk in chunks]).numpy()


def tile(frames: Tensor, columns: int) -> Tensor:
    """Scenes (T, count, h, w, 3) as one picture a frame, parted by thin lines.

    The last row is filled up with white.
    """
    frames = frames.clone()
    frames[:, :, -1] = frames[:, :, :, -1] = 200
    missing = -frames.shape[1] % columns
    blank = frames.new_full((len(frames), missing, *frames.shape[2:]), 255)
    rows = torch.cat([frames, blank], 1).unflatten(1, (-1, columns))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
