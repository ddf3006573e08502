"""Shapes to pixels: batches of antialiased shapes, blended into batches of frames.

A scene is a list of shapes from back to front, each of which exists in every copy. A shape is
blended into a window of pixels just large enough for it. The share of a pixel that it covers comes
from its signed distance, so that motion below a pixel shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CPU_PIXELS = 2**18  # drawn at once: on a CPU the working set stays near its cache
GPU_PIXELS = 2**26  # on a GPU calls cost more than pixels
FEWEST = 8  # copies at once, however large they are: below, calls cost more than pixels
CIRCLE_SIDES = 30  # VMAS's circles are polygons; ROUND gives the radius of a disc of equal area
ROUND = math.sqrt(CIRCLE_SIDES / (2 * math.pi) * math.sin(2 * math.pi / CIRCLE_SIDES))


@dataclass
class Camera:
    """Maps the world to pixels: column = x * scale + left, row = top - y * scale, per copy."""

    height: int
    width: int
    scale: Tensor  # (B,) pixels per unit of the world
    left: Tensor  # (B,)
    top: Tensor  # (B,)
    largest: float  # bound on `scale`, known without asking the device
    pen: float  # pixels of this picture per pixel of VMAS's viewer, in which strokes are measured


@dataclass
class Shape:
    """R parts of one colour in each of B copies; lengths in the world's units unless noted."""

    kind: str  # "disc", "ring", "box", "polygon", "grid" or "plot"
    centre: Tensor  # (B, R, 2)
    half: Any  # half extents along the part's axes: two floats or (B, R, 2)
    color: Any  # three floats from 0 to 1, or (B, 3)
    alpha: Tensor  # (B,)
    angle: Tensor | None = None  # (B, R) radians
    stroke: float | None = None  # width of a line, in pixels of the viewer
    rim: float | None = None  # width of the darker outline, in pixels of the viewer
    reach: float = math.inf  # bound on a part's half extent
    span: float = 0.0  # bound on half the extent of the parts' centres
    data: Tensor | None = None  # "polygon": corners (B, V, 2); "plot": RGBA (B, 4, cells, cells)


@dataclass
class Placed:
    """The P = B * R parts of a shape in pixels."""

    col: Tensor  # (P,)
    row: Tensor  # (P,)
    half_x: Tensor  # (P,)
    half_y: Tensor  # (P,)
    alpha: Tensor  # (P,)
    cos: Tensor | None  # (P,)
    sin: Tensor | None  # (P,)
    data: Tensor | None  # corners (P, V, 2) from the centre, y upwards, or a plot
    width: float  # half the stroke
    rim: float  # half the rim


@dataclass
class Layer:
    """What a shape does to the pixels of a window: pixel * (1 - veil) + color * ink."""

    rows: Tensor  # (B, kh)
    cols: Tensor  # (B, kw)
    veil: Tensor  # (B, kh, kw)
    ink: Tensor  # (B, kh, kw)
    color: Any  # three floats, or a tensor that broadcasts with (B, 3, kh, kw)


