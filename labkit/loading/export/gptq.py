"""AutoGPTQ's layout, for engines that read only this.

``qweight [K * bits / 32, N]`` int32, codes along the input; ``qzeros [K/G, N * bits / 32]`` along the output;
``scales [K/G, N]`` fp16; ``g_idx [K]``, the group of each input. The format's first version stores each zero
point minus one, so that a symmetric 4-bit one is 7; a zero point of 0 cannot be stored so. Asymmetric checkpoints
are written in the second version (``gptq_v2``), which stores zero points as they are.

One width and group size is the rule of the whole model, the commonest; others are exceptions in ``dynamic``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from labkit.common.errors import LabError
from labkit.loading.export.integers import Integers, Kind, Refusal
from labkit.loading.export.packing import pack_words

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
}  # the names into which vLLM splits a fused Linear for its lookup
SCALE_ERROR = 2**-8  # relative error of a scale in fp16, as large as bf16's rounding


def cannot_hold(kind: Kind, in_features: int, out_features: int) -> Refusal | None:
    """Why the format cannot store weights of this kind; None if it can."""
    if kind.dynamic:
        return Refusal("the format quantizes weights only", NEAREST["int8-dynamic"])
    step = 32 if kind.num_bits == 3 else 32 // kind.num_bits
    for what, size in (("input", in_features), ("output", out_features)):
        if size % step:
            return Refusal(f"{size} {what} features are no multiple of {step}", "unquantized")
    return None


def tensors_of(integers: Integers, second_version: bool) -> dict[str, Tensor]:
    """The format's tensors for one weight, by their names in the module.

    Raises:
        LabError: a scale that fp16 cannot hold.
    """
    kind = integers.kind
    scale = integers.scale.float()
    half = scale.to(torch.float16)
    if not ((half.float() - scale).abs() <= SCALE_ERROR * scale).all():
        raise LabError(
            f"the format's scales are fp16, and one here is {scale.min():.3g} to {scale.max():.3g}: "
            "use --format compressed-tensors"
        )
    zero_point = integers.zero_point if second_version else integers.zero_point - 1
    in_features = integers.codes.shape[1]
    groups = torch.arange(in_features, dtype=torch.int32) // (kind.group_size or in_features)
    return {
        "qweight": pack_words(integers.codes, kind.num_bits).T.contiguous(),
        "qzeros": pack_words(zero_point.T.contiguous(), kind.num_bits),
        "scales": half.T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def configuration(kinds: Mapping[str, Kind], ignore: list[str], second_version: bool) -> dict[str, Any]:
    """``quantization_config`` of ``config.json`` and ``quantize_config.json`` alike."""
    rule = Counter(kinds.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        if kind != rule:
            dynamic[f"+:^{re.escape(name)}$"] = _options(kind)
    for name in ignore:
        dynamic[f"-:^{re.escape(name)}$"] = {}
    return {
        "quant_method": "gptq",
        **_options(rule),
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": "lm_head" in kinds,
        "checkpoint_format": "gptq_v2" if second_version else "gptq",
        "modules_in_block_to_quantize": [[*kinds, *_parts_of(kinds)]],
        "dynamic": dynamic,
    }


def files(config: dict[str, Any]) -> dict[str, Any]:
    """Further JSON files of the format, by name."""
    return {"quantize_config.json": config}


def survey(kinds: Iterable[Kind]) -> dict[str, Any]:
    """Format options that depend on the whole checkpoint: version 1 if every kind is symmetric, else version 2."""
    return {"second_version": not all(kind.symmetric for kind in kinds)}


def notes(kinds: Mapping[str, Kind], second_version: bool) -> list[str]:
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


def _parts_of(names: Iterable[str]) -> list[str]:
    return [
        name.removesuffix(whole) + part
        for name in names
        for whole, parts in SPLIT.items()
        if name.endswith(f".{whole}")
        for part in parts
    ]


def _options(kind: Kind) -> dict[str, Any]:
    return {"bits": kind.num_bits, "group_size": kind.group_size or -1, "sym": kind.symmetric}
