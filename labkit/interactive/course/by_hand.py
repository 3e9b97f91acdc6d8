"""Exercises of notebook 02. Learners' functions are run on rows they have not seen."""

from collections.abc import Callable
from functools import cache
from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number

ROW = (0.31, -0.74, 0.08, 0.52, -0.29, 0.66, -0.11, 0.40)
"""The eight weights of exercise 02-a."""
TARGET_DB = 20.0
"""Signal-to-noise ratio that exercise 02-d asks of the lm_head."""


def _scale(answer: Any) -> None:
    """The scale of `ROW` in symmetric int4."""
    largest, value = max(abs(weight) for weight in ROW), number(answer)
    if is_near(value, largest / 7, 0.001):
        return
    if is_near(value, largest / 8, 0.001):
        raise Hint("Eight codes lie below zero, but the symmetric range goes from -7 to 7: -8 is not used.")
    if is_near(value, (max(ROW) - min(ROW)) / 15, 0.001):
        raise Hint(
            "That is the asymmetric scale: the range cut into 15 steps. Symmetric looks at max|w| only."
        )
    if is_near(value, max(ROW) / 7, 0.001):
        raise Hint("The largest weight is not the one that is farthest from zero: take magnitudes, abs(w).")
    if is_near(value, largest / 15, 0.001) or is_near(value, largest / 16, 0.001):
        raise Hint("The sixteen codes are shared by both signs: how many steps lie on one side of zero?")
    raise Hint("The weight with the largest magnitude must get the code 7: scale = max|w| / 7.")


def _rounding(answer: Any) -> None:
    """A function (row, num_bits) -> the row after symmetric rounding, as real numbers again."""
    import torch

    from labkit.quantization import affine

    if not isinstance(answer, Callable):
        raise Hint("Give the function itself, without calling it: course.check('02-b', round_trip).")
    generator = torch.Generator().manual_seed(2)
    for num_bits in (4, 8, 3):
        row = torch.randn(64, generator=generator) * 0.05
        scale, zero_point = affine.choose_qparams(row[None], num_bits, symmetric=True)
        codes = affine.quantize(row[None], scale, zero_point, num_bits, symmetric=True)
        right = affine.dequantize(codes, scale, zero_point)[0]
        _compare(_called(answer, row.clone(), num_bits), right, row, scale.item(), num_bits)


def _called(function: Callable, row: Any, num_bits: int) -> Any:
    import torch

    try:
        result = function(row, num_bits)
    except Exception as error:  # a learner's code may raise anything; the hint names the type
        raise Hint(
            f"round_trip(row, {num_bits}) raises {type(error).__name__}: {error}. "
            "It is given a tensor of 64 weights and a number of bits."
        ) from None
    if result is None:
        raise Hint("The function returns nothing: does it end with return?")
    if not isinstance(result, torch.Tensor) or result.shape != row.shape:
        kind = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise Hint(f"A tensor of 64 weights should come back; this is {kind}.")
    return result


def _compare(result: Any, right: Any, row: Any, scale: float, num_bits: int) -> None:
    import torch

    def same(other: Any) -> bool:
        return torch.allclose(result.float(), other, atol=scale * 1e-3)

    if same(right):
        return
    if same(row):
        raise Hint("The weights come back unchanged: nothing was rounded. torch.round, or .round(), does it.")
    if same(right / scale):
        raise Hint("These are the codes. To be weights again they must be multiplied by the scale.")
    if same((row / scale).trunc() * scale) or same((row / scale).floor() * scale):
        raise Hint("The codes are cut off, not rounded: 2.9 should become 3. Use .round(), not .int().")
    if num_bits != 4:
        raise Hint(f"With 4 bits it is right, with {num_bits} it is not: the 7 depends on num_bits.")
    off = (result.float() - right).abs().max().item() / scale
    raise Hint(
        f"Some weight is off by {off:.1f} steps. Three lines: scale = max|w| / (2 ** (num_bits - 1) - 1), "
        "codes = row / scale rounded, and codes times scale."
    )


