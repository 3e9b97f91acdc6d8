"""The column solve of `gptq.py`, a column at a time, for teaching.

The same arithmetic without blocks and without the refinement: slower, but it yields every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.quantization import affine
from labkit.quantization.gptq import Columns


@dataclass(frozen=True)
class Step:
    """One column rounded.

    Attributes:
        number: the step, from 0 on.
        column: the column of the weight that was rounded.
        error: [N] the column's rounding error.
        values: [N, K] the weight after the step: rounded columns as they are stored, the others after compensating
            for the errors so far.
    """

    number: int
    column: int
    error: Tensor
    values: Tensor


@torch.no_grad()
def watch(
    weight: Tensor,
    columns: Columns,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool = False,
) -> Iterator[Step]:
    """Solve a weight [N, K] (a few of its rows suffice: rows are independent) and yield every step.

    scale and zero_point [N, K/G] as for `gptq.solve`, whose codes are the same.
    """
    values = weight.float().clone()
    size = weight.shape[1] // scale.shape[1]
    zero = affine.stored_zero(scale, zero_point, num_bits).float()
    for number, column in enumerate(columns.order.tolist()):
        group = column // size
        step, middle = scale[:, group].float(), zero[:, group]
        codes = affine.round_to_codes(values[:, column], step, middle, num_bits, symmetric)
        rounded = affine.value_of_codes(codes, step, middle, num_bits)
        error = values[:, column] - rounded
        waiting = columns.order[number + 1 :]
        share = columns.factor[number, number + 1 :] / columns.factor[number, number]
        values[:, waiting] -= torch.outer(error, share)
        values[:, column] = rounded
        yield Step(number, column, error, values.clone())
