"""Quality of one engine on PhoneTap items: one plain record an answer, from which rates and intervals follow."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from labkit import phonetap
from labkit.common.actions import format_action

MAX_NEW_TOKENS = {False: 128, True: 320}
"""Enough for every PhoneTap answer without and with thinking; an answer cut off here does not parse."""


class Generated(Protocol):
    """What is recorded of an answer."""

    text: str
    completion_tokens: int
    finish_reason: str


class Answerer(Protocol):
    """Who answers: an engine, or a client of a service; for batches also with ``generate_batch``."""

    def generate(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generated:
        """The answer to a conversation."""


def evaluate(
    engine: Answerer,
    items: Sequence[phonetap.Item],
    *,
    batch_size: int = 8,
    enable_thinking: bool = False,
    max_new_tokens: int | None = None,
    done: Iterable[Mapping[str, Any]] = (),
    on_record: Callable[[dict[str, Any]], None] | None = None,
    score: Callable[[phonetap.Item, str], phonetap.Score] | None = None,
) -> list[dict[str, Any]]:
    """Let `engine` answer every item once, greedily, and score the answers; one record an item, in order.

    A record holds ``id, split, lang, task, target_kind, speaker, instruction, expected, answer,
    completion_tokens, finish_reason, latency_s`` (its batch's time divided by the batch's size) and the
    fields of `labkit.phonetap.Score`: ``parsed, click, success, distance, dx, dy``.

    `engine` is any object with ``generate(messages, …)`` and, for batches, ``generate_batch(list of messages, …)``.
    Items with a record in `done`, as an interrupted run leaves them, are not answered again.
    `on_record` gets every new record as soon as it exists. `score` defaults to PhoneTap's.
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


def _generate(engine: Answerer, conversations: list, options: Mapping[str, Any]) -> list[Generated]:
    if len(conversations) > 1 and hasattr(engine, "generate_batch"):
        return engine.generate_batch(conversations, **options)
    return [engine.generate(messages, **options) for messages in conversations]


def _record(
    item: phonetap.Item, generation: Generated, latency_s: float, result: phonetap.Score
) -> dict[str, Any]:
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


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
