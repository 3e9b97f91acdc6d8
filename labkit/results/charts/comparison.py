"""Charts of measurements: plotly figures, without torch.

A plan has the same colour in every chart; text and grid are grey on a transparent background, for light and dark
pages. The hover text of every mark has its raw numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.common.errors import LabError
from labkit.results.charts import marks
from labkit.results.measurement import Measurement
from labkit.results.tables import group_names

if TYPE_CHECKING:
    import plotly.graph_objects as go

KINDS = ("overview", "bytes", "latency", "accuracy", "paired", "drift")


def figure(measurements: Sequence[Measurement], kind: str = "overview") -> "go.Figure":
    """One chart of `measurements`: a kind from `KINDS`. Raises `LabError` for other kinds, or without measurements."""
    builders = {
        "overview": overview,
        "bytes": bytes_by_role,
        "latency": latency,
        "accuracy": accuracy_against_bytes,
        "paired": paired_differences,
        "drift": drift,
    }
    if kind not in builders:
        raise LabError(f"no chart is called {kind!r}; known are {', '.join(KINDS)}")
    if not measurements:
        raise LabError("there is nothing to draw: no measurement is finished")
    return builders[kind](measurements)


def overview(measurements: Sequence[Measurement]) -> "go.Figure":
    """Four charts in one: bytes, time of an answer, accuracy against bytes, paired differences."""
    chart = marks.subplots(
        2,
        2,
        [
            "Weights by part",
            "A whole answer",
            "Click accuracy against bytes",
            "Right steps against unquantized",
        ],
        horizontal_spacing=0.13,
        vertical_spacing=0.25,
    )
    marks.add_bytes(chart, measurements, 1, 1)
    marks.add_times(chart, measurements, "answer_s", 1, 2)
    marks.add_accuracy(chart, measurements, 2, 1)
    marks.add_paired(chart, measurements, "step_success_rate", 2, 2)
    marks.styled(chart, height=860, legend=True)
    return chart.update_layout(legend={"y": 0.55, "yref": "paper", "yanchor": "top"})


def bytes_by_role(measurements: Sequence[Measurement]) -> "go.Figure":
    """Stacked bars: bytes of the weights in each part of the model."""
    chart = marks.subplots(1, 1, [""])
    marks.add_bytes(chart, measurements, 1, 1)
    return marks.styled(chart, height=150 + 38 * len(measurements), legend=True)


def latency(measurements: Sequence[Measurement]) -> "go.Figure":
    """Three panels: time to the first token, time of a whole answer, decoding speed; medians, quartiles."""
    chart = marks.subplots(
        1, 3, ["First token", "A whole answer", "Decoding"], horizontal_spacing=0.06, shared_yaxes=True
    )
    marks.add_times(chart, measurements, "ttft_s", 1, 1)
    marks.add_times(chart, measurements, "answer_s", 1, 2)
    marks.add_times(chart, measurements, "decode_tokens_per_s", 1, 3)
    return marks.styled(chart, height=130 + 38 * len(measurements))


def accuracy_against_bytes(measurements: Sequence[Measurement]) -> "go.Figure":
    """Click accuracy with 95 % Wilson intervals against bytes: all items, and one panel a split."""
    splits = [name for name in group_names(measurements) if name.startswith("split=")]
    groups = [None, *splits] if len(splits) > 1 else [None]
    titles = [("all items" if group is None else group.removeprefix("split=")) for group in groups]
    chart = marks.subplots(1, len(groups), titles, horizontal_spacing=0.04, shared_yaxes=True)
    for column, group in enumerate(groups, start=1):
        marks.add_accuracy(chart, measurements, 1, column, group)
    return marks.styled(chart, height=460, legend=True)


def paired_differences(measurements: Sequence[Measurement]) -> "go.Figure":
    """Differences to the unquantized row on the same items, in points, with 95 % intervals."""
    chart = marks.subplots(
        1, 2, ["Click accuracy", "Right steps"], horizontal_spacing=0.06, shared_yaxes=True
    )
    marks.add_paired(chart, measurements, "click_accuracy", 1, 1)
    marks.add_paired(chart, measurements, "step_success_rate", 1, 2)
    return marks.styled(chart, height=130 + 38 * len(measurements))


def drift(measurements: Sequence[Measurement]) -> "go.Figure":
    """Signed mean error of the taps in x and y, in percent of the screen's side, with 95 % intervals."""
    import plotly.graph_objects as go

    chart = marks.subplots(1, 1, [""])
    for index, m in enumerate(measurements):
        if m.bias_x is None or m.bias_y is None:
            continue
        chart.add_trace(
            go.Scatter(
                x=[m.bias_x * 100],
                y=[m.bias_y * 100],
                mode="markers",
                name=m.label,
                legend="legend2",
                marker=marks.marker(m, index),
                error_x=marks.error(m.bias_x, m.bias_x_low, m.bias_x_high, m.plan),
                error_y=marks.error(m.bias_y, m.bias_y_low, m.bias_y_high, m.plan),
                hovertemplate=(
                    f"<b>{m.plan}</b><br>right {m.bias_x:+.4f}, down {m.bias_y:+.4f} of the screen's side<br>"
                    f"mean distance {m.mean_distance:.4f}<br>{m.clicks} taps<extra></extra>"
                ),
            )
        )
    chart.add_hline(y=0, line={"color": marks.TEXT, "width": 1})
    chart.add_vline(x=0, line={"color": marks.TEXT, "width": 1})
    chart.update_xaxes(title="← left of the target · right →  (% of the width)", ticksuffix=" %")
    chart.update_yaxes(title="above ↑ · below ↓  (% of the height)", ticksuffix=" %", autorange="reversed")
    return marks.styled(chart, height=460, legend=True)
