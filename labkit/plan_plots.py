"""Charts of plans: which scheme each Linear gets, layer by layer.

Plain data in, plotly figures out; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.method_plots import layer_of, row_of, styled

if TYPE_CHECKING:
    import plotly.graph_objects as go

BITS = (2, 16)
"""Ends of the colours: bits that a weight takes, scales included."""


def plan_map(linears: Sequence[Mapping[str, Any]], title: str = "") -> go.Figure:
    """Kinds of Linears (rows) by layers (columns), coloured by the bits that a weight takes; darker is less.

    linears: ``linear, role, kind, depth, scheme, parameters, bytes`` each, such as `ResolvedPlan.linears` gives.
    Linears outside a stack of layers stand in the first column.
    """
    import plotly.graph_objects as go

    rows = list(dict.fromkeys((one["role"] or "other", row_of(one)) for one in linears))
    layers = max((layer_of(one) for one in linears), default=0) + 1
    cells: list[list[float | None]] = [[None] * layers for _ in rows]
    told = [[""] * layers for _ in rows]
    for one in linears:
        row, layer = rows.index((one["role"] or "other", row_of(one))), layer_of(one)
        bits = 8 * one["bytes"] / one["parameters"]
        cells[row][layer] = bits
        told[row][layer] = f"<b>{one['linear']}</b><br>{one['scheme']}<br>{bits:.2f} bits a weight"
    chart = go.Figure()
    chart.add_heatmap(
        z=cells,
        x=list(range(layers)),
        y=[f"{role} · {kind}" for role, kind in rows],
        text=told,
        hovertemplate="%{text}<extra></extra>",
        colorscale="Cividis",
        zmin=BITS[0],
        zmax=BITS[1],
        colorbar={"title": {"text": "bits a weight"}, "tickvals": [2, 3, 4, 8, 16]},
        xgap=1,
        ygap=1,
    )
    styled(chart, title, "layer", "")
    chart.update_yaxes(autorange="reversed")
    chart.update_layout(height=110 + 18 * len(rows))
    return chart
