"""The marks of every chart, for the panels of `labkit.results.charts.comparison`."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labkit.common.formats import format_bytes, format_change, format_difference, format_rate, format_seconds
from labkit.results.measurement import Measurement
from labkit.results.tables import change, reference_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours, which all readers can distinguish, darkened where they would vanish on white
PLAN_COLOURS = {
    "fp32": "#7F7F7F",
    "bf16": "#A6761D",
    "fp16": "#B39B72",
    "int8": "#0072B2",
    "int8-dynamic": "#56B4E9",
    "int4": "#D55E00",
    "nf4": "#CC79A7",
    "llm-int8": "#009E73",
    "gptq": "#E69F00",
}
OTHER_COLOURS = ("#8C6BB1", "#44AA99", "#999933", "#AA4466", "#5C7CFA", "#C2A83E")
ROLE_COLOURS = {
    "decoder": "#0072B2",
    "vision": "#E69F00",
    "speech": "#009E73",
    "cross_modal": "#CC79A7",
    "projector": "#56B4E9",
    "embedding": "#8C8C8C",
    "lm_head": "#D55E00",
    "other": "#BDBDBD",
}
FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
TEXT = "#7A7A7A"
GRID = "rgba(128,128,128,0.25)"
LEGEND = {
    "orientation": "h",
    "x": 0,
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
    "traceorder": "normal",
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down", "x")


def plan_colour(plan: str) -> str:
    """The colour of a plan, the same in every chart and every run."""
    if plan in PLAN_COLOURS:
        return PLAN_COLOURS[plan]
    return OTHER_COLOURS[hashlib.sha256(plan.encode()).digest()[0] % len(OTHER_COLOURS)]


def add_bytes(chart: Any, measurements: Sequence[Measurement], row: int, col: int) -> None:
    import plotly.graph_objects as go

    roles = [role for role in ROLE_COLOURS if role != "other"]
    sized = [m for m in measurements if m.weights_bytes is not None]
    reference = reference_of(measurements)
    base = reference.weights_bytes if reference else None
    for role in [*roles, "other"]:
        sizes = [_role_bytes(m, role, roles) for m in sized]
        if not any(sizes):
            continue
        chart.add_trace(
            go.Bar(
                y=[m.label for m in sized],
                x=[size / 1e6 for size in sizes],
                name=role.replace("_", "-"),
                orientation="h",
                marker={"color": ROLE_COLOURS[role], "line": {"width": 0}},
                customdata=[
                    [format_bytes(size), format_bytes(m.weights_bytes)] for size, m in zip(sizes, sized)
                ],
                hovertemplate=(
                    f"<b>%{{y}}</b> {role}<br>%{{customdata[0]}} of %{{customdata[1]}}<extra></extra>"
                ),
            ),
            row=row,
            col=col,
        )
    for m in sized:
        cut = "" if m is reference else f"  {format_change(change(m.weights_bytes, base))}"
        chart.add_annotation(
            x=m.weights_bytes / 1e6,
            y=m.label,
            text=f"{format_bytes(m.weights_bytes)}{cut}",
            showarrow=False,
            xanchor="left",
            xshift=5,
            row=row,
            col=col,
        )
    largest = max((m.weights_bytes for m in sized), default=0) / 1e6
    chart.update_xaxes(title="MB (1 MB = 10⁶ bytes)", range=[0, largest * 1.32], row=row, col=col)
    chart.update_yaxes(autorange="reversed", showgrid=False, row=row, col=col)
    chart.update_layout(barmode="stack")


def _role_bytes(m: Measurement, role: str, roles: Sequence[str]) -> int:
    """Bytes of a role; ``other`` is the rest, so that a bar always adds up to the weights."""
    if role != "other":
        return m.bytes_by_role.get(role, 0)
    return max(0, m.weights_bytes - sum(m.bytes_by_role.get(r, 0) for r in roles))


def add_times(chart: Any, measurements: Sequence[Measurement], name: str, row: int, col: int) -> None:
    import plotly.graph_objects as go

    scale, unit = (1, "tokens a second") if name == "decode_tokens_per_s" else (1000, "ms")
    timed = [m for m in measurements if getattr(m, name) is not None]
    spread = [_quartiles(m.samples.get(name)) or (getattr(m, name),) * 2 for m in timed]
    values = [getattr(m, name) for m in timed]
    chart.add_trace(
        go.Bar(
            y=[m.label for m in timed],
            x=[value * scale for value in values],
            orientation="h",
            showlegend=False,
            marker={"color": [plan_colour(m.plan) for m in timed], "line": {"width": 0}},
            error_x={
                "type": "data",
                "array": [max(0.0, high - v) * scale for v, (_, high) in zip(values, spread)],
                "arrayminus": [max(0.0, v - low) * scale for v, (low, _) in zip(values, spread)],
                "color": TEXT,
                "thickness": 1.5,
            },
            customdata=[_time_text(m, name) for m in timed],
            hovertemplate="<b>%{y}</b><br>%{customdata}<extra></extra>",
        ),
        row=row,
        col=col,
    )
    chart.update_xaxes(title=unit, rangemode="tozero", row=row, col=col)
    chart.update_yaxes(autorange="reversed", showgrid=False, row=row, col=col)


def _time_text(m: Measurement, name: str) -> str:
    value, samples = getattr(m, name), m.samples.get(name) or []
    text = f"{value:.1f} tokens/s" if name == "decode_tokens_per_s" else format_seconds(value)
    raw = ", ".join(f"{s:.4g}" for s in samples[:8]) + (" …" if len(samples) > 8 else "")
    return f"median {text}<br>{len(samples)} samples: {raw}" if samples else f"median {text}"


def _quartiles(samples: Any) -> tuple[float, float] | None:
    if not samples or len(samples) < 2:
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def add_accuracy(
    chart: Any,
    measurements: Sequence[Measurement],
    row: int,
    col: int,
    group: str | None = None,
) -> None:
    import plotly.graph_objects as go

    for index, m in enumerate(measurements):
        values = m.splits.get(group, {}) if group else m.to_dict()
        rate = values.get("click_accuracy")
        if rate is None or m.weights_bytes is None:
            continue
        low, high = values["click_accuracy_low"], values["click_accuracy_high"]
        chart.add_trace(
            go.Scatter(
                x=[m.weights_bytes / 1e6],
                y=[rate * 100],
                mode="markers",
                name=m.label,
                legend="legend2",
                legendgroup=m.plan,
                showlegend=col == 1,
                marker=marker(m, index),
                error_y=error(rate, low, high, m.plan),
                hovertemplate=(
                    f"<b>{m.plan}</b><br>click accuracy {format_rate(rate, low, high)}<br>"
                    f"{values['clicks']} taps, {format_bytes(m.weights_bytes)}<extra></extra>"
                ),
            ),
            row=row,
            col=col,
        )
    sizes = [m.weights_bytes / 1e6 for m in measurements if m.weights_bytes]
    if sizes:
        limits = min(sizes) / 1.3, max(sizes) * 1.3
        chart.update_xaxes(
            title="weights, MB (log)",
            type="log",
            range=[math.log10(limit) for limit in limits],
            tickvals=[
                n * 10**e for e in range(-3, 7) for n in (1, 2, 5) if limits[0] <= n * 10**e <= limits[1]
            ],
            row=row,
            col=col,
        )
    chart.update_yaxes(ticksuffix=" %", row=row, col=col)
    if col == 1:
        chart.update_yaxes(title="click accuracy", row=row, col=col)


def add_paired(chart: Any, measurements: Sequence[Measurement], name: str, row: int, col: int) -> None:
    import plotly.graph_objects as go

    reference = reference_of(measurements)
    others = [m for m in measurements if m.paired.get(name) is not None]
    for index, m in enumerate(measurements):
        if m not in others:
            continue
        value, low, high = (m.paired[name + end] for end in ("", "_low", "_high"))
        chart.add_trace(
            go.Scatter(
                x=[value * 100],
                y=[m.label],
                mode="markers",
                showlegend=False,
                marker=marker(m, index),
                error_x=error(value, low, high, m.plan),
                hovertemplate=(
                    f"<b>{m.plan}</b> against {m.paired['reference']}<br>"
                    f"{format_difference(value, low, high)} points<br>"
                    f"{m.paired['items']} items<extra></extra>"
                ),
            ),
            row=row,
            col=col,
        )
    chart.add_vline(x=0, line={"color": TEXT, "width": 1.5, "dash": "dot"}, row=row, col=col)
    against = f"points against {reference.plan}" if reference else "points"
    chart.update_xaxes(title=f"← fewer · more →  ({against})", row=row, col=col)
    order = [m.label for m in others]
    chart.update_yaxes(categoryorder="array", categoryarray=order, autorange="reversed", row=row, col=col)


def marker(m: Measurement, index: int) -> dict[str, Any]:
    return {
        "color": plan_colour(m.plan),
        "symbol": SYMBOLS[index % len(SYMBOLS)],
        "size": 11,
        "line": {"width": 0},
    }


def error(value: float, low: float | None, high: float | None, plan: str) -> dict[str, Any] | None:
    """Error bar in percent from the ends of an interval."""
    if low is None or high is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - value) * 100],
        "arrayminus": [max(0.0, value - low) * 100],
        "color": plan_colour(plan),
        "thickness": 1.5,
        "width": 4,
    }


def subplots(rows: int, columns: int, titles: Sequence[str], **options: Any) -> "go.Figure":
    from plotly.subplots import make_subplots

    return make_subplots(rows=rows, cols=columns, subplot_titles=titles, **options)


def log_axis(title: str) -> dict[str, Any]:
    """A logarithmic axis with labels at 1, 2 and 5: labels at every digit would overlap."""
    return {"type": "log", "dtick": "D2", "title": f"{title} (logarithmic)"}


def themed(chart: "go.Figure") -> "go.Figure":
    """Text and grounds that are readable in light and dark themes."""
    return chart.update_layout(
        font={"color": TEXT, "size": 13, "family": FONT},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )


def styled(chart: "go.Figure", height: int, legend: bool = False) -> "go.Figure":
    themed(chart).update_layout(
        height=height,
        margin={"l": 10, "r": 20, "t": 34, "b": 90 if legend else 10},
        bargap=0.3,
        hovermode="closest",
        showlegend=legend,
        legend=LEGEND,
        legend2=LEGEND,
        hoverlabel={"align": "left"},
    )
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    axis["title"] = {"font": {"size": 13}}
    chart.update_xaxes(**axis)
    chart.update_yaxes(**axis)
    chart.update_annotations(font={"color": TEXT, "size": 13})
    return chart
