"""What goes into the world model and what it predicts: encoders and decoders of vectors and images.

Shapes use the symbols of `networks.py`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from layers import MLP, Linear, RMSNorm, init_weights
from networks import Head
from scales import Standard


class ChannelNorm(RMSNorm):
    """RMSNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _halve(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution to half the width and height."""
    conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
    init_weights(conv.weight, inputs * 4**2)
    nn.init.zeros_(conv.bias)
    return conv


def _double(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """A convolution to twice the width and height."""
    conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    init_weights(conv.weight, inputs * 2**2)  # a stride of 2: a quarter of the kernel reaches each
    nn.init.zeros_(conv.bias)
    return conv


def _channel_activation(channels: int, norm: bool) -> list[nn.Module]:
    return [ChannelNorm(channels), nn.SiLU()] if norm else [nn.SiLU()]


class ImageEncoder(nn.Sequential):
    """Square uint8 images (B, size, size, 3) to (B, outputs) by strided convolutions."""

    def __init__(
        self, size: int, depth: int, norm: bool = True, mults: Sequence[int] = (2, 3, 4, 4)
    ):
        widths = [3] + [depth * mult for mult in mults]
        parts = []
        for inputs, outputs in pairwise(widths):
            parts += [_halve(inputs, outputs), *_channel_activation(outputs, norm)]
        super().__init__(*parts, nn.Flatten())
        self.outputs = widths[-1] * (size >> len(mults)) ** 2

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.movedim(-1, 1).float() / 255 - 0.5)


class KeypointEncoder(nn.Module):
    """Square uint8 images (B, size, size, 3) to where `points` learned marks are (B, outputs).

    Spatial softmax (Levine et al., 2016, arXiv 1504.00702): a mark is a map of a small CNN; its
    expected column and row, in [-1, 1], and how strong it is there are passed on, as they are and
    through an MLP. A CNN that flattens its maps learns replayed scenes by heart; what this one
    learns about a place holds everywhere (benchmarks/README.md).
    """

    SHARPNESS = 20.0  # of the softmax; a map at the start spreads over the whole image otherwise
    PALEST = 0.1  # the ink of which half counts: paler things are drowned by white

    def __init__(self, size: int, depth: int, points: int, units: int, layers: int, norm: bool):
        super().__init__()
        self.cnn = nn.Sequential(_halve(3, 2 * depth), nn.SiLU(), _halve(2 * depth, points))
        side = size // 4
        spots = torch.linspace(-1, 1, side)
        rows, columns = torch.meshgrid(spots, spots, indexing="ij")
        grid = torch.stack([columns.flatten(), rows.flatten()], -1)  # (side^2, 2)
        self.register_buffer("grid", grid, persistent=False)
        self.mlp = MLP(3 * points, units, layers, norm)
        self.outputs = 3 * points + units

    def forward(self, image: Tensor) -> Tensor:
        maps = self.cnn(self._hues(image)).float().flatten(2)
        share = torch.softmax(self.SHARPNESS * maps, -1)  # (B, points, side^2)
        strength = (share * maps).sum(-1, keepdim=True)
        marks = torch.cat([share @ self.grid, strength], -1).flatten(1)
        return torch.cat([marks, self.mlp(marks)], -1)

    def _hues(self, image: Tensor) -> Tensor:
        """What is drawn on the white paper (B, 3, size, size), pale things about as much as dark.

        Agents and goals are told apart by their hues.
        """
        ink = 1 - image.movedim(-1, 1).float() / 255
        return ink / (ink.norm(dim=1, keepdim=True) + self.PALEST)


class ImageDecoder(nn.Module):
    """Features (..., F) to the mean of square images (..., size, size, 3) in (0, 1).

    They start nearly white, as most of a scene is: from gray, the first losses would be a hundred
    times the later ones.
    """

    def __init__(
        self,
        inputs: int,
        size: int,
        depth: int,
        norm: bool = True,
        mults: Sequence[int] = (2, 3, 4, 4),
    ):
        super().__init__()
        widths = [depth * mult for mult in reversed(mults)] + [3]
        side = size >> len(mults)
        self.stem = nn.Sequential(
            Linear(inputs, widths[0] * side**2), nn.Unflatten(-1, (widths[0], side, side))
        )
        parts = []
        for here, after in pairwise(widths):
            parts += [*_channel_activation(here, norm), _double(here, after)]
        nn.init.constant_(parts[-1].bias, 3.0)  # sigmoid(3) is 0.95
        self.convs = nn.Sequential(*parts)

    def forward(self, feat: Tensor) -> Tensor:
        image = torch.sigmoid(self.convs(self.stem(feat.flatten(0, -2))).float())
        return image.movedim(1, -1).unflatten(0, feat.shape[:-1])


class KeypointDecoder(nn.Module):
    """Features (..., F) to the mean of square images (..., size, size, 3), about (0, 1).

    The mirror of `KeypointEncoder` (Jakab et al., 2018, arXiv 1806.07823): an MLP says where marks
    are and how strong, each becomes a Gaussian on a map of its own, and convolutions turn the
    maps into what differs from white. There is no sigmoid: near white it would hide pale things.
    """

    def __init__(self, inputs: int, size: int, depth: int, points: int, units: int):
        super().__init__()
        self.places = Head(inputs, units, 2, (points, 3), 1.0, norm=False)
        self.width = nn.Parameter(torch.full((points, 1), math.log(0.2)))
        self.register_buffer("spots", torch.linspace(-1, 1, size // 4), persistent=False)
        self.convs = nn.Sequential(_double(points, 2 * depth), nn.SiLU(), _double(2 * depth, 3))

    def forward(self, feat: Tensor) -> Tensor:
        column, row, strength = self.places(feat.flatten(0, -2)).split(1, -1)  # (B, points, 1)
        across, down = (self._bell(place) for place in (column, row))
        maps = (strength * down).unsqueeze(-1) * across.unsqueeze(-2)  # (B, points, side, side)
        image = 1 - self.convs(maps).float()
        return image.movedim(1, -1).unflatten(0, feat.shape[:-1])

    def _bell(self, place: Tensor) -> Tensor:
        return torch.exp(-((self.spots - place) / self.width.exp()).square() / 2)


def vector_sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The widths of those observations that are vectors, from the shapes of all."""
    return {key: shape[0] for key, shape in shapes.items() if len(shape) == 1}


class MultiEncoder(nn.Module):
    """All that the team sees, as one embedding (..., E).

    The vectors of all agents go through one MLP, the image through convolutions, or,
    with `points`, through that many keypoints. `shapes` maps the key of an observation to its
    shape.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        units: int,
        layers: int,
        depth: int,
        norm: bool = True,
        points: int = 0,
    ):
        super().__init__()
        self.outputs = 0
        sizes = vector_sizes(shapes)
        self.standard = Standard(sizes) if sizes else None
        if self.standard:
            self.mlp = MLP(self.standard.outputs, units, layers, norm)
            self.outputs += units
        self.image = "image" in shapes
        if self.image and points:
            self.cnn = KeypointEncoder(shapes["image"][0], depth, points, units, layers, norm)
        elif self.image:
            self.cnn = ImageEncoder(shapes["image"][0], depth, norm)
        if self.image:
            self.outputs += self.cnn.outputs

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        if self.standard:
            parts.append(self.mlp(self.standard(obs)))
        if self.image:
            image = obs["image"]
            parts.append(self.cnn(image.flatten(0, -4)).unflatten(0, image.shape[:-3]))
        return torch.cat(parts, -1)


def make_image_decoder(
    inputs: int, size: int, depth: int, points: int, units: int, norm: bool
) -> nn.Module:
    """One of keypoints, or without `points` DreamerV3's."""
    if points:
        return KeypointDecoder(inputs, size, depth, points, units)
    return ImageDecoder(inputs, size, depth, norm)


def image_error(drawn: Tensor, image: Tensor) -> Tensor:
    """Squared error (...) summed over pixels, of images (..., size, size, 3) against uint8 ones."""
    return (drawn - image.float() / 255).square().sum((-3, -2, -1))


class MultiDecoder(nn.Module):
    """Predicts observations back from features: the vectors by one MLP, the image by another net.

    `shapes` maps the key of an observation to its shape, and `points` is as for `MultiEncoder`.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        inputs: int,
        units: int,
        layers: int,
        depth: int,
        norm: bool = True,
        points: int = 0,
    ):
        super().__init__()
        sizes = vector_sizes(shapes)
        self.standard = Standard(sizes) if sizes else None
        if self.standard:
            self.mlp = Head(inputs, units, layers, (self.standard.outputs,), 1.0, norm)
        self.image = "image" in shapes
        if self.image:
            self.cnn = make_image_decoder(inputs, shapes["image"][0], depth, points, units, norm)

    def vectors(self, feat: Tensor) -> Tensor:
        """The vectors of all agents head to tail, as `Standard` has them, if it predicts any."""
        return self.mlp(feat)

    def image_loss(self, feat: Tensor, image: Tensor) -> Tensor:
        """The `image_error` (...) of what it draws of features (..., F)."""
        return image_error(self.cnn(feat), image)
