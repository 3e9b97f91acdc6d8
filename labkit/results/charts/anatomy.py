"""Charts of a model's anatomy: plotly figures, without torch, in the colours of `labkit.results.charts.marks`."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.common.formats import format_bytes
from labkit.results.charts import marks as chart_marks

if TYPE_CHECKING:
    import plotly.graph_objects as go

GPU_GB = (8, 12, 16, 24)
"""Common memory sizes of GPUs."""
ROLE_NAMES = {"cross_modal": "cross-modal attention", "lm_head": "lm_head", "speech": "speech encoder",
              "vision": "vision encoder", "projector": "projectors"}  # fmt: skip
_BLOCK = re.compile(r"(?:.*\.)?((?:conv_)?(?:layers|blocks))\.(\d+)\.(.+)")


def role_name(role: str) -> str:
    """The display name of a role."""
    return ROLE_NAMES.get(role, role)


def treemap(parts: Sequence[Any], title: str, value: str) -> "go.Figure":
    """Whole -> part -> layer -> module. parts: with ``module``, ``role``, and ``parameters`` or ``bytes``."""
    import plotly.graph_objects as go

    nodes = {"model": _node(title, "", None)}
    for part in parts:
        amount = getattr(part, value)
        if not amount:
            continue
        path = ("model", *_path(part.module, part.role))
        for depth in range(1, len(path)):
            key = "/".join(path[: depth + 1])
            nodes.setdefault(key, _node(path[depth], "/".join(path[:depth]), part.role))
        for depth in range(len(path)):
            nodes["/".join(path[: depth + 1])]["value"] += amount
    entries = list(nodes.values())
    amounts = [entry["value"] for entry in entries]
    chart = go.Figure(
        go.Treemap(
            ids=list(nodes),
            labels=[entry["label"] for entry in entries],
            parents=[entry["parent"] for entry in entries],
            values=amounts,
            branchvalues="total",
            maxdepth=3,
            marker={
                "colors": [_colour(entry["role"]) for entry in entries],
                "line": {"width": 1, "color": "white"},
            },
            text=[_amount(amount, value) for amount in amounts],
            texttemplate="%{label}<br>%{text}<br>%{percentRoot:.1%}",
            hovertemplate="<b>%{label}</b><br>%{text}, %{percentRoot:.2%} of the model<extra></extra>",
            root={"color": "rgba(128,128,128,0.2)"},
            pathbar={"visible": True},
        )
    )
    return chart_marks.styled(chart, height=520)


def _node(label: str, parent: str, role: str | None) -> dict[str, Any]:
    return {"label": label, "parent": parent, "role": role, "value": 0}


def _path(module: str, role: str) -> tuple[str, ...]:
    """The labels from the part down to the module; a part of one module has no level of its own."""
    match = _BLOCK.fullmatch(module)
    if role in ("embedding", "lm_head") or not module:
        return (role_name(role),)
    if match:
        stack, number, rest = match.groups()
        stack = "filter" if stack == "conv_layers" else stack.removesuffix("s")
        return role_name(role), f"{stack} {number}", rest
    return role_name(role), ".".join(module.split(".")[-2:])


def _colour(role: str | None) -> str:
    return "rgba(128,128,128,0.2)" if role is None else chart_marks.ROLE_COLOURS.get(role, "#BDBDBD")


def _amount(amount: float, value: str) -> str:
    if value == "bytes":
        return format_bytes(amount)
    return format_bytes(amount).replace("GB", "B").replace("MB", "M").replace("kB", "k").removesuffix(" B")


def skyline(linears: Sequence[Any]) -> "go.Figure":
    """One bar a Linear, in the model's order; colour is the part, height the number of parameters."""
    import plotly.graph_objects as go

    chart = chart_marks.subplots(1, 1, [""])
    for role in dict.fromkeys(part.role for part in linears):
        mine = [(number, part) for number, part in enumerate(linears, 1) if part.role == role]
        chart.add_trace(
            go.Bar(
                x=[number for number, _ in mine],
                y=[part.parameters for _, part in mine],
                name=f"{role_name(role)} ({len(mine)})",
                width=1,
                marker={"color": _colour(role), "line": {"width": 0}},
                customdata=[[part.module, _amount(part.parameters, "parameters")] for _, part in mine],
                hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]} parameters<extra></extra>",
            )
        )
    chart.update_xaxes(title="Linears, in the order of the model's modules", showgrid=False)
    chart.update_yaxes(title="parameters")
    return chart_marks.styled(chart, height=380, legend=True)