def _bits(answer: Any) -> None:
    """Bits a weight: 4 bits, groups of 32, a 16-bit scale and a 16-bit zero point for each group."""
    value = number(answer, "bits")
    if is_near(value, 5, 0.001):
        return
    if is_near(value, 4.5, 0.001):
        raise Hint(
            "That is one 16-bit number for 32 weights. Each group stores two: a scale and a zero point."
        )
    if is_near(value, 36, 0.001) or is_near(value, 4 + 16 * 2, 0.001):
        raise Hint("The 32 bits of scale and zero point are shared by the 32 weights of a group.")
    raise Hint(
        "4 bits for the code, and a 32nd of what the group stores: 16 bits of scale, 16 of zero point."
    )


@cache
def _head() -> Any:
    """The pocket model's lm_head [N, K], fp32."""
    from labkit.loading.load import load

    return load("pocket", "fp32", device="cpu", progress=False).model.lm_head.weight.detach()


@cache
def _grid() -> dict[tuple[int, int], tuple[float, float]]:
    """(bits, group size) -> (bits a weight, SQNR in dB) of the lm_head, asymmetric."""
    from labkit.quantization import affine

    head, grid = _head(), {}
    for num_bits in (2, 3, 4, 8):
        for group_size in (32, 64, 128):
            scale, zero_point = affine.choose_qparams(head, num_bits, group_size)
            codes = affine.quantize(head, scale, zero_point, num_bits)
            after = affine.dequantize(codes, scale, zero_point)
            grid[num_bits, group_size] = (num_bits + 32 / group_size, affine.sqnr_db(head, after))
    return grid


def _cheapest(answer: Any) -> None:
    """(num_bits, group_size) with the fewest bits a weight that keeps the lm_head above `TARGET_DB`."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Hint("Give two numbers, (num_bits, group_size).")
    key = (int(number(answer[0])), int(number(answer[1])))
    grid = _grid()
    if key not in grid:
        raise Hint("num_bits is one of 2, 3, 4, 8 and group_size one of 32, 64, 128.")
    bits, decibel = grid[key]
    if decibel < TARGET_DB:
        raise Hint(
            f"{key[0]} bits in groups of {key[1]} keep {decibel:.1f} dB, and {TARGET_DB:.0f} are wanted: "
            "smaller groups, or more bits?"
        )
    best = min(bits for bits, sqnr_db in grid.values() if sqnr_db >= TARGET_DB)
    if bits > best:
        raise Hint(
            f"{decibel:.1f} dB: good enough, but it takes {bits:g} bits a weight; {best:g} would do. "
            "Before you take more bits, try smaller groups."
        )


EXERCISES = (
    Exercise(
        "02-a",
        "Which scale does symmetric int4 choose for the eight weights?",
        _scale,
        "0.74 / 7 ≈ 0.106: the weight farthest from zero gets the last code, -7.",
        (
            "Symmetric int4 uses the codes -7 … 7.",
            "Which weight is farthest from zero? It must become 7 or -7 when divided by the scale.",
        ),
    ),
    Exercise(
        "02-b",
        "Write round_trip(row, num_bits): quantize a row symmetrically, and make real numbers of it again.",
        _rounding,
        "It agrees with the lab's own rounding at 3, 4 and 8 bits, on rows that you have not seen.",
        (
            "The largest code is 2 ** (num_bits - 1) - 1.",
            "row.abs().max() / top is the scale; (row / scale).round() * scale is the answer.",
        ),
    ),
    Exercise(
        "02-c",
        "How many bits does a weight take with 4-bit codes, groups of 32, and 16-bit scales and zero points?",
        _bits,
        "4 + 32/32 = 5 bits. In groups of 64 it is 4.5: that is the half bit that int4 costs on top.",
        (
            "A group stores its scale and its zero point once, for all its weights.",
            "4 + (16 + 16) / group size.",
        ),
    ),
    Exercise(
        "02-d",
        "Which (num_bits, group_size) keeps the lm_head above 20 dB with the fewest bits?",
        _cheapest,
        "4 bits in groups of 32: 5 bits a weight, 21 dB. Larger groups fall short; 8-bit codes cost three bits more.",
        (
            "The chart of bits against decibels shows every candidate: go along the line of 20 dB.",
            "8 bits are far too many, 3 too few. Which group size takes 4 bits over the line?",
        ),
    ),
)
