"""Quality of one engine on PhoneTap items: does the tap land?

Answers are generated in batches (quality does not depend on time; latency is measured elsewhere, one request
at a time). Every answer becomes one plain record; rates and intervals are worked out from the records alone.
The engine is any object with ``generate(messages, …)`` and, better, ``generate_batch(list of messages, …)``.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from labkit import phonetap
from labkit.common.actions import format_action
from labkit.common.intervals import mean_interval, paired_difference, wilson_interval

GROUPS = ("split", "lang", "target_kind", "speaker")
RATES = {"click_accuracy": "click", "step_success_rate": "success", "parse_rate": "parsed"}
MEANS = {"mean_distance": "distance", "bias_x": "dx", "bias_y": "dy"}

MAX_NEW_TOKENS = {False: 128, True: 320}
"""Enough for every PhoneTap answer without and with thinking; an answer cut off here does not parse."""


def evaluate(
    engine: Any,
    items: Sequence[Any],
    *,
    batch_size: int = 8,
    enable_thinking: bool = False,
    max_new_tokens: int | None = None,
    done: Iterable[Mapping[str, Any]] = (),
    on_record: Callable[[dict[str, Any]], None] | None = None,
    score: Callable[[Any, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Let `engine` answer every item once, greedily, and score the answers; one record an item, in order.

    A record holds ``id, split, lang, task, target_kind, speaker, instruction, expected, answer,
    completion_tokens, finish_reason, latency_s`` (its batch's time divided by the batch's size) and the
    fields of `labkit.phonetap.Score`: ``parsed, click, success, distance, dx, dy``.

    Items whose id is in a record of `done` are not asked again: pass what an interrupted run kept.
    `on_record` sees every new record as soon as it exists. `score` is PhoneTap's unless given.
    Raises ValueError for a batch size below one and for items that share an id.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if len({item.id for item in items}) != len(items):
        raise ValueError("items must have different ids")
    score = score or phonetap.score
    records = {record["id"]: dict(record) for record in done}
    missing = [item for item in items if item.id not in records]
    options = {
        "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS[enable_thinking],
        "temperature": 0.0,
        "enable_thinking": enable_thinking,
    }
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        began = time.perf_counter()
        generations = _generate(engine, [item.messages() for item in batch], options)
        latency_s = (time.perf_counter() - began) / len(batch)
        for item, generation in zip(batch, generations, strict=True):
            records[item.id] = _record(item, generation, latency_s, score(item, generation.text))
            if on_record:
                on_record(records[item.id])
    return [records[item.id] for item in items]


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % Wilson intervals, mean distance and signed bias with 95 % normal intervals.

    Click accuracy is over the items whose right action has a point, and an answer without one misses.
    Distance and bias are over the answers that have a point. Keys are those of `labkit.Measurement`.
    """
    summary: dict[str, Any] = {
        "items": len(records),
        "clicks": sum(record["click"] is not None for record in records),
    }
    for name, key in RATES.items():
        values = [bool(record[key]) for record in records if record[key] is not None]
        low, high = wilson_interval(sum(values), len(values))
        known = bool(values)
        summary[name] = sum(values) / len(values) if known else None
        summary[f"{name}_low"], summary[f"{name}_high"] = (low, high) if known else (None, None)
    for name, key in MEANS.items():
        values = [record[key] for record in records if record[key] is not None]
        summary[name], summary[f"{name}_low"], summary[f"{name}_high"] = mean_interval(values)
    return summary


def summarize_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same for each group: ``{"split=typed": {…}, "lang=zh": {…}, "target_kind=icon": {…}, …}``."""
    groups: dict[str, list] = {}
    for key in GROUPS:
        for value in sorted({str(record[key]) for record in records if record[key] is not None}):
            groups[f"{key}={value}"] = [record for record in records if str(record[key]) == value]
    return {name: summarize(members) for name, members in groups.items()}


def summarize_paired(
    records: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Differences to another measurement of the same items, overall and in ``splits`` per split.

    ``{"items": n, "click_accuracy": difference, "click_accuracy_low": …, …, "splits": {"typed": {…}}}``;
    negative rates mean lower than the reference. Only items that both measured count.
    """
    other = {record["id"]: record for record in reference}
    pairs = [(record, other[record["id"]]) for record in records if record["id"] in other]
    splits = sorted({record["split"] for record, _ in pairs})
    return {
        **_difference(pairs),
        "splits": {split: _difference([p for p in pairs if p[0]["split"] == split]) for split in splits},
    }


def _difference(pairs: Sequence[tuple[Mapping, Mapping]]) -> dict[str, Any]:
    result: dict[str, Any] = {"items": len(pairs)}
    for name, key in (RATES | {"mean_distance": "distance"}).items():
        both = [(a[key], b[key]) for a, b in pairs if a[key] is not None and b[key] is not None]
        values = paired_difference([a for a, _ in both], [b for _, b in both])
        result[name], result[f"{name}_low"], result[f"{name}_high"] = values
    return result


def _generate(engine: Any, conversations: list, options: Mapping[str, Any]) -> list:
    if len(conversations) > 1 and hasattr(engine, "generate_batch"):
        return engine.generate_batch(conversations, **options)
    return [engine.generate(messages, **options) for messages in conversations]


def _record(item: Any, generation: Any, latency_s: float, result: Any) -> dict[str, Any]:
    return {
        "id": item.id,
        "split": item.split,
        "lang": item.lang,
        "task": getattr(item, "task", None),
        "target_kind": item.target_kind,
        "speaker": getattr(item, "group", None),
        "instruction": item.instruction,
        "expected": format_action(item.action),
        "answer": generation.text,
        "completion_tokens": generation.completion_tokens,
        "finish_reason": generation.finish_reason,
        "latency_s": latency_s,
        "parsed": bool(result.parsed),
        "click": None if result.click is None else bool(result.click),
        "success": bool(result.success),
        "distance": _number(result.distance),
        "dx": _number(result.dx),
        "dy": _number(result.dy),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
