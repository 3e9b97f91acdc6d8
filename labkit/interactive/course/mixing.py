"""Exercises of notebook 04."""

from itertools import product
from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, number
from labkit.interactive.course.parts import resolved_answer

BUDGET_MB = 24.0
CHOICES = ({4: 1.0, 8: 0.1}, {4: 0.3, 8: 0.2}, {2: 0.5, 4: 0.0})
"""Bytes -> loss, for the matrices A, B and C of exercise 04-b."""
BUDGET = 14


def _within(answer: Any) -> None:
    """Rules with vision in 8 bits and at most `BUDGET_MB` for the pocket model."""
    resolved = resolved_answer(answer)
    if resolved is None:
        raise Hint("Give the list of rules, or a plan.")
    schemes = {part.scheme for part in resolved.parts if part.is_linear and part.role == "vision"}
    if not all(scheme.startswith(("int8", "llm-int8")) for scheme in schemes):
        raise Hint(f"The vision encoder gets {', '.join(sorted(schemes))}; it should keep 8 bits.")
    size = resolved.predicted_bytes / 1e6
    if size > BUDGET_MB:
        largest = max(resolved.bytes_by_role.items(), key=lambda item: item[1])
        raise Hint(
            f"{size:.1f} MB: too many. The largest part is {largest[0]} with {largest[1] / 1e6:.1f} MB."
        )


def _knapsack(answer: Any) -> None:
    """The bytes for A, B and C with the smallest loss within `BUDGET`."""
    if not isinstance(answer, tuple | list) or len(answer) != len(CHOICES):
        raise Hint("Give the bytes of A, B and C, as (4, 4, 2).")
    chosen = tuple(int(number(size)) for size in answer)
    for name, size, options in zip("ABC", chosen, CHOICES):
        if size not in options:
            raise Hint(f"{name} takes {' or '.join(map(str, options))} bytes, not {size}.")
    if sum(chosen) > BUDGET:
        raise Hint(f"That takes {sum(chosen)} bytes; {BUDGET} are there.")
    losses = {
        sizes: sum(options[size] for options, size in zip(CHOICES, sizes))
        for sizes in product(*CHOICES)
        if sum(sizes) <= BUDGET
    }
    loss, best = losses[chosen], min(losses.values())
    if loss > best + 1e-9:
        greedy = " C gains most for each byte, but then A cannot be afforded." if chosen[2] == 4 else ""
        raise Hint(f"A loss of {loss:.1f}; {best:.1f} can be had.{greedy}")


EXERCISES = (
    Exercise(
        "04-a",
        "Write rules for the pocket model: vision in 8 bits, and at most 24 MB in all.",
        _within,
        "One part keeps its bits, the rest pays for them. Only measuring tells whether it is the right part.",
        (
            "Everything in int4 takes 21.2 MB: there is room for the vision encoder in 8 bits.",
            'Two rules: {"role": "vision", "scheme": "int8"} and {"match": "re:.*", "scheme": "int4"}.',
        ),
    ),
    Exercise(
        "04-b",
        "Which bytes for A, B and C lose least within 14 bytes?",
        _knapsack,
        "(8, 4, 2) loses 0.9. Taking the best bargain first, C, ends at 1.3: that is why a program solves it.",
        (
            "There are eight combinations; some take more than 14 bytes.",
            "What does A gain, if it gets its 8 bytes?",
        ),
    ),
)
