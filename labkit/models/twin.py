"""A model's small twin: the same class and kind of configuration at a small size, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

WINDOW = 8
"""Tokens of a twin's windows; of its context before rotary frequencies change, twice as many."""
VOCABULARY = 272
LARGEST = 30_000_000
"""Parameters of the largest twin that is built."""
STD = 0.15  # of weights: answers depend on the whole prompt and do not repeat one token

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "original_max_position_embeddings": 2 * WINDOW,
    "max_position_embeddings": 16 * WINDOW,
    "n_positions": 16 * WINDOW,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "hidden_size_per_layer_input": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
_WIDTH = 64
_LEFT_OUT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


def twin_of(model_class: type, config: PreTrainedConfig) -> nn.Module | None:
    """A small random model of this class in fp32; None if none can be built.

    A family whose sizes depend on each other in other ways is taken as it is, if it is small itself.
    """
    for smaller in (shrunk, copy.deepcopy):
        try:
            small = smaller(config)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(small).parameters())
            if size > LARGEST:
                continue
            twin = model_class(small).float().eval()
        except Exception:  # whatever the family's own code raises for sizes that do not fit together
            continue
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, STD)
        return twin
    return None


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration at a small size: few layers, but each kind of layer, few heads, short windows.

    The width of a head stays, so that rotary frequencies are of the same kind.
    """
    return type(config)(**_shrunk(config.to_dict()))


def _shrunk(facts: Mapping[str, Any]) -> dict[str, Any]:
    small = {key: copy.deepcopy(value) for key, value in facts.items() if key not in _LEFT_OUT}
    layers = _first(small, _LAYERS)
    kept = _kept_layers(small, layers) if layers else []
    for key, value in small.items():
        if key == "per_layer_config" and isinstance(value, Mapping):
            small[key] = {kept.index(int(index)): own for index, own in value.items() if int(index) in kept}
        elif isinstance(value, Mapping):
            small[key] = _shrunk(value)
        elif isinstance(value, list) and layers and layers > 1 and len(value) == layers:
            small[key] = [value[index] for index in kept]
        elif type(value) is int:
            small[key] = len(kept) if key in _LAYERS else _smaller(key, value)
    if heads := _first(small, _HEADS):
        _shrink_heads(small, heads, small.get("num_key_value_heads") or heads)
    return small


def _smaller(key: str, value: int) -> int:
    if key in _MOST:
        return min(value, _MOST[key])
    if key in _EXPERTS:
        return min(value, 4)
    if "intermediate" in key or "ffn" in key or key in ("n_inner", "mlp_dim"):
        return min(value, _WIDTH)
    if key.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
        return VOCABULARY - 1 - value % 16
    return value


def _kept_layers(facts: Mapping[str, Any], layers: int) -> list[int]:
    """The first layer of each kind, by the lists that have an entry for each layer; two layers at least."""
    lists = [value for value in facts.values() if isinstance(value, list) and len(value) == layers]
    first: dict[str, int] = {}
    for index in range(layers):
        first.setdefault(repr([value[index] for value in lists]), index)
    return sorted({*sorted(first.values())[:4], *range(min(2, layers))})


def _shrink_heads(facts: dict[str, Any], heads: int, groups: int) -> None:
    ratio = min(max(1, heads // groups), 2)
    few_groups = min(groups, 2)
    few = few_groups * ratio
    has_width = facts.get("head_dim") is not None or facts.get("qk_rope_head_dim") is not None
    width = _first(facts, _WIDTHS)
    for key in _HEADS:
        if isinstance(facts.get(key), int):
            facts[key] = few
    if facts.get("num_key_value_heads") is not None:
        facts["num_key_value_heads"] = few_groups
    for key in _WIDTHS if width else ():
        if isinstance(facts.get(key), int):
            facts[key] = _WIDTH if has_width else few * (width // heads)


def _first(facts: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    return next((facts[key] for key in keys if type(facts.get(key)) is int), None)
