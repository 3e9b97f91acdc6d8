"""Procedural wallpapers: each takes (rng, size, colours) and returns an RGB image.

Only sums, products and divisions are used (no sine, no power), so that the pixels are the same on every
processor. Fields are computed on a coarse grid with numpy and enlarged by Pillow's integer arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from labkit.phonetap.drawing.canvas import Colour, mix
from labkit.phonetap.drawing.themes import Options, hsv

Size = tuple[int, int]


def wallpaper_colours(rng: random.Random, options: Options, dark: bool) -> list[Colour]:
    """Three colours close in brightness, dark or light, so that text of one colour reads on all of them."""
    hue = rng.choice(options.hues)
    step = rng.choice((15, 35, 60, 150, 0))
    if dark:
        return [hsv(hue + i * step, rng.uniform(0.3, 0.85), rng.uniform(0.12, 0.5)) for i in range(3)]
    return [hsv(hue + i * step, rng.uniform(0.05, 0.3), rng.uniform(0.86, 1.0)) for i in range(3)]


def coloured(field: np.ndarray, colours: Sequence[Colour], size: Size) -> Image.Image:
    """A field [h, w] of values 0 to 1 as colours from first to last, enlarged smoothly to `size`."""
    stops = np.asarray(colours, dtype=np.float64)
    place = np.clip(field, 0, 1) * (len(colours) - 1)
    low = np.minimum(place.astype(np.int64), len(colours) - 2)
    share = (place - low)[..., None]
    pixels = stops[low] * (1 - share) + stops[low + 1] * share
    small = Image.fromarray((pixels + 0.5).astype(np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def _grid(size: Size, wide: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x [1, w] and y [h, 1] of a coarse grid, in shares of the screen's width."""
    tall = max(2, wide * size[1] // size[0])
    return (np.arange(wide) + 0.5)[None, :] / wide, (np.arange(tall) + 0.5)[:, None] / wide


def plain(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    return Image.new("RGB", size, colours[0])


def linear(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    x, y = _grid(size, 8)
    return coloured(y / y.max() + 0 * x, colours[: rng.choice((2, 3))], size)


def diagonal(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    x, y = _grid(size, 16)
    across = x if rng.random() < 0.5 else 1 - x
    field = across * rng.uniform(0.4, 1.0) + y * rng.uniform(0.2, 0.5)
    return coloured(field / field.max(), colours, size)


def blobs(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    x, y = _grid(size)
    field = np.zeros((y.shape[0], x.shape[1]))
    for _ in range(rng.randint(2, 5)):
        cx, cy, r = rng.uniform(-0.1, 1.1), rng.uniform(0, 2.2), rng.uniform(0.15, 0.5)
        field = field + 1 / (1 + ((x - cx) * (x - cx) + (y - cy) * (y - cy)) / (r * r))
    return coloured(field / field.max(), colours, size)


def clouds(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    total = None
    for cells, weight in ((3, 1.0), (7, 0.5), (15, 0.25)):
        shape = (cells, cells * 2 + 1)
        noise = np.frombuffer(rng.randbytes(shape[0] * shape[1]), dtype=np.uint8).reshape(shape[1], shape[0])
        layer = np.asarray(
            Image.fromarray(noise).resize((28, 60), Image.Resampling.BICUBIC), dtype=np.float64
        )
        total = layer * weight if total is None else total + layer * weight
    return coloured((total - total.min()) / max(1.0, total.max() - total.min()), colours, size)


def bands(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = Image.new("RGB", size, colours[0])
    pen, (w, h) = ImageDraw.Draw(image), size
    slope, at, i = rng.choice((-0.8, -0.4, 0, 0.5, 0.9)), -w, 0
    while at < h + w:
        tall = int(w * rng.uniform(0.1, 0.5)) + 2
        shade = colours[i % 3]
        pen.polygon([(0, at), (w, at + slope * w), (w, at + tall + slope * w), (0, at + tall)], fill=shade)
        at, i = at + tall, i + 1
    return image


def facets(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = Image.new("RGB", size, colours[0])
    pen, (w, h) = ImageDraw.Draw(image), size
    across, down = 3, 6
    points = [
        [
            ((i + rng.uniform(-0.3, 0.3)) * w / across, (j + rng.uniform(-0.3, 0.3)) * h / down)
            for i in range(-1, across + 2)
        ]
        for j in range(-1, down + 2)
    ]
    for j in range(down + 2):
        for i in range(across + 2):
            a, b, c, d = points[j][i], points[j][i + 1], points[j + 1][i], points[j + 1][i + 1]
            for corners in ((a, b, c), (b, c, d)):
                shade = mix(colours[rng.randrange(3)], colours[rng.randrange(3)], rng.random())
                pen.polygon(corners, fill=shade)
    return image


def rings(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = Image.new("RGB", size, colours[0])
    pen, (w, h) = ImageDraw.Draw(image), size
    cx, cy = rng.uniform(0, w), rng.uniform(0, h)
    radius, step, i = 1.4 * h, w * rng.uniform(0.12, 0.3), 0
    while radius > 0:
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=colours[i % 3])
        radius, i = radius - step, i + 1
    return image


def checks(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = Image.new("RGB", size, colours[0])
    pen, (w, h) = ImageDraw.Draw(image), size
    cell, tilted = w / rng.randint(3, 7), rng.random() < 0.5
    for j in range(int(h / cell) + 2):
        for i in range(int(w / cell) + 2):
            x, y = i * cell, j * cell
            if tilted:
                corners = [(x, y - cell / 2), (x + cell / 2, y), (x, y + cell / 2), (x - cell / 2, y)]
                pen.polygon(corners, fill=colours[1 + (i + j) % 2])
            elif (i + j) % 2:
                pen.rectangle((x, y, x + cell, y + cell), fill=colours[1 + i % 2])
    return image


def rays(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = Image.new("RGB", size, colours[0])
    pen, (w, h) = ImageDraw.Draw(image), size
    cx, cy = rng.uniform(0.2, 0.8) * w, rng.uniform(0.3, 1.0) * h
    edge = [(x, -h) for x in range(-2 * w, 3 * w, max(1, w // 3))]
    edge += [(x, 2 * h) for x in range(3 * w, -2 * w, -max(1, w // 3))]
    for i, (a, b) in enumerate(zip(edge, edge[1:] + edge[:1])):
        pen.polygon([(cx, cy), a, b], fill=colours[i % 3])
    return image


def hills(rng: random.Random, size: Size, colours: Sequence[Colour]) -> Image.Image:
    image = coloured(np.linspace(0, 1, 12)[:, None] * np.ones((1, 4)), colours[:2], size)
    pen, (w, h) = ImageDraw.Draw(image), size
    count = rng.randint(3, 5)
    for layer in range(count):
        base = h * (0.35 + 0.55 * layer / count)
        points = [(0, h), (0, base)]
        points += [(w * i / 6, base + h * rng.uniform(-0.09, 0.05)) for i in range(1, 6)]
        pen.polygon([*points, (w, base), (w, h)], fill=mix(colours[1], colours[2], (layer + 1) / count))
    return image


WALLPAPERS: dict[str, Callable[[random.Random, Size, Sequence[Colour]], Image.Image]] = {
    function.__name__: function
    for function in (plain, linear, diagonal, blobs, bands, clouds, facets, rings, checks, rays, hills)
}
