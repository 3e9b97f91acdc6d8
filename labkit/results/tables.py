"""Measurements as rows and sentences, for the printed table, the DataFrame and the report.

Changes are fractions (-0.25 is a quarter less); differences are in the metric's unit (rates: 0.01 is one point).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.common.formats import (
    format_bytes,
    format_change,
    format_difference,
    format_points,
    format_rate,
    format_rate_per_s,
    format_seconds,
)
from labkit.results.measurement import Measurement

ARTICLE_ROW = "article's claim"
RANDOM_WEIGHTS = "The weights are random: this is what plans cost, and says nothing of how well they answer."
UNQUANTIZED = ("fp32", "bf16", "fp16")
"""Plans that quantize nothing, the best reference first."""


@dataclass(frozen=True)
class Claim:
    """A claim of the article: its text, its value as a fraction, and what speaks for it or against it."""

    subject: str
    claim: str
    value: float
    evidence: str


CLAIMS = {
    "bytes": Claim(
        "Bytes against FP32",
        "18.3 GB → 6.9 GB (−62 %)",
        6.9 / 18.3 - 1,
        "FP32 of the 9 B model is 41.2 GB and BF16 20.6 GB (10.293 B parameters); 18.3 GB is near BF16 of "
        "its text part alone. INT4 (group 128) decoder with the rest in BF16 is 8.60 GB (computed).",
    ),
    "latency": Claim(
        "Latency against FP32",
        "−40 %",
        -0.40,
        "Nobody has published a measurement. In the plain eager loop on a GPU no quantization is faster.",
    ),
    "loss": Claim(
        "Loss of accuracy",
        "< 3 %",
        -0.03,
        "Nobody has published the tap accuracy of any quantization of this model.",
    ),
}


def reference_of(measurements: Sequence[Measurement]) -> Measurement | None:
    """The unquantized row that the others are compared with: fp32, else bf16, else fp16, else None."""
    by_plan = {m.plan: m for m in measurements}
    return next((by_plan[plan] for plan in UNQUANTIZED if plan in by_plan), None)


def group_names(measurements: Sequence[Measurement]) -> list[str]:
    """Every group measured, in reading order: splits from easy to hard, languages, kinds of target."""
    order = [
        "split=typed",
        "split=spoken",
        "split=hard",
        "lang=zh",
        "lang=en",
        "target_kind=text",
        "target_kind=icon",
    ]
    names = dict.fromkeys(name for m in measurements for name in m.splits)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def change(value: float | None, reference: float | None) -> float | None:
    """``value / reference - 1``; None where either is missing or the reference is 0."""
    return None if value is None or not reference else value / reference - 1


def comparison_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One flat row a measurement: its numbers, its changes against the unquantized row, its paired losses.

    ``reference`` is the unquantized row's plan; ``weights_change`` and ``answer_change`` are fractions;
    ``click_accuracy_difference`` and ``step_success_rate_difference`` (with ``_low``, ``_high``) are paired.
    """
    reference = reference_of(measurements)
    rows = []
    for m in measurements:
        row = {
            name: getattr(m, name)
            for name in Measurement.__dataclass_fields__
            if name not in ("plan_definition", "bytes_by_role", "splits", "paired", "samples", "environment")
        }
        row["reference"] = reference.plan if reference else None
        row["weights_change"] = change(m.weights_bytes, reference and reference.weights_bytes)
        row["ttft_change"] = change(m.ttft_s, reference and reference.ttft_s)
        row["answer_change"] = change(m.answer_s, reference and reference.answer_s)
        for name in ("click_accuracy", "step_success_rate", "mean_distance"):
            for end in ("", "_low", "_high"):
                row[f"{name}_difference{end}"] = m.paired.get(name + end)
        rows.append(row)
    return rows


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """Conclusions in sentences; "measurably" means that the 95 % interval excludes zero."""
    reference = reference_of(measurements)
    others = [m for m in measurements if m is not reference]
    if reference is None or not others:
        return []
    sentences = [RANDOM_WEIGHTS] if is_cost_only(measurements) else []
    sentences += [
        text
        for text in (
            _about_bytes(reference, others),
            _about_losses(reference, others),
            _about_time(reference, others),
            _about_claims(reference, others),
        )
        if text
    ]
    if reference.step_success_rate is not None and reference.step_success_rate < 0.5:
        rate = format_rate(reference.step_success_rate)
        sentences.append(f"{reference.plan} itself gets {rate} of the steps right: losses say little here.")
    if reference.plan != "fp32":
        sentences.append(f"FP32 was not measured here: all comparisons are with {reference.plan}.")
    return sentences


def is_cost_only(measurements: Sequence[Measurement]) -> bool:
    """Whether only cost was measured, with random weights."""
    return any(m.weights is not None for m in measurements)


def _about_bytes(reference: Measurement, others: Sequence[Measurement]) -> str | None:
    sized = [m for m in others if m.weights_bytes]
    if not sized or not reference.weights_bytes:
        return None
    smallest = min(sized, key=lambda m: m.weights_bytes)
    return (
        f"{smallest.plan} is the smallest: {format_bytes(smallest.weights_bytes)} of weights instead of "
        f"{format_bytes(reference.weights_bytes)} ({format_change(change_of(smallest, reference))})."
    )


def change_of(measurement: Measurement, reference: Measurement) -> float | None:
    """Change in the bytes of the weights."""
    return change(measurement.weights_bytes, reference.weights_bytes)


