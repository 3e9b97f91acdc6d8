"""``report.html``: conclusions, tables and charts of a comparison in one file that opens offline."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.common.files import atomic_path
from labkit.common.formats import format_bytes, format_rate
from labkit.results import disagreements, tables
from labkit.results.charts import comparison, marks
from labkit.results.measurement import Measurement

STYLE = Path(__file__).with_name("report.css")

CHARTS = {
    "bytes": (
        "Bytes",
        "Resident bytes of the weights, counted from the loaded model's tensors, in each part of the model.",
    ),
    "latency": (
        "Time",
        "One request at a time, after warm-up: medians, with quartiles as whiskers. A first token includes "
        "reading the image and the speech; a whole answer is first token and decoding together.",
    ),
    "accuracy": (
        "Accuracy against bytes",
        "Share of taps that land in the target's box; whiskers are 95 % Wilson intervals. "
        "Up and left is better.",
    ),
    "paired": (
        "What quantization costs, item by item",
        "Difference to the unquantized model on the same items, with 95 % intervals. "
        "An interval that crosses the dotted line is no measurable difference.",
    ),
    "drift": (
        "Drift",
        "Mean signed error of the taps, with 95 % intervals: where a plan pulls the finger.",
    ),
}

GROUP_TITLES = {
    "lang=zh": "Chinese",
    "lang=en": "English",
    "target_kind=text": "text targets",
    "target_kind=icon": "icon targets",
    "speaker=unseen_voice": "unseen voices",
    "speaker=unseen_speaker": "unseen speakers",
}

METHOD = (
    "Every plan in a fresh process. Cost first: warm-up, then one request at a time. On the CPU, peak memory "
    "is the process's peak resident set (interpreter, libraries and loading included); it is not GPU memory. "
    "The time of a whole answer depends on its length, which a plan can change. "
    "Quality afterwards, in batches, greedily, on the same items for every plan. Intervals cover 95 %: "
    "Wilson for rates, adjusted Wald (Bonett and Price) for paired differences. Distances are shares of the "
    "screen's side. Raw samples are in results.json."
)

# text and grid follow the colour scheme of the page; the marks keep their colours
SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function recolour() {
  const text = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
  for (const chart of document.querySelectorAll('.js-plotly-plot')) {
    const change = {'font.color': text};
    (chart.layout.annotations || []).forEach((_, i) => change[`annotations[${i}].font.color`] = text);
    Plotly.relayout(chart, change);
  }
}
dark.addEventListener('change', recolour);
addEventListener('load', recolour);
"""


def write_report(
    path: str | os.PathLike, environment: Mapping[str, Any], measurements: Sequence[Measurement]
) -> None:
    """Write the report of `measurements` to `path`; neither writing nor opening it needs a network."""
    with atomic_path(path) as temporary:
        temporary.write_text(report_html(environment, measurements), encoding="utf-8")


