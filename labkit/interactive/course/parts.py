"""Exercises of notebook 01."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number


@cache
def _dissected(model: str) -> Any:
    from labkit.measure import anatomy

    return anatomy.dissect(model)


def resolved_answer(answer: Any) -> Any:
    """Resolve a plan, its mapping or its list of rules for the pocket model; None for anything else."""
    from labkit.plans.plan import QuantizationPlan

    if isinstance(answer, list | Mapping):
        answer = {"name": "mine", "rules": answer} if isinstance(answer, list) else answer
        answer = QuantizationPlan.from_dict(answer)
    if not isinstance(answer, QuantizationPlan):
        return None
    pocket = _dissected("pocket")
    return answer.resolve(pocket.skeleton, roles=pocket.roles)


def _plan(answer: Any) -> None:
    """Vision bf16, decoder int4, everything else int8."""
    resolved = resolved_answer(answer)
    if resolved is None:
        raise Hint("Give the plan, or the list of its rules.")
    for part in (part for part in resolved.parts if part.is_linear):
        right = {"vision": "bf16", "decoder": "int4"}.get(part.role, "int8")
        if part.scheme == right:
            continue
        raise Hint(f"{part.module} is a part of {part.role}: it gets {part.scheme}, not {right}.")


def _cache(answer: Any) -> None:
    """Megabytes of KV cache of ten screenshots in the 9B model, as its authors serve it."""
    big = _dissected("autoglm-phone-9b")
    tokens, each = 10 * big.image_tokens(1080, 2400, 5_000_000), big.kv_cache_bytes_per_token()
    value, right = number(answer, "MB"), tokens * each / 1e6
    if is_near(value, right):
        return
    if is_near(value, right / 10):
        raise Hint("That is one screenshot. Ten are asked for.")
    if is_near(value, tokens, 0.001):
        raise Hint("That is the number of tokens. Each of them takes kv_cache_bytes_per_token() bytes.")
    if is_near(value, right * 1e6) or is_near(value, right / 1e3):
        raise Hint("The product is right; the unit is not: 1 MB is 1,000,000 bytes.")
    if is_near(value, 10 * big.image_tokens(1080, 2400) * each / 1e6):
        raise Hint("That is without the limit of pixels: image_tokens takes it as a third number.")
    raise Hint("Ten times the tokens of a screenshot, times bytes of KV cache a token, divided by a million.")


EXERCISES = (
    Exercise(
        "01-a",
        "Write rules: vision in bf16, decoder in int4, everything else in int8.",
        _plan,
        "Every Linear gets what was asked. The first rule that matches wins, so the one for all comes last.",
        (
            "Rules are tried in order and the first that matches wins.",
            'The third rule is {"match": "re:.*", "scheme": "int8"}.',
        ),
    ),
    Exercise(
        "01-b",
        "How many MB of KV cache do ten screenshots of 1080 x 2400 take in the 9B model, at 5,000,000 pixels?",
        _cache,
        "About 1.27 GB. A phone agent keeps its last screens: they fill more cache than words ever do.",
        (
            "big.image_tokens(1080, 2400, 5_000_000) and big.kv_cache_bytes_per_token() are the two numbers.",
            "Multiply both, and ten, and divide by 1e6.",
        ),
    ),
)
