"""Charts of one layer while it is quantized: sizes and correlations of its input channels, the steps of the solve.

Plain numbers in, plotly figures out; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.results.charts import marks
from labkit.results.charts.methods import titled

if TYPE_CHECKING:
    import numpy
    import plotly.graph_objects as go

DIVERGING = "RdBu"
FRAMES = 25
"""Most steps of a solve that are drawn: each of the first ones, then fewer and fewer."""


def channel_sizes(sizes: Mapping[str, Sequence[float]], threshold: float | None = None) -> go.Figure:
    """Input channels by size, the largest on the left: one line for each measure, on a logarithmic axis.

    sizes: label -> a size for each channel, ordered by the first. threshold: a dashed line.
    """
    import plotly.graph_objects as go

    first = list(next(iter(sizes.values())))
    order = sorted(range(len(first)), key=lambda index: -first[index])
    chart = go.Figure()
    for index, (label, values) in enumerate(sizes.items()):
        chart.add_scatter(
            y=[float(values[channel]) for channel in order],
            customdata=order,
            name=label,
            mode="lines",
            line={"color": marks.OTHER_COLOURS[index], "width": 2},
            hovertemplate=f"channel %{{customdata}}<br>{label} %{{y:.3g}}<extra></extra>",
        )
    if threshold is not None:
        chart.add_hline(y=threshold, line={"dash": "dash", "color": marks.TEXT})
        chart.add_annotation(
            x=1, xref="paper", xanchor="right", y=math.log10(threshold), yanchor="bottom",
            text=f"threshold {threshold:g}", showarrow=False,
        )  # fmt: skip
    titled(chart, "", "input channels, the largest first", "size of the values")
    chart.update_yaxes(type="log", dtick="D2")
    return chart


def bars(values: Mapping[str, float], unit: str, title: str = "") -> go.Figure:
    """One horizontal bar for each label, the first on top."""
    import plotly.graph_objects as go

    chart = go.Figure()
    chart.add_bar(
        x=list(values.values()),
        y=list(values),
        orientation="h",
        marker={"color": [marks.plan_colour(label) for label in values]},
        text=[f"{value:#.3g}" for value in values.values()],
        textposition="auto",
        hovertemplate=f"%{{y}}<br>%{{x:.4g}} {unit}<extra></extra>",
    )
    titled(chart, title, unit, "")
    chart.update_yaxes(autorange="reversed", ticksuffix="  ")
    chart.update_layout(height=120 + 34 * len(values))
    return chart


def curve(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], x_title: str, y_title: str, title: str = ""
) -> go.Figure:
    """Lines with a mark at each x."""
    import plotly.graph_objects as go

    chart = go.Figure()
    for index, (label, values) in enumerate(lines.items()):
        chart.add_scatter(
            x=list(x), y=list(values), name=label, mode="lines+markers",
            line={"color": marks.OTHER_COLOURS[index], "width": 2},
        )  # fmt: skip
    return titled(chart, title, x_title, y_title)


def correlation_map(matrix: numpy.ndarray, title: str = "") -> go.Figure:
    """Values between -1 and 1 [K, K] as a square map."""
    import plotly.graph_objects as go

    chart = go.Figure()
    chart.add_heatmap(
        z=matrix, zmin=-1, zmax=1, colorscale=DIVERGING,
        hovertemplate="columns %{x} and %{y}<br>%{z:.2f}<extra></extra>",
    )  # fmt: skip
    titled(chart, title, "column, in the order of the solve", "column")
    chart.update_xaxes(constrain="domain")
    chart.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain")
    chart.update_layout(height=480)
    return chart


def solve_slider(
    weight: numpy.ndarray, values: Sequence[numpy.ndarray], order: Sequence[int], title: str = ""
) -> go.Figure:
    """The solve of some rows of a weight, with a slider for the step: the change of each weight.

    weight [N, K]: before. values: [N, K] after each step. order: the column of each step. Columns stand in that
    order, so that the line between what is rounded and what is not moves to the right.
    """
    import plotly.graph_objects as go

    order = list(order)
    shown = drawn_steps(len(values))
    largest = max(float(abs(values[step] - weight).max()) for step in shown)
    chart = go.Figure()
    for step in shown:
        chart.add_heatmap(
            z=(values[step] - weight)[:, order],
            customdata=[order] * len(weight),
            zmin=-largest,
            zmax=largest,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "change"}},
            hovertemplate="row %{y}, column %{customdata}<br>changed by %{z:.3g}<extra></extra>",
            visible=step == shown[0],
        )
    slider = [_slider_step(number, step, len(shown)) for number, step in enumerate(shown)]
    titled(
        chart, title, "columns in the order of the solve: rounded on the left, waiting on the right", "row"
    )
    chart.update_layout(
        height=430, sliders=[{"steps": slider, "currentvalue": {"prefix": "columns rounded: "}}]
    )
    chart.update_layout(margin={"b": 90})
    return chart


def drawn_steps(count: int) -> list[int]:
    """Which of ``count`` steps `solve_slider` draws, `FRAMES` at most, the first and the last among them."""
    if count <= FRAMES:
        return list(range(count))
    growth = count ** (1 / (FRAMES - 1))
    return sorted({min(max(number, round(growth**number) - 1), count - 1) for number in range(FRAMES)})


def _slider_step(number: int, step: int, count: int) -> dict[str, Any]:
    visible = [index == number for index in range(count)]
    line = {"type": "line", "x0": step + 0.5, "x1": step + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    return {
        "method": "update",
        "label": str(step + 1),
        "args": [{"visible": visible}, {"shapes": [{**line, "line": {"color": marks.TEXT, "width": 2}}]}],
    }
