"""Exercises of notebook 05."""

from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number

H100_BYTES_PER_S = 3.35e12
H100_FLOP_PER_S = 989e12
"""Data sheet of the H100 SXM: memory bandwidth, and dense bf16 products without sparsity."""
RTX_4090_BYTES_PER_S = 1.008e12
"""Data sheet of the RTX 4090."""


def _floor(answer: Any) -> None:
    """Milliseconds a token that reading the nf4 weights of the 9B takes on an RTX 4090, at least."""
    from labkit.interactive.course.parts import _dissected

    weights = _dissected("autoglm-phone-9b").under("nf4").bytes
    value, right = number(answer, "ms"), weights / RTX_4090_BYTES_PER_S * 1e3
    if is_near(value, right, 0.03):
        return
    if is_near(value, right / 1e3, 0.03):
        raise Hint("Right, in seconds. In milliseconds it is a thousand times that.")
    if is_near(value, 1 / right, 0.03) or is_near(value, 1e3 / right, 0.03):
        raise Hint(
            "That is how many tokens fit into a time. Bytes over bytes a second gives the time of one."
        )
    raise Hint("Every weight is read once a token: bytes of the weights / bytes a second, times 1,000.")


def _ridge(answer: Any) -> None:
    """The batch at which a bf16 Linear on an H100 is bound by arithmetic rather than by reading."""
    value, right = number(answer), H100_FLOP_PER_S / H100_BYTES_PER_S
    if is_near(value, right, 0.03):
        return
    if is_near(value, right / 2, 0.03) or is_near(value, right * 2, 0.03):
        raise Hint("A factor of 2 is off: a weight has 2 bytes, and each row does 2 operations with it.")
    raise Hint(
        "With n rows each weight (2 bytes) does 2n operations, n a byte. "
        "At which n does that reach FLOP/s over bytes/s?"
    )


def _cache(answer: Any) -> None:
    """GB of KV cache of eight conversations of 4,000 tokens with the 9B model in bf16."""
    from labkit.interactive.course.parts import _dissected

    each = _dissected("autoglm-phone-9b").kv_cache_bytes_per_token()
    value, right = number(answer, "GB"), 8 * 4000 * each / 1e9
    if is_near(value, right):
        return
    if is_near(value, right / 8):
        raise Hint("That is one conversation. Each of the eight has a cache of its own.")
    if is_near(value, right * 1e9) or is_near(value, right * 1e3):
        raise Hint("The product is right; the unit is not: 1 GB is 1,000,000,000 bytes.")
    raise Hint("Conversations, times tokens, times bytes a token (40,960 in bf16), divided by 1e9.")


EXERCISES = (
    Exercise(
        "05-a",
        "How many ms a token does reading the 9B's nf4 weights take on an RTX 4090 (1.008 TB/s), at least?",
        _floor,
        "About 6.2 ms, 160 tokens a second at best. What a real loop takes beyond that is not the weights' fault.",
        ("big.under('nf4').bytes is what is read for each token.", "Divide by 1.008e12, times 1e3."),
    ),
    Exercise(
        "05-b",
        "From which batch on is a bf16 Linear on an H100 (989 TFLOP/s, 3.35 TB/s) bound by arithmetic?",
        _ridge,
        "About 295 rows. Decoding for one user has one row: it waits for memory, and fewer bytes help.",
        (
            "Operations a byte: each 2-byte weight is used once a row, a multiplication and an addition.",
            "With n rows that is n operations a byte; the GPU can do 989e12 / 3.35e12.",
        ),
    ),
    Exercise(
        "05-c",
        "How many GB of KV cache do eight conversations of 4,000 tokens take with the 9B in bf16?",
        _cache,
        "About 1.3 GB, a fifth of the int4 weights: with many users the cache is what fills the GPU.",
        ("big.kv_cache_bytes_per_token() is what one token takes.", "8 * 4000 * 40960 / 1e9."),
    ),
)
