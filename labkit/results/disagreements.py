"""Selects the items on which plans disagree most, and draws their screens with both taps. No torch."""

import html
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from labkit import phonetap
from labkit.common.actions import Action, format_action, parse_answer
from labkit.common.errors import LabError
from labkit.results import show
from labkit.results.charts import marks
from labkit.results.measurement import Measurement
from labkit.results.tables import reference_of

SHOWN = 10
"""Most items in a report."""
QUALITY = 80


@dataclass(frozen=True)
class Disagreement:
    """One item on which a plan and the unquantized row differ.

    Attributes:
        plan: the plan that differs most from the reference on this item.
        record, reference: both answers (records of `labkit.measure.quality`).
        distance: between the two taps, in units of the screen's side; None where an answer has no tap.
        answers: plan -> its record, for all plans.
    """

    plan: str
    reference_plan: str
    record: Mapping[str, Any]
    reference: Mapping[str, Any]
    distance: float | None
    answers: Mapping[str, Mapping[str, Any]]

    @property
    def weight(self) -> tuple[bool, bool, float]:
        """The sort key: whether only one answer is right, whether both tap, the distance."""
        return (
            self.record["success"] != self.reference["success"],
            self.distance is not None,
            self.distance or 0.0,
        )


def disagreements(measurements: Sequence[Measurement], count: int = SHOWN) -> list[Disagreement]:
    """The ``count`` items on which plans disagree most with the unquantized row, or all if they are fewer.

    First come items that only one of the two gets right, those with two taps first; then those whose taps lie
    farthest apart.
    """
    reference = reference_of(measurements)
    if reference is None:
        return []
    records = {m.plan: {record["id"]: record for record in m.samples.get("items", [])} for m in measurements}
    chosen = []
    for id, right in records[reference.plan].items():
        answers = {plan: by_id[id] for plan, by_id in records.items() if id in by_id}
        others = [
            Disagreement(plan, reference.plan, record, right, _distance(record, right), answers)
            for plan, record in answers.items()
            if plan != reference.plan and _action(record) != _action(right)
        ]
        if others:
            chosen.append(max(others, key=lambda disagreement: disagreement.weight))
    return sorted(chosen, key=lambda disagreement: disagreement.weight, reverse=True)[:count]


def section(measurements: Sequence[Measurement]) -> str:
    """The report's section on disagreements; empty if all plans answer alike."""
    shown = disagreements(measurements)
    if not shown:
        return ""
    first = measurements[0]
    drawn = _items(first.split, first.items, first.seed)
    figures = "".join(_figure(disagreement, drawn.get(disagreement.record["id"])) for disagreement in shown)
    return (
        "<h2>Where plans disagree most</h2><p>Items that the unquantized model and a plan answer differently: "
        "first those that only one of them gets right, then those whose taps lie farthest apart. The blue box "
        "is the target, the ring the unquantized model's tap, the diamond the plan's.</p>"
        f"<div class='items'>{figures}</div>"
    )


def _figure(disagreement: Disagreement, item: phonetap.Item) -> str:
    fits = item is not None and (item.instruction, format_action(item.action)) == (
        disagreement.record["instruction"],
        disagreement.record["expected"],
    )
    picture = _picture(disagreement, item) if fits else ""
    rows = "".join(
        f"<tr><th scope='row'><i style='background:{marks.plan_colour(plan)}'></i>{html.escape(plan)}</th>"
        f"<td>{'right' if record['success'] else 'wrong'}</td><td><code>{_answer(record)}</code></td></tr>"
        for plan, record in disagreement.answers.items()
    )
    instruction = html.escape(str(disagreement.record["instruction"]))
    how = f"{disagreement.record['split']}, {disagreement.record['lang']}" + (
        "" if fits else "; its screen is drawn otherwise today"
    )
    return (
        f"<figure>{picture}<figcaption><strong>{instruction}</strong><br><span>{html.escape(how)} · "
        f"right: <code>{html.escape(str(disagreement.record['expected']))}</code></span>"
        f"<table><tbody>{rows}</tbody></table></figcaption></figure>"
    )


def _picture(disagreement: Disagreement, item: phonetap.Item) -> str:
    taps = {
        disagreement.reference_plan: (
            disagreement.reference["answer"],
            marks.plan_colour(disagreement.reference_plan),
        ),
        disagreement.plan: (disagreement.record["answer"], marks.plan_colour(disagreement.plan)),
    }
    buffer = io.BytesIO()
    show.taps(item.screen, list(taps.values()), item.box).save(buffer, "WEBP", quality=QUALITY)
    words = html.escape(f"the screen with the taps of {' and '.join(taps)}", quote=True)
    return f"<img alt='{words}' src='data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}'>"


@lru_cache(maxsize=2)
def _items(split: str | None, count: int, seed: int | None) -> dict[str, phonetap.Item]:
    """Id -> item of the measurement; empty if this version cannot draw them."""
    try:
        return {item.id: item for item in phonetap.items(split or "all", count, seed)}
    except LabError:
        return {}


def _action(record: Mapping[str, Any]) -> Action | str:
    answer = parse_answer(record["answer"])
    return answer.action or answer.text


def _answer(record: Mapping[str, Any]) -> str:
    text = parse_answer(record["answer"]).text
    return html.escape(text if len(text) <= 90 else text[:87] + "…")


def _distance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    actions = [_action(record) for record in (first, second)]
    points = [action.point for action in actions if isinstance(action, Action)]
    if len(points) < 2 or None in points:
        return None
    (x0, y0), (x1, y1) = points
    return (((x0 - x1) / 1000) ** 2 + ((y0 - y1) / 1000) ** 2) ** 0.5
