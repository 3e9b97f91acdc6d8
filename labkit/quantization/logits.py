"""Logits in fp32: the head's fp32 sums are not rounded to the model's dtype.

bf16 has 8 significant bits: logits between 16 and 32 are 0.125 apart, so the most likely numbers of a coordinate
tie, and the first of them is chosen. Every kernel sums in fp32 already. Weights and hidden states keep the plan's
dtypes. (vLLM and transformers round first and convert afterwards.)
"""

import torch
from torch import Tensor, nn

from labkit.quantization.dense import DenseLinear
from labkit.quantization.kernels.reference import sliced_multiply
from labkit.quantization.linear import QuantizedLinear


class LogitsLinear(nn.Linear):
    """A dense head: ``x [..., K]`` -> fp32 ``[..., N]``."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(self.weight.dtype)
        out = dense_sums(rows, self.weight)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.view(*x.shape[:-1], self.out_features)


class DenseLogitsLinear(LogitsLinear, DenseLinear):
    """The same for a head with a dtype of its own in the plan."""


def dense_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, K] times weight [N, K] of the same dtype -> fp32 [M, N]: exact products, summed in fp32."""
    if rows.dtype == torch.float32 or (torch.is_grad_enabled() and rows.requires_grad):
        return nn.functional.linear(rows.float(), weight.float())
    if rows.device.type == "cuda":
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return sliced_multiply(rows.float(), weight.shape[0], lambda part: weight[part].float())


def keep_logits_(model: nn.Module) -> None:
    """Make the head of a transformers model return fp32, in place: name, weights, ties and hooks stay.

    A head that is not a Linear is left unchanged. May be called again, and must be called again after the head is
    replaced.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, QuantizedLinear):
        head.gives_logits = True
    elif type(head) is nn.Linear:
        head.__class__ = LogitsLinear
    elif type(head) is DenseLinear:
        head.__class__ = DenseLogitsLinear


def gives_logits(head: nn.Module) -> bool:
    """Whether this module returns fp32 for every input dtype."""
    return isinstance(head, LogitsLinear) or (isinstance(head, QuantizedLinear) and head.gives_logits)
