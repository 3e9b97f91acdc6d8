"""The pen that draws glyph icons: strokes and shapes on a grid of 24 units, at four times the final size."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image, ImageDraw

SUPERSAMPLING = 4
Point = tuple[float, float]


class Pen:
    """Draws white strokes and shapes, in units of a 24 x 24 grid, on one mask of `size` pixels' side."""

    def __init__(self, size: int, stroke: float, filled: bool):
        self.scale = size * SUPERSAMPLING / 24
        self.image = Image.new("L", (size * SUPERSAMPLING,) * 2)
        self.draw = ImageDraw.Draw(self.image)
        self.stroke, self.filled = stroke, filled

    def at(self, points: Iterable[Point]) -> list[Point]:
        return [(round(x * self.scale, 2), round(y * self.scale, 2)) for x, y in points]

    def dot(self, x: float, y: float, radius: float, ink: int = 255) -> None:
        self.draw.ellipse(self.at([(x - radius, y - radius), (x + radius, y + radius)]), fill=ink)

    def line(self, *points: Point, width: float = 0, ink: int = 255, closed: bool = False) -> None:
        """A stroke with round ends and corners through `points`."""
        width = width or self.stroke
        path = [*points, points[0]] if closed else list(points)
        pixels = max(1, round(width * self.scale))
        self.draw.line(self.at(path), fill=ink, width=pixels, joint="curve")
        for x, y in points:
            self.dot(x, y, width / 2 - 0.02, ink)

    def shape(self, *points: Point, fill: bool | None = None) -> None:
        """A closed outline, filled when the glyph's style is."""
        if self.filled if fill is None else fill:
            self.draw.polygon(self.at(points), fill=255)
        self.line(*points, closed=True)

    def ring(self, x: float, y: float, radius: float, fill: bool | None = None) -> None:
        self.dot(x, y, radius + self.stroke / 2)
        if not (self.filled if fill is None else fill):
            self.dot(x, y, radius - self.stroke / 2, 0)

    def arc(self, x: float, y: float, radius: float, start: float, end: float, width: float = 0) -> None:
        """Part of a circle, angles in degrees clockwise from three o'clock, round ends."""
        steps = max(4, int(abs(end - start) / 9))
        self.line(
            *(polar(x, y, radius, start + (end - start) * i / steps) for i in range(steps + 1)), width=width
        )

    def box(
        self, x0: float, y0: float, x1: float, y1: float, radius: float = 1.5, fill: bool | None = None
    ) -> None:
        half = self.stroke / 2
        outer = self.at([(x0 - half, y0 - half), (x1 + half, y1 + half)])
        self.draw.rounded_rectangle(outer, (radius + half) * self.scale, fill=255)
        if not (self.filled if fill is None else fill):
            inner = self.at([(x0 + half, y0 + half), (x1 - half, y1 - half)])
            self.draw.rounded_rectangle(inner, max(0.0, radius - half) * self.scale, fill=0)


def polar(x: float, y: float, radius: float, degrees: float) -> Point:
    """The point at an angle (degrees clockwise from three o'clock) and distance from (x, y)."""
    angle = math.radians(degrees)
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def bezier(p0: Point, p1: Point, p2: Point, p3: Point, steps: int = 14) -> list[Point]:
    """Points along a cubic curve."""
    points = []
    for i in range(steps + 1):
        t = i / steps
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        points.append(tuple(a * p0[k] + b * p1[k] + c * p2[k] + d * p3[k] for k in (0, 1)))
    return points
