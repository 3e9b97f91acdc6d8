"""AutoGPTQ's layout, for engines that read only this.

``qweight [K * bits / 32, N]`` int32, codes along the input; ``qzeros [K/G, N * bits / 32]`` along the output;
``scales [K/G, N]`` fp16; ``g_idx [K]``, the group of each input. The format's first version stores each zero
point minus one, so that a symmetric 4-bit one is 7; a zero point of 0 cannot be stored so. Asymmetric checkpoints
are written in the second version (``gptq_v2``), which stores zero points as they are.

One width and group size is the rule of the whole model, the commonest; others are exceptions in ``dynamic``.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from labkit.loading.export.integers import AffineLinear, Integers, Kind, kind_of
from labkit.loading.export.packing import pack_words
from labkit.loading.export.refusal import Refusal

EMBEDDINGS = False
NEAREST = {
    "nf4": "int4 with group_size 64",
    "llm-int8": "int8",
    "int8-dynamic": "int8, or --format compressed-tensors",
    "awq": "gptq, or int4",
    "hqq": "gptq, or int4",
    "*": "int4, or int8",
}
SPLIT = {
    "gate_up_proj": ("gate_proj", "up_proj")
}  # GPTQModel takes these apart; vLLM loads the parts as well
READ = ("decoder", "lm_head")  # the roles whose Linears GPTQModel looks for
SCALE_ERROR = 2**-8  # relative error of a scale in fp16, as large as bf16's rounding


def cannot_hold(name: str, role: str, module: AffineLinear) -> Refusal | None:
    """Why the format cannot store this Linear; None if it can."""
    kind = kind_of(module)
    if role not in READ:
        return Refusal("the format's readers look for the decoder's Linears and lm_head alone", "unquantized")
    if kind.dynamic:
        return Refusal("the format quantizes weights only", NEAREST["int8-dynamic"])
    step = 32 if kind.num_bits == 3 else 32 // kind.num_bits
    out_features = module.out_features // len(written_names(name))
    for what, size in (("input", module.in_features), ("output", out_features)):
        if size % step:
            return Refusal(f"{size} {what} features are no multiple of {step}", "unquantized")
    scale = module.scale.float()
    if not ((scale.to(torch.float16).float() - scale).abs() <= SCALE_ERROR * scale).all():
        return Refusal(
            "the format's scales are fp16, which cannot hold scales so small or large",
            "unquantized, or --format compressed-tensors",
        )
    return None


def written_names(name: str) -> tuple[str, ...]:
    """The Linears into which the Linear ``name`` is split, by equal shares of its output."""
    parent, dot, leaf = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in SPLIT.get(leaf, (leaf,)))


def tensors_of(integers: Integers, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """The format's tensors for one weight, by their names in the module."""
    kind = integers.kind
    zero_point = integers.zero_point if _is_second(kinds) else integers.zero_point - 1
    in_features = integers.codes.shape[1]
    groups = torch.arange(in_features, dtype=torch.int32) // (kind.group_size or in_features)
    return {
        "qweight": pack_words(integers.codes, kind.num_bits).T.contiguous(),
        "qzeros": pack_words(zero_point.T.contiguous(), kind.num_bits),
        "scales": integers.scale.T.to(torch.float16).contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def configuration(kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of ``config.json`` and ``quantize_config.json`` alike."""
    rule = Counter(kinds.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        if kind != rule:
            dynamic |= {f"+:^{re.escape(part)}$": _options(kind) for part in _all_names(name)}
    for name in ignore:
        dynamic |= {f"-:^{re.escape(part)}$": {} for part in _all_names(name)}
    return {
        "quant_method": "gptq",
        **_options(rule),
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": "lm_head" in kinds,
        "checkpoint_format": "gptq_v2" if _is_second(kinds) else "gptq",
        "modules_in_block_to_quantize": [[part for name in kinds for part in _all_names(name)]],
        "dynamic": dynamic,
    }


def files(config: dict[str, Any]) -> dict[str, Any]:
    """Further JSON files of the format, by name."""
    return {"quantize_config.json": config}


def notes(kinds: Mapping[str, Kind]) -> list[str]:
    """Notes for the readers of this export, in sentences."""
    sentences = []
    if asymmetric := [name for name, kind in kinds.items() if not kind.symmetric]:
        sentences.append(
            f"{len(asymmetric)} Linears are asymmetric, so this is gptq_v2, the format's second version: GPTQModel "
            "loads it, vLLM does not. Quantize with symmetric: true for both."
        )
    if len(set(kinds.values())) > 1:
        sentences.append(
            "Linears of several kinds stand in `dynamic` by their own names: GPTQModel reads that, "
            "transformers does not, and vLLM looks there for the names of the Linears that it joins. All three "
            "understand --format compressed-tensors."
        )
    return sentences


def _is_second(kinds: Mapping[str, Kind]) -> bool:
    """Whether the checkpoint takes the second version: a zero point of any Linear may be 0."""
    return not all(kind.symmetric for kind in kinds.values())


def _all_names(name: str) -> list[str]:
    """The Linear's own name, under which vLLM looks a joined Linear up, and those that are written."""
    return list(dict.fromkeys((name, *written_names(name))))


def _options(kind: Kind) -> dict[str, Any]:
    return {"bits": kind.num_bits, "group_size": kind.group_size or -1, "sym": kind.symmetric}
