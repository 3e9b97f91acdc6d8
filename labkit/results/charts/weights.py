"""Charts of weights before and after rounding: plotly figures of numpy arrays, without torch.

Values before are blue bars or areas, values after are orange lines or dots: shapes differ as well as colours.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from labkit.results.charts import marks

if TYPE_CHECKING:
    import plotly.graph_objects as go

BEFORE, AFTER = "#0072B2", "#D55E00"
LARGEST_MAP = 192
"""Most rows and columns of a heat map; larger matrices are averaged down."""
BINS = 121


class Tensor(Protocol):
    """A torch tensor, which this room does not import."""

    def detach(self) -> "Tensor":
        """Itself without its history."""

    def float(self) -> "Tensor":
        """As float32."""

    def cpu(self) -> "Tensor":
        """In main memory."""

    def numpy(self) -> np.ndarray:
        """As an array."""


Values = Tensor | np.ndarray | Sequence
"""Weights."""


def row(before: Values, after: Values | None = None, levels: Values | None = None) -> "go.Figure":
    """A few weights as bars, their rounded values as dots, and the levels of rounding as thin lines."""
    import plotly.graph_objects as go

    before = _array(before)
    chart = marks.subplots(1, 1, [""])
    chart.add_trace(go.Bar(y=before, name="weight", marker={"color": BEFORE, "opacity": 0.45}))
    if after is not None:
        chart.add_trace(
            go.Scatter(
                y=_array(after), name="after rounding", mode="markers", marker={"color": AFTER, "size": 8}
            )
        )
    for level in [] if levels is None else _array(levels):
        chart.add_hline(y=float(level), line={"color": marks.GRID, "width": 1})
    chart.update_xaxes(title="position in the row", showgrid=False, zeroline=False)
    chart.update_yaxes(title="value", showgrid=levels is None)
    return marks.styled(chart, height=340, legend=after is not None)


def histogram(before: Values, after: Values | None = None, what: str = "weight") -> "go.Figure":
    """How often each value occurs: an area before, an orange line after; hover for the counts.

    ``what`` names the values on the axes: ``weight``, ``scale``.
    """
    chart = marks.subplots(1, 1, [""])
    for trace in histogram_traces(before, after):
        chart.add_trace(trace)
    chart.update_xaxes(title=f"value of a {what}")
    chart.update_yaxes(title=f"share of the {what}s", tickformat=".1%", rangemode="tozero")
    return marks.styled(chart, height=340, legend=after is not None)


def histogram_traces(before: Values, after: Values | None = None) -> "list[go.Scatter]":
    """The marks of `histogram`, for a figure that is updated; the axis begins at 0 where nothing is negative."""
    import plotly.graph_objects as go

    before = _array(before)
    limit = float(np.abs(before).max()) or 1.0
    edges = np.linspace(0.0 if before.min() >= 0 else -limit, limit, BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    traces = [
        go.Scatter(
            x=middles, y=_shares(before, edges), name="before", fill="tozeroy", mode="lines",
            line={"color": BEFORE, "width": 1, "shape": "hvh"},
        )
    ]  # fmt: skip
    if after is not None:
        line = {"color": AFTER, "width": 1.5, "shape": "hvh"}
        traces.append(
            go.Scatter(x=middles, y=_shares(_array(after), edges), name="after", mode="lines", line=line)
        )
    return traces


def heat(matrix: Values, name: str = "value", columns: str = "input features") -> "go.Figure":
    """A matrix [N, K] as colours (Cividis, which all readers see alike); large ones are averaged down.

    ``name`` labels the colours, ``columns`` the columns.
    """
    import plotly.graph_objects as go

    matrix = _array(matrix)
    chart = marks.subplots(1, 1, [""])
    chart.add_trace(
        go.Heatmap(
            z=smaller(matrix), colorscale="Cividis", colorbar={"title": name, "thickness": 12},
            hovertemplate=f"%{{z:.4g}}<extra>{name}</extra>",
        )
    )  # fmt: skip
    chart.update_xaxes(title=f"{columns} ({matrix.shape[1]:,})", showgrid=False, showticklabels=False)
    chart.update_yaxes(
        title=f"output features ({matrix.shape[0]:,})",
        showgrid=False,
        showticklabels=False,
        autorange="reversed",
    )
    return marks.styled(chart, height=360)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    names: Sequence[str] | None = None,
    level: tuple[float, str] | None = None,
    log: bool = False,
) -> "go.Figure":
    """Points joined by lines, one line an entry: ``{"groups of 64": [(4.5, 19.3), …]}``.

    x, y: the axes' titles. names: labels for the points of every line. level: a dashed line and its label. log: both
    axes are logarithmic, with ticks at the points' own x.
    """
    import plotly.graph_objects as go

    colours = [*marks.ROLE_COLOURS.values()]
    chart = marks.subplots(1, 1, [""])
    for number, (name, points) in enumerate(series.items()):
        chart.add_trace(
            go.Scatter(
                x=[point[0] for point in points], y=[point[1] for point in points], name=name,
                mode="lines+markers", text=names, line={"color": colours[number % 7], "width": 2},
                marker={"symbol": marks.SYMBOLS[number % len(marks.SYMBOLS)], "size": 9},
                hovertemplate=f"<b>{name}</b> %{{text}}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>"
                if names
                else f"<b>{name}</b><br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            )
        )  # fmt: skip
    if level is not None:
        chart.add_hline(y=level[0], line={"color": marks.TEXT, "width": 1.5, "dash": "dash"})
        chart.add_annotation(
            x=1, xref="paper", xanchor="right", y=level[0], yshift=9, text=level[1], showarrow=False
        )
    chart.update_xaxes(title=x)
    chart.update_yaxes(title=y)
    if log:
        places = sorted({point[0] for points in series.values() for point in points})
        chart.update_xaxes(**marks.log_axis(x), tickvals=places)
        chart.update_yaxes(**marks.log_axis(y))
    return marks.styled(chart, height=400, legend=True)


def codebooks(weights: Values, books: Mapping[str, Values]) -> "go.Figure":
    """Each codebook's values as a row of marks below the histogram of the weights."""
    import plotly.graph_objects as go

    chart = histogram(weights)
    top = float(np.max(chart.data[0].y))
    for number, (name, values) in enumerate(books.items(), 1):
        values = _array(values)
        chart.add_trace(
            go.Scatter(
                x=values, y=np.full(len(values), -0.12 * number * top), name=name, mode="markers",
                marker={"symbol": "line-ns", "size": 16, "line": {"width": 2.5, "color": AFTER if number == 1
                        else marks.ROLE_COLOURS["speech"]}},
                hovertemplate=f"<b>{name}</b> %{{x:.4f}}<extra></extra>",
            )
        )  # fmt: skip
        chart.add_annotation(
            x=float(values[0]),
            xanchor="right",
            xshift=-12,
            y=-0.12 * number * top,
            text=name,
            showarrow=False,
        )
    chart.update_xaxes(title="weight, as a share of its block's largest magnitude", range=[-1.3, 1.05])
    step = 10.0 ** np.floor(np.log10(top))
    chart.update_yaxes(rangemode="normal", tickvals=np.arange(0, top, step))
    return marks.styled(chart, height=400)


def smaller(matrix: Values) -> np.ndarray:
    """A matrix averaged down to `LARGEST_MAP` rows and columns at most."""
    matrix = _array(matrix)
    for axis in (0, 1):
        step = -(-matrix.shape[axis] // LARGEST_MAP)
        if step > 1:
            starts = np.arange(0, matrix.shape[axis], step)
            counts = np.diff([*starts, matrix.shape[axis]])
            sums = np.add.reduceat(matrix, starts, axis=axis)
            matrix = sums / (counts[:, None] if axis == 0 else counts[None])
    return matrix


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(values, edges)
    return counts / max(1, values.size)


def _array(values: Values) -> np.ndarray:
    """The values as float32."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)
