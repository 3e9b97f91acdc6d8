"""The roofline: the highest speed of a product, by its operations and the bytes it must read. Charts; no torch.

A Linear [N, K] with r rows of input does 2 r N K operations and reads its weights once: its *intensity* is operations
over bytes. Below the ridge, peak operations over bandwidth, memory limits the speed; above it, arithmetic does.

Source: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model" (2009).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labkit.common.errors import LabError
from labkit.results.charts import marks
from labkit.results.gpu import CAPTURED, MODULES, GpuRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROWS = (1, 4, 16, 64, 256, 1024)


def intensity(rows: int, bits: float) -> float:
    """Operations a byte of a Linear with ``rows`` rows of input and ``bits`` bits a weight: 2 rows / (bits / 8)."""
    if rows < 1 or bits <= 0:
        raise LabError(f"a product has at least one row and some bits, not {rows} rows and {bits} bits")
    return 2 * rows / (bits / 8)


def floor_s(weights_bytes: float, bandwidth: float, cache_bytes: float = 0.0) -> float:
    """The least seconds a token takes: it reads all weights and the KV cache once. bandwidth: bytes a second."""
    if bandwidth <= 0:
        raise LabError(f"the bandwidth must be positive, not {bandwidth}")
    return (weights_bytes + cache_bytes) / bandwidth


def chart(
    bandwidth: float,
    flops: float,
    bits: Mapping[str, float],
    rows: Sequence[int] = ROWS,
    measured: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> "go.Figure":
    """The roof of a machine, with Linears of some bit widths below it.

    bandwidth: bytes a second. flops: operations a second. bits: name -> bits a weight; each has a mark for every
    number of rows, on the roof (the upper bound). measured: name -> (intensity, operations a second), as crosses.
    """
    import plotly.graph_objects as go

    ridge = flops / bandwidth
    lows = [intensity(rows[0], width) for width in bits.values()]
    highs = [intensity(rows[-1], width) for width in bits.values()]
    ends = [min([*lows, ridge]) / 2, ridge, max([*highs, ridge]) * 2]
    figure = marks.subplots(1, 1, [""])
    figure.add_trace(
        go.Scatter(
            x=ends, y=[min(flops, x * bandwidth) / 1e9 for x in ends], mode="lines", name="the roof",
            line={"color": marks.TEXT, "width": 3}, hoverinfo="skip",
        )
    )  # fmt: skip
    for number, (name, width) in enumerate(bits.items()):
        x = [intensity(count, width) for count in rows]
        mark = {"color": marks.plan_colour(name), "symbol": marks.SYMBOLS[number], "size": 11}
        figure.add_trace(
            go.Scatter(
                x=x, y=[min(flops, value * bandwidth) / 1e9 for value in x], mode="markers", name=name, marker=mark,
                customdata=list(rows),
                hovertemplate=f"<b>{name}</b>, %{{customdata}} rows<br>%{{x:.3g}} operations a byte<br>"
                "at most %{y:.4g} GFLOP/s<extra></extra>",
            )
        )  # fmt: skip
    for name, points in (measured or {}).items():
        figure.add_trace(
            go.Scatter(
                x=[x for x, _ in points], y=[y / 1e9 for _, y in points], mode="markers", showlegend=False,
                marker={"color": marks.plan_colour(name), "symbol": "x-thin", "size": 10,
                        "line": {"width": 2.5, "color": marks.plan_colour(name)}},
                hovertemplate=f"<b>{name}</b>, measured<br>%{{y:.4g}} GFLOP/s<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(**marks.log_axis("intensity: operations for each byte of weights"))
    figure.update_yaxes(**marks.log_axis("GFLOP/s"))
    return marks.styled(figure, height=430, legend=True)


def steps_chart(records: Sequence[GpuRecord], batch: int = 1, context: int = 1024) -> "go.Figure":
    """Milliseconds of a decoding step on a GPU, plan by plan: the model's own modules, the captured step, and the floor.

    records: of `labkit bench-gpu`. Plans that were not measured with this batch and context are left out.
    """
    import plotly.graph_objects as go

    measured = [record for record in records if record.decoded(batch, context) is not None]
    if not measured:
        raise LabError(f"no plan was measured with {batch} x {context} tokens")
    captured = [record.decoded(batch, context) for record in measured]
    modules = [record.decoded(batch, context, MODULES) for record in measured]
    names = [record.plan for record in measured]
    lines = (
        (
            "the floor: its bytes at a copy's speed",
            "circle-open",
            [r.floor_s(d) for r, d in zip(measured, captured)],
        ),
        (f"{CAPTURED}: one CUDA graph", "circle", [decoding.step_s for decoding in captured]),
        (
            "the model's own modules, one after another",
            "x",
            [decoding and decoding.step_s for decoding in modules],
        ),
    )
    figure = marks.subplots(1, 1, [""])
    for title, symbol, seconds in lines:
        places = [index for index, value in enumerate(seconds) if value is not None]
        figure.add_trace(
            go.Scatter(
                x=[1e3 * seconds[index] for index in places], y=[names[index] for index in places],
                mode="markers", name=title, showlegend=False,
                marker={"symbol": symbol, "size": 14, "color": [marks.plan_colour(names[index]) for index in places],
                        "line": {"width": 2, "color": [marks.plan_colour(names[index]) for index in places]}},
                hovertemplate=f"<b>%{{y}}</b>, {title}<br>%{{x:.2f}} ms<extra></extra>",
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[None], y=[names[0]], mode="markers", name=title,
                marker={"symbol": symbol, "size": 12, "color": marks.TEXT},
            )
        )  # fmt: skip
    figure.update_xaxes(**marks.log_axis("milliseconds a step"))
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    return marks.styled(figure, height=130 + 60 * len(measured), legend=True)