def report_html(environment: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    names = {m.model for m in measurements}
    random = " with random weights" if tables.is_cost_only(measurements) else ""
    title = f"{', '.join(sorted(names))}{random} under {len(measurements)} plans"
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p class='subtitle'>{_text(_subtitle(environment, measurements))}</p>",
        _conclusions(environment, measurements),
        tables_html(measurements),
        *(_chart(kind, measurements) for kind in CHARTS if _drawable(kind, measurements)),
        _splits(measurements),
        disagreements.section(measurements),
        "" if tables.is_cost_only(measurements) else _claims(),
        _conditions(environment, measurements),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def tables_html(measurements: Sequence[Measurement]) -> str:
    """The tables of cost and of quality, as the command line prints them."""
    return "\n".join(_table(caption, *table) for caption, table in tables.shown_tables(measurements).items())


def _subtitle(environment: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    first = measurements[0]
    where = environment.get("cpu", "") if first.device == "cpu" else first.environment.get("gpu") or ""
    where = where.get("name", "") if isinstance(where, Mapping) else where
    seed = "standard set" if first.seed is None else f"seed {first.seed}"
    return " · ".join(
        part
        for part in (
            f"{first.device} ({where})" if where else first.device,
            "random weights: cost only"
            if first.weights
            else f"{first.items} PhoneTap test items, {first.split} splits, {seed}",
            f"thinking {'on' if first.enable_thinking else 'off'}",
            str(environment.get("time", "")).replace("T", " ")[:16] + " UTC",
        )
        if part
    )


def _conclusions(environment: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    sentences = [_text(sentence) for sentence in tables.conclusions(measurements)]
    if added := environment.get("added_plan"):
        sentences.append(f"{_text(added)} was not asked for; it was added, to have an unquantized row.")
    for plan, reason in (environment.get("failures") or {}).items():
        sentences.append(f"<strong>{_text(plan)} could not be measured:</strong> {_text(reason)}")
    return f"<ul class='conclusions'>{''.join(f'<li>{s}</li>' for s in sentences)}</ul>" if sentences else ""


def _table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in headers)
    lines = []
    for row in rows:
        colour = marks.plan_colour(row[0].partition(" ")[0])
        dot = f"<i style='background:{colour}'></i>" if row[0] != tables.ARTICLE_ROW else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        kind = " class='claim'" if row[0] == tables.ARTICLE_ROW else ""
        lines.append(f"<tr{kind}><th scope='row'>{dot}{_text(row[0])}</th>{cells}</tr>")
    return (
        f"<div class='scroll'><table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _drawable(kind: str, measurements: Sequence[Measurement]) -> bool:
    """Whether any measurement has the values of the chart."""
    values = {
        "bytes": lambda m: m.weights_bytes,
        "latency": lambda m: m.ttft_s,
        "accuracy": lambda m: m.click_accuracy is not None and m.weights_bytes,
        "paired": lambda m: m.paired.get("items"),
        "drift": lambda m: m.bias_x is not None,
    }
    return any(values[kind](m) for m in measurements)


def _chart(kind: str, measurements: Sequence[Measurement]) -> str:
    title, explanation = CHARTS[kind]
    drawn = comparison.figure(measurements, kind).to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=f"chart-{kind}",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
    )
    return f"<h2>{title}</h2><p>{_text(explanation)}</p>{drawn}"


def _splits(measurements: Sequence[Measurement]) -> str:
    groups = tables.group_names(measurements)
    if not groups:
        return ""
    counts = {
        name: next(m.splits[name]["items"] for m in measurements if name in m.splits) for name in groups
    }
    headers = [
        "Plan",
        *(
            f"{GROUP_TITLES.get(name, name.partition('=')[2])} ({counts[name]})".replace(" ", "\n")
            for name in groups
        ),
    ]
    rows = []
    for m in measurements:
        cells = []
        for name in groups:
            values = m.splits.get(name, {})
            ends = values.get("step_success_rate_low"), values.get("step_success_rate_high")
            cells.append(format_rate(values.get("step_success_rate"), *ends).replace(" [", "\n["))
        rows.append([m.plan, *cells])
    return (
        "<h2>By kind of item</h2><p>Step success with its 95 % interval (number of items in brackets).</p>"
        + _table("Step success", headers, rows)
    )


def _claims() -> str:
    rows = [[claim.subject, claim.claim, claim.evidence] for claim in tables.CLAIMS.values()]
    body = "".join(
        f"<tr><th scope='row'>{_text(a)}</th><td>{_text(b)}</td><td class='prose'>{_text(c)}</td></tr>"
        for a, b, c in rows
    )
    return (
        "<h2>The article's claims</h2><p>“AutoGLM-Phone-9B: parameter quantization strategies” makes them "
        "for the 9 B model with a GPTQ decoder; the rows above are what was measured here.</p>"
        "<div class='scroll'><table><thead><tr><th></th><th>Claim</th><th class='prose'>Known</th></tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _conditions(environment: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    first = measurements[0]
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    facts = {
        "Machine": f"{environment.get('cpu')}, {environment.get('cores')} cores, "
        f"{format_bytes(environment.get('memory_bytes'))} of memory",
        "Load at the start": environment.get("load_average"),
        "Accelerator": json.dumps(first.environment.get("gpu"), ensure_ascii=False)
        if first.environment
        else "none",
        "Platform": environment.get("platform"),
        "Versions": f"Python {environment.get('python')}, {packages}",
        "Commit": environment.get("commit") or "unknown",
        "Threads": first.environment.get("threads"),
        "Command": " ".join(environment.get("command", [])),
    }
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td class='prose'>{_text(value)}</td></tr>"
        for name, value in facts.items()
        if value not in (None, "", "null")
    )
    return (
        f"<h2>How it was measured</h2><p>{METHOD}</p>"
        f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
