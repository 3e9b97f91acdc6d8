"""Experts and transposed layers as Linears, so that every scheme reaches their weights.

transformers stacks the experts of a mixture in 3-D parameters and stores GPT-2's layers transposed. `unfuse_` gives each
expert Linears of its own (``experts.3.down_proj``) and replaces a ``Conv1D`` by a Linear; answers stay the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

EXPERTS = "labkit_linears"
"""Name of `experts_forward` among transformers' implementations of experts."""
MARK = "_labkit_unfused"
OTHER_LINEARS = {
    "Conv1D": "transformers.pytorch_utils",
    "FalconLinear": "transformers.models.falcon.modeling_falcon",
}
"""Classes beside `nn.Linear` that compute the same -> where they are; ``Conv1D`` holds its weight transposed."""


class FusedExperts(Protocol):
    """What transformers' ``use_experts_implementation`` says of a class of experts."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool


class Expert(nn.Module):
    """The Linears of one expert, under the names of the stacked parameters."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


@torch.no_grad()
def unfuse_(model: nn.Module) -> list[str]:
    """Replace stacked experts and transposed layers in place; returns the names of the new Linears.

    Each Linear has memory of its own, so that it is freed when it is quantized. Works on the meta device too.
    """
    names = []
    for name, module in list(model.named_modules()):
        if is_fused(module):
            names += [f"{name}.{own}" for own in _unfuse_experts_(module)]
        for attribute, child in list(module._modules.items()):
            if (kind := _other_linear(child)) is not None:
                weight = child.weight.T if kind == "Conv1D" else child.weight
                setattr(module, attribute, _linear(weight, child.bias, child.training))
                names.append(f"{name}.{attribute}".lstrip("."))
    if names:
        setattr(model, MARK, True)
    return names


def has_fused(model: nn.Module) -> bool:
    """Whether `unfuse_` would change the model."""
    return any(is_fused(module) or _other_linear(module) for module in model.modules())


def unfused_copy(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model without weights (meta device) after `unfuse_`, and the names of the new Linears; ``model`` itself
    stays as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): _without_values(tensor) for tensor in tensors}
    bare = copy.deepcopy(model, memo)
    return bare, unfuse_(bare)


def _without_values(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


def is_unfused(model: nn.Module) -> bool:
    """Whether `unfuse_` changed the model's tensors."""
    return getattr(model, MARK, False)


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds stacked experts that `unfuse_` can separate."""
    return hasattr(module, "is_transposed") and isinstance(module._parameters.get("down_proj"), nn.Parameter)


def is_mixture(model: nn.Module) -> bool:
    """Whether the model has experts, which get some of a pass's tokens each."""
    return any(hasattr(module, "has_post_expert_norm") for module in model.modules())


def expert_names(model: nn.Module) -> list[str]:
    """The names of the experts that have Linears of their own."""
    return [name for name, module in model.named_modules() if isinstance(module, Expert)]


@contextmanager
def every_expert_runs(model: nn.Module) -> Iterator[None]:
    """Within it each expert computes all tokens, and the router's choice is used as always.

    Calibration then has inputs for every expert, as in llm-compressor (``moe_calibrate_all_experts``).
    """
    experts = [module for module in model.modules() if isinstance(module._modules.get("0"), Expert)]
    for module in experts:
        module.computes_all = True
    try:
        yield
    finally:
        for module in experts:
            module.computes_all = False


def _other_linear(module: nn.Module) -> str | None:
    """The name of a class that computes what a Linear does; by its name, so that nothing imports transformers."""
    name, origin = type(module).__name__, type(module).__module__
    return name if origin == OTHER_LINEARS.get(name) else None


def _unfuse_experts_(module: nn.Module) -> list[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
    stacked = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    names = []
    for number in range(len(module.down_proj)):
        linears = {}
        for own in stacked:
            weight, bias = getattr(module, own)[number], getattr(module, f"{own}_bias", None)
            weight = weight.T if module.is_transposed else weight
            linears[own] = _linear(weight, None if bias is None else bias[number], module.training)
            names.append(f"{number}.{own}")
        module.add_module(str(number), Expert(linears))
    for own in stacked:
        delattr(module, own)
        if module.has_bias:
            delattr(module, f"{own}_bias")
    module.computes_all = False
    module.config._experts_implementation_internal = EXPERTS
    return names


def _linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """A Linear with copies of weight [N, K] and bias [N]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(
        weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False
    )
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear.train(training)


def experts_forward(
    module: FusedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' eager experts, with Linears: hidden_states [T, K], indices and weights [T, top_k] -> [T, K]."""
    if is_fused(module):  # another model with the same configuration object
        return type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
    total = torch.zeros_like(hidden_states)
    chosen = range(module.num_experts) if module.computes_all else top_k_index.unique().tolist()
    for number in chosen:
        if number >= module.num_experts:
            continue  # an index beyond the last expert masks the token
        slots, tokens = torch.where((top_k_index == number).T)
        rows = hidden_states if module.computes_all else hidden_states[tokens]
        output = _expert(module, module._modules[str(number)], rows)
        output = output[tokens] if module.computes_all else output
        output = output * top_k_weights[tokens, slots, None]
        total.index_add_(0, tokens, output.to(total.dtype))
    return total


def _expert(module: FusedExperts, expert: Expert, rows: Tensor) -> Tensor:
    activated = module._apply_gate if module.has_gate else module.act_fn
    inner = activated(expert.gate_up_proj(rows) if module.has_gate else expert.up_proj(rows))
    output = expert.down_proj(inner)
    return module.post_expert_norm(output) if module.has_post_expert_norm else output
