"""A comparison as one SVG picture, for a README or a slide: ``labkit plot``. No torch, no browser, no plotly.

The same measurements always give the same bytes of SVG, so that tests can check a committed picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from labkit.common.errors import LabError
from labkit.common.formats import format_bytes, format_change, format_rate, format_seconds
from labkit.results.charts.marks import TEXT, plan_colour
from labkit.results.measurement import Measurement
from labkit.results.tables import change, reference_of

WIDTH, NAMES, GAP = 960, 104, 26
"""Width of the picture, of the plans' names, and between panels, in pixels."""
TOP, LINE, BOTTOM = 62, 30, 34
BAR = 14
LABEL_SHARE = 0.47
"""The share of a bar panel that is reserved for the number after the longest bar."""


@dataclass(frozen=True)
class Panel:
    """The position of a panel, and its value of a measurement."""

    title: str
    left: float
    width: float
    value: Callable[[Measurement], float | None]


def comparison_svg(measurements: Sequence[Measurement], caption: str = "") -> str:
    """The picture of `measurements` as SVG text, with `caption` below it. Raises `LabError` if there are none.

    Three panels with a line for each plan: bytes of the weights, time of a whole answer, right steps with their 95 %
    interval. Text and lines are grey on a transparent background, for light and dark pages.
    """
    if not measurements:
        raise LabError("there is nothing to draw: no measurement is finished")
    width = (WIDTH - NAMES - 3 * GAP) / 3
    lefts = [NAMES + GAP + number * (width + GAP) for number in range(3)]
    height = TOP + LINE * len(measurements) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, -apple-system, \'Segoe UI\', sans-serif" font-size="13" '
        f'fill="{TEXT}">',
        f"<title>{escape(_spoken(measurements))}</title>",
    ]
    for number, m in enumerate(measurements):
        parts.append(_text(NAMES, _middle(number), m.plan, anchor="end", weight=600))
    reference = reference_of(measurements)
    parts += _bars(
        Panel("Weights", lefts[0], width, lambda m: m.weights_bytes), measurements, reference, format_bytes
    )
    parts += _bars(
        Panel("A whole answer", lefts[1], width, lambda m: m.answer_s),
        measurements,
        reference,
        format_seconds,
    )
    parts += _rates(Panel("Right steps", lefts[2], width, lambda m: m.step_success_rate), measurements)
    parts.append(_text(NAMES + GAP, height - 10, caption, size=11.5))
    return "\n".join([*parts, "</svg>", ""])


def _bars(
    panel: Panel,
    measurements: Sequence[Measurement],
    reference: Measurement | None,
    written: Callable[[float], str],
) -> list[str]:
    """Bars from 0, each with its number and its change against the unquantized row."""
    parts = [_text(panel.left, TOP - 24, panel.title, weight=600)]
    values = [panel.value(m) for m in measurements]
    longest = max((value for value in values if value is not None), default=0) or 1
    base = panel.value(reference) if reference else None
    for number, (m, value) in enumerate(zip(measurements, values)):
        if value is None:
            parts.append(_text(panel.left, _middle(number), "not measured"))
            continue
        length = value / longest * panel.width * (1 - LABEL_SHARE)
        top = TOP + LINE * number + (LINE - BAR) / 2
        label = (
            written(value) if m is reference else f"{written(value)}  {format_change(change(value, base))}"
        )
        parts.append(
            f'<rect x="{panel.left:.1f}" y="{top:.1f}" width="{length:.1f}" height="{BAR}" rx="2" '
            f'fill="{plan_colour(m.plan)}"/>'
        )
        parts.append(_text(panel.left + length + 6, _middle(number), label))
    return parts


def _rates(panel: Panel, measurements: Sequence[Measurement]) -> list[str]:
    """Points with their intervals on an axis whose ends are named: it need not begin at 0."""
    parts = [_text(panel.left, TOP - 24, f"{panel.title}, 95 % interval", weight=600)]
    shown = [m for m in measurements if panel.value(m) is not None]
    lowest = min((_low(m) for m in shown), default=0.0)
    start = max(0.0, int(lowest * 10) / 10)
    width = panel.width * 0.68

    def x(rate: float) -> float:
        return panel.left + (rate - start) / (1 - start) * width

    end = TOP + LINE * len(measurements)
    for rate in (start, (start + 1) / 2, 1.0):
        parts.append(
            f'<line x1="{x(rate):.1f}" x2="{x(rate):.1f}" y1="{TOP}" y2="{end}" stroke="{TEXT}" '
            'stroke-opacity="0.35"/>'
        )
        parts.append(_text(x(rate), TOP - 7, f"{rate * 100:.0f} %", anchor="middle", size=11))
    for number, m in enumerate(measurements):
        rate = panel.value(m)
        middle = TOP + LINE * (number + 0.5)
        if rate is None:
            why = "not measured" if m.weights is None else f"{m.weights} weights: cost only"
            parts.append(_text(panel.left, _middle(number), why))
            continue
        colour = plan_colour(m.plan)
        parts.append(
            f'<line x1="{x(_low(m)):.1f}" x2="{x(_high(m)):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(rate):.1f}" cy="{middle:.1f}" r="4.5" fill="{colour}"/>')
        parts.append(_text(x(1.0) + 8, _middle(number), format_rate(rate)))
    return parts


def _low(m: Measurement) -> float:
    return m.step_success_rate if m.step_success_rate_low is None else m.step_success_rate_low


def _high(m: Measurement) -> float:
    return m.step_success_rate if m.step_success_rate_high is None else m.step_success_rate_high


def _middle(number: int) -> float:
    """The baseline of the text of line `number`."""
    return TOP + LINE * (number + 0.5) + 4.5


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400, size: float = 13
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _spoken(measurements: Sequence[Measurement]) -> str:
    """The picture in words, for screen readers."""
    sentences = [
        f"{m.label}: {format_bytes(m.weights_bytes)} of weights, {format_seconds(m.answer_s)} an answer, "
        f"{format_rate(m.step_success_rate)} of the steps right"
        for m in measurements
    ]
    return "; ".join(sentences)