def bars(
    columns: Mapping[str, Mapping[str, float]], value: str, marks: Mapping[str, float] | None = None
) -> "go.Figure":
    """Stacked bars, one for each entry of ``columns`` (name -> role -> amount); value: ``bytes`` or ``share``.

    marks: label -> bytes, drawn as dashed lines.
    """
    import plotly.graph_objects as go

    totals = {name: sum(amounts.values()) for name, amounts in columns.items()}
    scale, unit = (1e9, "GB") if max(totals.values()) >= 1e9 else (1e6, "MB")
    chart = chart_marks.subplots(1, 1, [""])
    for role in chart_marks.ROLE_COLOURS:
        amounts = {name: column.get(role, 0) for name, column in columns.items()}
        if not any(amount / totals[name] > 1e-3 for name, amount in amounts.items()):
            continue
        shares = [amount / totals[name] for name, amount in amounts.items()]
        texts = [
            _amount(amount, "bytes" if value == "bytes" else "parameters") for amount in amounts.values()
        ]
        chart.add_trace(
            go.Bar(
                y=list(amounts),
                x=[share * 100 for share in shares]
                if value == "share"
                else [amount / scale for amount in amounts.values()],
                name=role_name(role),
                orientation="h",
                marker={"color": _colour(role), "line": {"width": 0}},
                customdata=[[text, f"{share:.1%}"] for text, share in zip(texts, shares)],
                hovertemplate=f"<b>%{{y}}</b>, {role_name(role)}<br>"
                "%{customdata[0]}, %{customdata[1]}<extra></extra>",
            )
        )
    if value == "bytes":
        for name, total in totals.items():
            chart.add_annotation(
                x=total / scale, y=name, text=format_bytes(total), showarrow=False, xanchor="left", xshift=5
            )
        largest = max([*totals.values(), *(marks or {}).values()]) / scale
        chart.update_xaxes(title=f"{unit} (1 {unit} = 10{'⁹' if unit == 'GB' else '⁶'} bytes)")
        chart.update_xaxes(range=[0, largest * 1.15])
    else:
        chart.update_xaxes(title="share of the parameters", ticksuffix=" %", range=[0, 100.5])
    chart.update_yaxes(autorange="reversed", showgrid=False)
    chart.update_layout(barmode="stack")
    chart_marks.styled(chart, height=170 + 42 * len(columns), legend=True)
    for words, amount in (marks or {}).items():
        chart.add_vline(x=amount / scale, line={"color": chart_marks.TEXT, "width": 2, "dash": "dash"})
        chart.add_annotation(
            x=amount / scale, y=1, yref="paper", yanchor="bottom", text=words, showarrow=False
        )
    return chart.update_annotations(font={"color": chart_marks.TEXT, "size": 13})


def memory(lines: Mapping[str, tuple[int, int, int | None]], tokens: int) -> "go.Figure":
    """Weights and KV cache against the tokens of a conversation.

    lines: plan -> (bytes of the weights, bytes of the KV cache a token, its limit of tokens or None). GPU
    sizes are dashed lines.
    """
    import plotly.graph_objects as go

    chart = chart_marks.subplots(1, 1, [""])
    largest = (
        max(weights + min(tokens, most or tokens) * each for weights, each, most in lines.values()) / 1e9
    )
    for plan, (weights, each, most) in lines.items():
        ends = sorted({0, min(most or tokens, tokens), tokens})
        sizes = [weights + min(count, most or tokens) * each for count in ends]
        chart.add_trace(
            go.Scatter(
                x=ends,
                y=[size / 1e9 for size in sizes],
                name=plan,
                mode="lines",
                line={"color": chart_marks.plan_colour(plan), "width": 3},
                customdata=[[format_bytes(size), format_bytes(each)] for size in sizes],
                hovertemplate=f"<b>{plan}</b><br>%{{x:,}} tokens: %{{customdata[0]}}<br>"
                "%{customdata[1]} of KV cache a token<extra></extra>",
            )
        )
    for size in GPU_GB:
        if size < largest * 1.5:
            chart.add_hline(y=size, line={"color": chart_marks.TEXT, "width": 1, "dash": "dash"})
            chart.add_annotation(
                x=0, y=size, text=f"{size} GB GPU", showarrow=False, xanchor="left", yshift=8
            )
    chart.update_xaxes(title="tokens in the conversation, images included", range=[0, tokens])
    chart.update_yaxes(title="GB of weights and KV cache", rangemode="tozero")
    return chart_marks.styled(chart, height=460, legend=True)