def draw(frames: Tensor, shapes: list[Shape], camera: Camera) -> None:
    """Blend the shapes, back to front, into frames (B, h, w, 3) of uint8, in chunks of copies."""
    copies, height, width, _ = frames.shape
    chunk = max(FEWEST, _budget(frames) // (height * width))
    for start in range(0, copies, chunk):
        part = slice(start, start + chunk)
        view, pieces = _rows(camera, part), [_rows(shape, part) for shape in shapes]
        layers: dict[int, Layer] = {}
        for group in _groups(pieces, camera):
            layers |= zip(group, _layers([pieces[i] for i in group], view), strict=True)
        for i in range(len(pieces)):
            _blend(frames[part], layers.pop(i))


def _budget(tensor: Tensor) -> int:
    """Pixels to work on at once."""
    return CPU_PIXELS if tensor.device.type == "cpu" else GPU_PIXELS


def _can_ask(tensor: Tensor) -> bool:
    """Whether reading a tensor's values costs nothing; on a GPU it would stall."""
    return tensor.device.type == "cpu"


def _rows(batch: Any, part: slice) -> Any:
    """The same shape, camera or parts, in some of the copies."""
    return replace(batch, **{k: v[part] for k, v in vars(batch).items() if isinstance(v, Tensor)})


def _groups(shapes: list[Shape], camera: Camera) -> list[list[int]]:
    """Indices of shapes that are alike but for place, colour and alpha, to be computed at once.

    Long shapes stay alone: their windows can be narrow, and together would not be.
    """
    groups: dict[Any, list[int]] = {}
    for i, shape in enumerate(shapes):
        key: Any = i
        if shape.data is None and 8 * shape.reach * camera.largest < camera.width + camera.height:
            size = shape.half if isinstance(shape.half, tuple) else None
            turned, parts = shape.angle is not None, shape.centre.shape[1]
            key = (shape.kind, size, turned, parts, shape.stroke, shape.rim)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _layers(shapes: list[Shape], camera: Camera) -> list[Layer]:
    """The layers of shapes that are alike, computed as one shape's in more copies."""
    count = len(shapes)
    if count == 1:
        return [_layer(shapes[0], camera)]
    names = [k for k in ("centre", "half", "alpha", "angle") if _is_tensor(getattr(shapes[0], k))]
    stacks = {k: torch.stack([getattr(s, k) for s in shapes], 1).flatten(0, 1) for k in names}
    bounds = {k: max(getattr(s, k) for s in shapes) for k in ("reach", "span")}
    views = {k: getattr(camera, k).repeat_interleave(count) for k in ("scale", "left", "top")}
    layer = _layer(replace(shapes[0], **stacks, **bounds), replace(camera, **views))
    fields = (layer.rows, layer.cols, layer.veil, layer.ink)
    fields = [field.unflatten(0, (-1, count)).unbind(1) for field in fields]
    return [Layer(*one, shape.color) for *one, shape in zip(*fields, shapes, strict=True)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _layer(shape: Shape, camera: Camera) -> Layer:
    placed = _place(shape, camera)
    rows, cols = _window(shape, placed, camera)
    if shape.kind == "plot":
        return _plot(shape, placed, rows, cols)
    if shape.centre.shape[1] > 1:
        return _bundle(shape, placed, rows, cols, camera)
    return Layer(rows, cols, *_shade(shape.kind, placed, rows, cols), shape.color)


def _place(shape: Shape, camera: Camera) -> Placed:
    copies, parts = shape.centre.shape[:2]
    scale = camera.scale[:, None].expand(copies, parts)
    half = shape.half.unbind(-1) if isinstance(shape.half, Tensor) else shape.half
    half_x, half_y = ((h * scale).reshape(-1) for h in half)
    width = 0.0 if shape.stroke is None else shape.stroke * camera.pen / 2
    angle = None if shape.angle is None else shape.angle.reshape(-1)
    return Placed(
        col=(shape.centre[..., 0] * scale + camera.left[:, None]).reshape(-1),
        row=(camera.top[:, None] - shape.centre[..., 1] * scale).reshape(-1),
        half_x=half_x,
        half_y=half_y + width if shape.kind == "box" else half_y,
        alpha=shape.alpha.repeat_interleave(parts) if parts > 1 else shape.alpha,
        cos=None if angle is None else angle.cos(),
        sin=None if angle is None else angle.sin(),
        data=shape.data * scale[..., None] if shape.kind == "polygon" else shape.data,
        width=width,
        rim=(shape.rim or 0.0) * camera.pen / 2,
    )


def _window(shape: Shape, placed: Placed, camera: Camera) -> tuple[Tensor, Tensor]:
    """Rows (P, kh) and columns (P, kw) that hold each part; windows are as large for all parts.

    On a CPU the largest part is measured; on a GPU, where asking would stall, it is bounded.
    """
    wide, high = placed.half_x, placed.half_y
    if placed.cos is not None:
        cos, sin = placed.cos.abs(), placed.sin.abs()
        wide, high = cos * wide + sin * high, sin * wide + cos * high
    if shape.kind == "polygon":
        wide, high = placed.data.abs().amax(1).unbind(-1)
    margin = max(placed.rim, placed.width) + 0.5
    windows = []
    for spot, extent, length in (
        (placed.row, high, camera.height),
        (placed.col, wide, camera.width),
    ):
        low = (spot - extent - margin).floor()
        if shape.kind == "grid":
            side = length
        elif _can_ask(low):
            end = (spot + extent + margin).ceil().clamp_(0, length)
            side = max(1, int((end - low.clamp(0, length)).max()))
        else:
            side = 2 * (shape.reach * camera.largest + margin) + 2
            side = math.ceil(min(length, side))
        start = low.clamp_(0, length - side).long()
        windows.append(start[:, None] + torch.arange(side, device=start.device))
    return windows[0], windows[1]


def _plot(shape: Shape, placed: Placed, rows: Tensor, cols: Tensor) -> Layer:
    """An image sampled in the window's pixels."""
    x = (cols + 0.5 - placed.col[:, None]) / placed.half_x[:, None]
    y = (placed.row[:, None] - rows - 0.5) / placed.half_y[:, None]
    where = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    image = torch.nn.functional.grid_sample(
        placed.data, where, padding_mode="border", align_corners=False
    )
    inside = _shade("box", placed, rows, cols)[0]
    veil = image[:, 3] * inside
    return Layer(rows, cols, veil, veil, image[:, :3])


def _bundle(shape: Shape, placed: Placed, rows: Tensor, cols: Tensor, camera: Camera) -> Layer:
    """The parts as one layer, in a window that holds them all.

    What shows through several parts is the product of what shows through each, and the layer's
    shade is the mean of theirs; the order of parts does not matter, as they are of one colour.
    """
    copies, parts = shape.centre.shape[:2]
    windows, spots = [], []
    for lines, length in ((rows, camera.height), (cols, camera.width)):
        start, end = (x.view(copies, parts) for x in (lines[:, 0], lines[:, -1] + 1))
        start, end = start.amin(1), end.amax(1)  # (B,)
        side = 2 * (shape.span * camera.largest + 1) + lines.shape[1]
        side = int((end - start).max()) if _can_ask(start) else math.ceil(min(length, side))
        start = start.minimum(end - side).clamp_(min=0)  # stay within the frame
        windows.append(start[:, None] + torch.arange(side, device=start.device))
        spots.append(lines - start.repeat_interleave(parts)[:, None])
    height, width = windows[0].shape[1], windows[1].shape[1]
    copy = torch.arange(len(rows), device=rows.device).div(parts, rounding_mode="floor")
    base = copy[:, None] * (height * width) + spots[0] * width  # (P, kh)
    depth, shade = torch.zeros(2, copies * height * width, device=rows.device).unbind()
    step = max(1, 2 * _budget(rows) // (rows.shape[1] * cols.shape[1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        veil, ink = _shade(shape.kind, _rows(placed, part), rows[part], cols[part])
        index = (base[part, :, None] + spots[1][part, None, :]).view(-1)
        deep = -torch.log1p(-veil.clamp(max=0.9999))
        depth.scatter_add_(0, index, deep.view(-1))
        shade.scatter_add_(0, index, (deep * ink / veil.clamp(min=1e-9)).view(-1))
    veil = 1 - torch.exp(-depth)
    ink = veil * shade / depth.clamp(min=1e-9)
    size = (copies, height, width)
    return Layer(*windows, veil.view(size), ink.view(size), shape.color)


def _shade(kind: str, placed: Placed, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """How much the background is hidden, and how much colour is laid on; (P, kh, kw) each."""
    dx = (cols + 0.5 - placed.col[:, None])[:, None, :]  # (P, 1, kw)
    dy = (placed.row[:, None] - rows - 0.5)[:, :, None]  # (P, kh, 1), upwards
    cover, alpha = _cover(kind, dx, dy, placed), placed.alpha[:, None, None]
    if len(cover) == 1:
        veil = cover[0] * alpha
        return veil, veil
    # The rim lies half inside the body and half outside, at half the body's colour and alpha
    outer, body, inner = cover
    body = body * (alpha - alpha * alpha / 2)
    veil = outer * (alpha / 2) + body - inner * (alpha / 2 - alpha * alpha / 2)
    ink = outer * (alpha / 4) + body - inner * (alpha / 4 - alpha * alpha / 2)
    return veil, ink


def _cover(kind: str, dx: Tensor, dy: Tensor, placed: Placed) -> list[Tensor]:
    """Share (P, kh, kw) of each pixel that a part covers; if it has a rim, shares of the part
    grown by half the rim, as it is, and shrunk by half the rim."""
    grow = (placed.rim, 0.0, -placed.rim) if placed.rim else (0.0,)
    half_x, half_y = placed.half_x[:, None, None], placed.half_y[:, None, None]
    if kind == "disc":
        distance = (dx * dx + dy * dy).sqrt_()
        return [_disc(distance, half_x * ROUND + g) for g in grow]
    if kind == "ring":
        distance = (dx * dx + dy * dy).sqrt_() - half_x * ROUND
        return [_overlap(distance, torch.full_like(half_x, placed.width))]
    if kind == "grid":
        across, along = (_stripes(d, half_x, placed.width) for d in (dx, dy))
        return [across + along - across * along]
    if kind == "polygon":
        distance = _outside(dx, dy, placed.data)
        return [(0.5 + g - distance).clamp_(0, 1) for g in grow]
    if placed.cos is not None:
        cos, sin = placed.cos[:, None, None], placed.sin[:, None, None]
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return [_overlap(dx, half_x + g) * _overlap(dy, half_y + g) for g in grow]


def _overlap(distance: Tensor, half: Tensor) -> Tensor:
    """Share of a pixel covered by a stripe of this half width at this distance."""
    half = half.clamp(min=0)
    return (half + 0.5 - distance.abs()).clamp_(min=0).minimum((2 * half).clamp_(max=1))


def _disc(distance: Tensor, radius: Tensor) -> Tensor:
    """A ramp one pixel wide whose sum over pixels is the disc's area, however small it is."""
    square = radius.clamp(min=0) ** 2
    edge = (square - 1 / 12).clamp_(min=0.25).sqrt_() + 0.5
    return (edge - distance).clamp_(0, 1) * (3 * square).clamp_(max=1)


def _stripes(distance: Tensor, spacing: Tensor, half: float) -> Tensor:
    """Share of a pixel covered by endless stripes of this half width and spacing."""

    def covered(x: Tensor) -> Tensor:  # length covered from 0 to x
        whole = (x / spacing).round()
        return whole * 2 * half + (x - whole * spacing).clamp(-half, half)

    return (covered(distance + 0.5) - covered(distance - 0.5)).clamp_(0, 1)


def _outside(dx: Tensor, dy: Tensor, corners: Tensor) -> Tensor:
    """Signed distance to a convex polygon's furthest side; corners (P, V, 2) in either sense."""
    x, y = corners.unbind(-1)
    side_x, side_y = x.roll(-1, 1) - x, y.roll(-1, 1) - y
    sense = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1, keepdim=True).sign()  # (P, 1)
    length = sense * torch.hypot(side_x, side_y).clamp(min=1e-9)
    normal_x, normal_y = side_y / length, -side_x / length
    offset = normal_x * x + normal_y * y
    distance = torch.full_like(dx * dy, -math.inf)
    for v in range(corners.shape[1]):
        at = (slice(None), v, None, None)
        distance = distance.maximum(dx * normal_x[at] + dy * normal_y[at] - offset[at])
    return distance


def _blend(frames: Tensor, layer: Layer) -> None:
    """Lay a layer on the frames (B, h, w, 3)."""
    copies, height, width, _ = frames.shape
    copy = torch.arange(copies, device=frames.device)[:, None] * height
    pixel = ((copy + layer.rows) * (3 * width))[:, :, None] + (layer.cols * 3)[:, None, :]
    index = torch.stack([pixel, pixel + 1, pixel + 2]).view(-1)
    flat = frames.view(-1)
    patch = flat.gather(0, index).view(3, *pixel.shape).float()
    patch.mul_(1 - layer.veil)
    if isinstance(layer.color, Tensor):
        color = layer.color if layer.color.dim() == 4 else layer.color[:, :, None, None]
        patch.add_(color.transpose(0, 1) * (layer.ink * 255))
    else:
        for band, value in zip(patch, layer.color, strict=True):
            band.add_(layer.ink, alpha=255 * value)
    flat.scatter_(0, index, patch.add_(0.5).to(torch.uint8).view(-1))
