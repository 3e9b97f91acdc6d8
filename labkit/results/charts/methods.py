"""Charts of the search for plans: errors while columns are solved, sensitivities, the best plan for each size.

Plain data in, plotly figures out; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.common.formats import format_bytes
from labkit.results.charts import marks

if TYPE_CHECKING:
    import plotly.graph_objects as go

SMALLEST_KL = 1e-8
"""Smaller divergences, which are rounding, are drawn at this value."""


def column_errors(curves: Mapping[str, Sequence[float]], title: str = "") -> go.Figure:
    """Cumulative errors while columns are solved: one line for each method.

    curves: label -> error of each column in the order of the steps (`labkit.quantization.gptq.Solution` gives
    errors and steps by column: ``errors[order]``).
    """
    import plotly.graph_objects as go

    chart = go.Figure()
    for index, (label, errors) in enumerate(curves.items()):
        total, sums = 0.0, []
        for error in errors:
            total += float(error)
            sums.append(total)
        chart.add_scatter(
            x=list(range(1, len(sums) + 1)),
            y=sums,
            name=label,
            mode="lines",
            line={"color": marks.OTHER_COLOURS[index % len(marks.OTHER_COLOURS)], "width": 2},
            hovertemplate=f"{label}<br>column %{{x}}<br>error so far %{{y:.4g}}<extra></extra>",
        )
    return titled(chart, title, "columns solved", "squared output error so far")


def sensitivity_heat_map(records: Sequence[Mapping[str, Any]], value: str = "kl") -> go.Figure:
    """Kinds of Linears (rows) by layers (columns), coloured by the cost of each Linear alone; a button for each scheme.

    records: those of `labkit.measure.search.sensitivity.Sensitivity.linears`. value: ``kl`` (logarithmic colours) or
    ``sqnr_db``. Linears outside a stack of layers are in the first column.
    """
    import plotly.graph_objects as go

    measured = [record for record in records if value in record]
    schemes = list(dict.fromkeys(record["scheme"] for record in measured))
    rows = list(dict.fromkeys((record["role"] or "other", row_of(record)) for record in measured))
    layers = max((layer_of(record) for record in measured), default=0) + 1
    shown = [_shade(record[value], value) for record in measured]
    limits = {"zmin": min(shown, default=0), "zmax": max(shown, default=1)}
    chart = go.Figure()
    for scheme in schemes:
        cells: list[list[float | None]] = [[None] * layers for _ in rows]
        texts = [[""] * layers for _ in rows]
        for record in measured:
            if record["scheme"] == scheme:
                row = rows.index((record["role"] or "other", row_of(record)))
                cells[row][layer_of(record)] = _shade(record[value], value)
                texts[row][layer_of(record)] = _tell(record)
        chart.add_heatmap(
            z=cells,
            x=list(range(layers)),
            y=[f"{role} · {kind}" for role, kind in rows],
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            colorscale="Viridis" if value == "kl" else "Viridis_r",
            colorbar=_colour_bar(value, **limits),
            visible=scheme == schemes[0],
            xgap=1,
            ygap=1,
            **limits,
        )
    titled(chart, "", "layer", "")
    chart.update_yaxes(autorange="reversed")
    chart.update_layout(height=90 + 22 * len(rows))
    if len(schemes) > 1:
        buttons = [
            {
                "label": scheme,
                "method": "update",
                "args": [{"visible": [other == scheme for other in schemes]}],
            }
            for scheme in schemes
        ]
        menu = {
            "type": "buttons",
            "direction": "right",
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "bottom",
        }
        chart.update_layout(updatemenus=[{**menu, "buttons": buttons}], margin={"t": 60})
    return chart


def pareto_front(
    front: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]] = (), title: str = ""
) -> go.Figure:
    """Bytes against divergence: the predicted best for each size as a line, measured plans as marks.

    front: ``bytes, kl`` each; measured: ``plan, bytes, kl`` each, ``searched`` for plans of the search, and
    ``step_success_rate`` where it was measured.
    """
    import plotly.graph_objects as go

    chart = go.Figure()
    ordered = sorted(front, key=lambda point: point["bytes"])
    chart.add_scatter(
        x=[point["bytes"] / 1e6 for point in ordered],
        y=[max(point["kl"], SMALLEST_KL) for point in ordered],
        mode="lines",
        name="predicted, best plan of each size",
        line={"color": "#7F7F7F", "dash": "dot"},
        text=[format_bytes(point["bytes"]) for point in ordered],
        hovertemplate="%{text}<br>predicted %{y:.3g} nats a token<extra></extra>",
    )
    sides = label_sides(measured)
    for record in measured:
        rate = record.get("step_success_rate")
        hover = f"{record['plan']}<br>{format_bytes(record['bytes'])}<br>{record['kl']:.3g} nats a token"
        chart.add_scatter(
            x=[record["bytes"] / 1e6],
            y=[max(record["kl"], SMALLEST_KL)],
            mode="markers+text",
            name=record["plan"],
            text=[record["plan"]],
            textposition=sides[record["plan"]],
            marker={
                "size": 13 if record.get("searched") else 9,
                "symbol": "star" if record.get("searched") else "circle",
                "color": marks.plan_colour(record["plan"]),
            },
            hovertemplate=hover
            + (f"<br>{rate:.1%} right steps" if rate is not None else "")
            + "<extra></extra>",
            showlegend=False,
        )
    titled(chart, title, "MB of weights", "KL divergence, nats a token")
    chart.update_yaxes(type="log", exponentformat="power")
    return chart


def label_sides(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Plotly's position for each plan's name: below plans of the search, right of other marks, and left of a mark whose
    name would overlap the one before."""
    sides: dict[str, str] = {}
    before: tuple[float, float, str] | None = None
    for record in sorted(measured, key=lambda record: record["kl"]):
        height, size = math.log10(max(record["kl"], SMALLEST_KL)), record["bytes"]
        near = before is not None and height - before[0] < 0.2 and abs(size - before[1]) < 0.3 * size
        side = "middle left" if near and before[2] == "middle right" else "middle right"
        sides[record["plan"]] = "bottom center" if record.get("searched") else side
        before = None if record.get("searched") else (height, size, side)
    return sides