def _about_losses(reference: Measurement, others: Sequence[Measurement]) -> str | None:
    worse, same, better = [], [], []
    for m in others:
        low, high = m.paired.get("step_success_rate_low"), m.paired.get("step_success_rate_high")
        if low is None or high is None:
            continue
        if low <= 0 <= high:
            same.append(m.plan)
        else:
            text = f"{m.plan} ({format_points(m.paired['step_success_rate'])})"
            (worse if high < 0 else better).append(text)
    parts = []
    if worse:
        parts.append(f"Measurably fewer right steps than {reference.plan} on the same items: {_join(worse)}.")
    if better:
        parts.append(f"Measurably more right steps than {reference.plan}: {_join(better)}.")
    if same:
        parts.append(
            f"No difference to {reference.plan} that {reference.items} items could show: {_join(same)}."
        )
    return " ".join(parts) or None


def _about_time(reference: Measurement, others: Sequence[Measurement]) -> str | None:
    changes = [(change(m.answer_s, reference.answer_s), m) for m in others]
    timed = sorted((value, m.plan) for value, m in changes if value is not None)
    if not timed:
        return None
    faster = [f"{plan} ({format_change(value)})" for value, plan in timed if value <= -0.02]
    slower = [f"{plan} ({format_change(value)})" for value, plan in timed if value >= 0.02]
    text = f"A whole answer takes {format_seconds(reference.answer_s)} with {reference.plan}. "
    text += f"Faster: {_join(faster)}. " if faster else "No plan is faster. "
    return text + (f"Slower: {_join(slower)}." if slower else "None is slower.")


def _about_claims(reference: Measurement, others: Sequence[Measurement]) -> str | None:
    if reference.plan != "fp32" or is_cost_only([reference]):
        return None
    met = {
        "at least 62 % fewer bytes": [
            m.plan for m in others if _at_most(change_of(m, reference), CLAIMS["bytes"].value)
        ],
        "at least 40 % less latency": [
            m.plan
            for m in others
            if _at_most(change(m.answer_s, reference.answer_s), CLAIMS["latency"].value)
        ],
        "less than 3 points lost (estimate)": [m.plan for m in others if _loss_within_claim(m)],
    }
    text = "; ".join(f"{claim}: {_join(plans) if plans else 'no plan'}" for claim, plans in met.items())
    all_three = [m.plan for m in others if all(m.plan in plans for plans in met.values())]
    text += f"; all three: {_join(all_three) if all_three else 'no plan'}"
    return f"The article's claims, and which plans reach them here: {text}."


def _loss_within_claim(m: Measurement) -> bool:
    difference = m.paired.get("step_success_rate")
    return difference is not None and difference > CLAIMS["loss"].value


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def cost_table(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, as text, of each plan's cost; the last row is the article's claim.

    Rows with random weights are labelled.
    """
    reference = reference_of(measurements)
    against = f"vs {reference.plan}" if reference else "change"
    kinds = {m.peak_memory_kind for m in measurements}
    peak = "Peak GPU" if kinds == {"GPU peak allocated"} else "Peak RSS"
    if any("ru_maxrss" in (kind or "") for kind in kinds):
        peak = "Peak RSS at most"  # see `labkit.common.machine.peak_rss`
    headers = ["Plan", "Weights", against, peak, "Load", "First token", "Decoding", "Answer", against]
    rows = []
    for m in measurements:
        itself = m is reference
        cut = change(m.weights_bytes, reference and reference.weights_bytes)
        rows.append(
            [
                m.label,
                format_bytes(m.weights_bytes),
                "" if itself else format_change(cut),
                format_bytes(m.peak_memory_bytes),
                format_seconds(m.load_s),
                format_seconds(m.ttft_s),
                format_rate_per_s(m.decode_tokens_per_s),
                format_seconds(m.answer_s),
                "" if itself else format_change(change(m.answer_s, reference and reference.answer_s)),
            ]
        )
    bytes_claim, latency_claim = CLAIMS["bytes"], CLAIMS["latency"]
    claimed = ["", format_change(bytes_claim.value), "", "", "", "", "", format_change(latency_claim.value)]
    return headers, [*rows, [ARTICLE_ROW, *claimed]]


def shown_tables(measurements: Sequence[Measurement]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> `cost_table` and, unless the weights are random, `quality_table`."""
    shown = {"Cost": cost_table(measurements)}
    return shown if is_cost_only(measurements) else {**shown, "Quality": quality_table(measurements)}


def quality_table(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, as text, of each plan's quality; the last row is the article's claim."""
    reference = reference_of(measurements)
    against = f"Right steps vs {reference.plan}, paired" if reference else "Difference"
    headers = ["Plan", "Click accuracy [95 %]", "Step success [95 %]", "Parsed", "Distance", against]
    rows = []
    for m in measurements:
        rate, ends = m.step_success_rate, (m.step_success_rate_low, m.step_success_rate_high)
        paired = [m.paired.get(f"step_success_rate{end}") for end in ("", "_low", "_high")]
        rows.append(
            [
                m.plan,
                format_rate(m.click_accuracy, m.click_accuracy_low, m.click_accuracy_high),
                format_rate(rate, *ends),
                format_rate(m.parse_rate),
                "–" if m.mean_distance is None else f"{m.mean_distance:.4f}",
                "" if m is reference else format_difference(*paired),
            ]
        )
    return headers, [*rows, [ARTICLE_ROW, "", "", "", "", f"loss {CLAIMS['loss'].claim}"]]
