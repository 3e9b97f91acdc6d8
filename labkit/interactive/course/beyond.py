"""Exercises of notebook 08."""

from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, number

FEED_FORWARD = 13_696
"""Width of the 9B decoder's feed-forward layer."""
BUDGET_GB, FREE_GB, TOKENS = 12, 2, 25_480


def _group(answer: Any) -> None:
    """The largest usual group size that two GPUs can share evenly in the 9B's down_proj."""
    value, half = int(number(answer)), FEED_FORWARD // 2
    if value == 64:
        return
    if value not in (16, 32, 64, 128, 256):
        raise Hint("Usual group sizes are 32, 64, 128 and 256.")
    if half % value:
        raise Hint(
            f"Each GPU holds {half:,} of the {FEED_FORWARD:,} columns: {half / value:g} groups of {value}."
        )
    raise Hint(f"{value} divides evenly; there is a larger group size that does, too.")


def _fits(answer: Any) -> None:
    """The plan with most bits, of four, whose weights and full cache leave 2 of 12 GB free."""
    from labkit.interactive.course.parts import _dissected

    big = _dissected("autoglm-phone-9b")
    plans = ("bf16", "int8", "int4", "nf4")
    if answer not in plans:
        raise Hint(f"The candidates are {', '.join(plans)}: give the name of one.")
    anatomy = big.under(answer)
    needed = (anatomy.bytes + TOKENS * anatomy.kv_cache_bytes_per_token()) / 1e9
    if needed + FREE_GB > BUDGET_GB:
        raise Hint(f"{answer} needs {needed:.1f} GB with a full cache: of {BUDGET_GB} GB too little is left.")
    if answer == "nf4":
        raise Hint(
            f"nf4 fits ({needed:.1f} GB). Another plan fits as well, and takes a few more bits a weight."
        )


EXERCISES = (
    Exercise(
        "08-a",
        "Which of bf16, int8, int4, nf4 has the most bits, and with 25,480 tokens of cache leaves 2 of 12 GB free?",
        _fits,
        "int4: 7.8 GB with a full cache. int8 needs 12.0, and activations and CUDA want their part as well.",
        (
            "big.memory_chart(plans) draws weights and cache; hover at its right end.",
            "big.under(plan).bytes + 25_480 * big.kv_cache_bytes_per_token(), for each plan.",
        ),
    ),
    Exercise(
        "08-b",
        "Which is the largest group size of which two GPUs get whole groups in the 9B's down_proj (13,696 wide)?",
        _group,
        "64: 6,848 columns are 107 groups of 64, but 53.5 groups of 128.",
        ("Two GPUs: each holds half of the 13,696 columns.", "6848 / 128 is no whole number."),
    ),
)
