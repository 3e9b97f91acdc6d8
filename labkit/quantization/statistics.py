"""Second moments of a Linear's inputs, summed batch by batch, for calibrated schemes.

A change D [N, K] of the weight causes the output error mean |D x|², the trace of D M Dᵀ with M the mean of x xᵀ
(GPTQ calls 2 M the Hessian), so the inputs x themselves are not stored. Behind quantized layers x drifts from the
unquantized model's x'; the mean of (x' - x) xᵀ is the part of that drift that a Linear can compensate.
"""

import torch
from torch import Tensor

from labkit.common.errors import SchemeError


class InputStatistics:
    """Second moments of the inputs of one Linear, summed in fp32.

    Attributes:
        in_features: K.
        rows: input rows seen so far.
        full: whether the whole matrix is summed, or only its diagonal.
        drifting: whether the drift from the unquantized model's inputs is summed too.
    """

    def __init__(
        self,
        in_features: int,
        full: bool = True,
        drifting: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.in_features, self.full, self.drifting, self.rows = in_features, full, drifting, 0
        shape = (in_features, in_features) if full else (in_features,)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        square = (in_features, in_features)
        self._drift = torch.zeros(square, dtype=torch.float32, device=device) if drifting else None

    @torch.no_grad()
    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs [..., K] in any floating dtype, and the unquantized model's inputs for the same batch if
        ``drifting``; a batch without rows adds nothing."""
        rows = inputs.detach().reshape(-1, self.in_features)
        if self.full:
            _add_product(self._sum, rows, rows)
        else:
            self._sum += rows.float().square().sum(0)
        if self.drifting:
            _add_product(self._drift, reference.detach().reshape(rows.shape) - rows, rows)
        self.rows += rows.shape[0]

    @property
    def second_moment(self) -> Tensor:
        """[K, K] fp32: the mean of x xᵀ. Raises SchemeError without rows or if the sum is not finite."""
        if not self.full:
            raise ValueError("only the diagonal was gathered")
        return self._mean()

    @property
    def mean_square(self) -> Tensor:
        """[K] fp32: the mean of x²; raises as `second_moment`."""
        return self._mean().diagonal() if self.full else self._mean()

    @property
    def drift(self) -> Tensor | None:
        """[K, K] fp32: the mean of (x' - x) xᵀ; None unless ``drifting``; raises as `second_moment`."""
        return self._mean(self._drift) if self.drifting else None

    def _mean(self, total: Tensor | None = None) -> Tensor:
        if not self.rows:
            raise SchemeError("no calibration input was seen")
        mean = (self._sum if total is None else total) / self.rows
        if not torch.isfinite(mean).all():
            raise SchemeError("the calibration inputs hold values that are not finite (inf or nan)")
        return mean


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [K, K] += leftᵀ right, for rows [M, K] in any floating dtype."""
    if left.dtype in (torch.bfloat16, torch.float16) and left.device.type == "cuda":
        total += torch.mm(left.T, right, out_dtype=torch.float32)  # exact products, summed in fp32
    else:
        total.addmm_(left.float().T, right.float())
