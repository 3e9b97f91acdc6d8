"""What to say of logits that are NaN or infinite."""

import torch

from labkit.common.errors import LabError

WIDER = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}
"""Defaults of a plan that hold larger numbers than a dtype, or more exact ones."""


def not_finite(what: str, dtype: torch.dtype) -> LabError:
    """The error for logits, called ``what``, of a model that computes in ``dtype``; it names what may help."""
    name = str(dtype).removeprefix("torch.")
    if dtype in WIDER:
        return LabError(f"{what} are not finite in {name}: try a plan with {WIDER[dtype]} as default")
    return LabError(
        f"{what} are not finite in {name}, and no wider type is left: the checkpoint holds NaN or infinite weights, "
        "or the plan's schemes break it; try it unquantized, then another copy of the checkpoint"
    )