def row_of(record: Mapping[str, Any]) -> str:
    """The kind, or the Linear's whole name outside a stack of layers."""
    return record["kind"] if record["depth"] is not None else record["linear"].removeprefix("model.")


def layer_of(record: Mapping[str, Any]) -> int:
    """The layer's number, 0 for a Linear outside a stack of layers."""
    import re

    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", record["linear"]) if record["depth"] is not None else None
    return int(match[1]) if match else 0


def _shade(value: float, kind: str) -> float:
    return math.log10(max(value, SMALLEST_KL)) if kind == "kl" else value


def _tell(record: Mapping[str, Any]) -> str:
    return (
        f"<b>{record['linear']}</b><br>{record['scheme']}, {format_bytes(record['bytes'])}<br>"
        f"KL {record['kl']:.3g} nats a token<br>output {record['sqnr_db']:.1f} dB"
    )


def _colour_bar(value: str, zmin: float, zmax: float) -> dict[str, Any]:
    if value != "kl":
        return {"title": {"text": "dB"}}
    ticks = list(range(math.floor(zmin), math.ceil(zmax) + 1))
    return {
        "title": {"text": "KL, nats a token"},
        "tickvals": ticks,
        "ticktext": [f"10<sup>{power}</sup>" for power in ticks],
    }


def titled(chart: go.Figure, title: str, x: str, y: str) -> go.Figure:
    """Axes, colours and margins that these charts share; readable in light and dark themes."""
    axis = {"gridcolor": marks.GRID, "zeroline": False}
    small = {"size": 13}
    marks.themed(chart).update_layout(
        title={"text": title},
        xaxis={**axis, "title": {"text": x, "font": small}},
        yaxis={**axis, "title": {"text": y, "font": small}},
        margin={"l": 20, "r": 20, "t": 40, "b": 40},
    )
    return chart


BITS = (2, 16)
"""Ends of the colour scale: bits a weight, with scales."""


def plan_map(linears: Sequence[Mapping[str, Any]], title: str = "") -> go.Figure:
    """Kinds of Linears (rows) by layers (columns), coloured by bits a weight; darker is fewer.

    linears: ``linear, role, kind, depth, scheme, parameters, bytes`` each, such as `ResolvedPlan.linears` returns.
    Linears outside a stack of layers are in the first column.
    """
    import plotly.graph_objects as go

    rows = list(dict.fromkeys((record["role"] or "other", row_of(record)) for record in linears))
    layers = max((layer_of(record) for record in linears), default=0) + 1
    cells: list[list[float | None]] = [[None] * layers for _ in rows]
    texts = [[""] * layers for _ in rows]
    for record in linears:
        row, layer = rows.index((record["role"] or "other", row_of(record))), layer_of(record)
        bits = 8 * record["bytes"] / record["parameters"]
        cells[row][layer] = bits
        texts[row][layer] = f"<b>{record['linear']}</b><br>{record['scheme']}<br>{bits:.2f} bits a weight"
    chart = go.Figure()
    chart.add_heatmap(
        z=cells,
        x=list(range(layers)),
        y=[f"{role} · {kind}" for role, kind in rows],
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        colorscale="Cividis",
        zmin=BITS[0],
        zmax=BITS[1],
        colorbar={"title": {"text": "bits a weight"}, "tickvals": [2, 3, 4, 8, 16]},
        xgap=1,
        ygap=1,
    )
    titled(chart, title, "layer", "")
    chart.update_yaxes(autorange="reversed")
    chart.update_layout(height=110 + 18 * len(rows))
    return chart
