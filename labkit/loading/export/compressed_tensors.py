"""The format ``compressed-tensors``, which transformers and vLLM load.

Linears of one kind form a group of the configuration, named one by one; all other Linears are in ``ignore``.
Weight-only groups are ``pack-quantized``: codes of the signed range, shifted to unsigned, several to an
int32 along the input (``weight_packed [N, K * bits / 32]``), ``weight_scale [N, K/G]`` and, if asymmetric,
``weight_zero_point`` packed along the output. W8A8 is ``int-quantized``: ``weight [N, K]`` int8,
``weight_scale [N, 1]``, inputs quantized token by token.

Integers are unchanged. The format stores an asymmetric zero point as an integer, whereas the lab multiplies by its
product with the scale, rounded to bf16: logits differ by that rounding.
"""

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
    "llm-int8": "int8-dynamic, or int8",
    "awq": "gptq, or int4",
    "hqq": "gptq, or int4",
    "int8-dynamic": "int8-dynamic without smoothing, or int8",
    "*": "int4 with num_bits 4, or int8",
}
BITS = (2, 4, 8)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# vLLM fuses some neighbours of Glm4v's vision encoder and looks them up under other names; these are targets too, and
# match nothing in other readers.
VLLM_NAMES = {"attn.qkv": "attn.qkv_proj", "gate_proj": "gate_up_proj"}


def cannot_hold(name: str, role: str, module: AffineLinear) -> Refusal | None:
    """Why the format cannot store this Linear; None if it can."""
    num_bits = kind_of(module).num_bits
    if num_bits not in BITS:
        return Refusal(f"the format's versions pack {num_bits} bits differently", "int4 with num_bits 4")
    return None


def written_names(name: str) -> tuple[str, ...]:
    """The Linear itself: transformers' modules are fused as the model's are, and vLLM loads either form."""
    return (name,)


def tensors_of(integers: Integers, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """The format's tensors for one weight, by their names in the module."""
    kind = integers.kind
    if kind.dynamic:
        weight = (integers.codes.to(torch.int16) - 128).to(torch.int8)
        return {"weight": weight, "weight_scale": integers.scale}
    tensors = {
        "weight_packed": pack_words(integers.codes, kind.num_bits),
        "weight_scale": integers.scale,
        "weight_shape": torch.tensor(integers.codes.shape, dtype=torch.int64),
    }
    if not kind.symmetric:
        packed = pack_words(integers.zero_point.T, kind.num_bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    return tensors


def configuration(kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``: one group per kind, in order of first use."""
    groups: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    formats = {_format(kind) for kind in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": _group(kind, names) for number, (kind, names) in enumerate(groups.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def files(config: dict[str, Any]) -> dict[str, Any]:
    """Further JSON files of the format, by name: none."""
    return {}


def notes(kinds: Mapping[str, Kind]) -> list[str]:
    """Notes for the readers of this export, in sentences."""
    sentences = []
    if asymmetric := [name for name, kind in kinds.items() if not kind.symmetric]:
        one_format = len({_format(kind) for kind in kinds.values()}) == 1
        how = "does only with CompressedTensorsConfig(dequantize=True)" if one_format else "does not"
        sentences.append(
            f"{len(asymmetric)} Linears are asymmetric: vLLM loads them; transformers 5.23 {how}. "
            "Quantize with symmetric: true for both."
        )
    if few := sorted({kind.num_bits for kind in kinds.values() if kind.num_bits < 4}):
        sentences.append(f"Few engines have kernels for {few[0]} bits; transformers dequantizes them.")
    sentences += [
        f"vLLM joins {' and '.join(names)}, and wants one scheme for all; transformers loads them as they are."
        for names in mixed_siblings(kinds)
    ]
    return sentences


def mixed_siblings(kinds: Mapping[str, Kind]) -> list[list[str]]:
    """Linears that engines fuse although their kinds differ (or only some are quantized)."""
    mixed = []
    for name in kinds:
        parent, _, leaf = name.rpartition(".")
        for family in FUSED:
            siblings = [f"{parent}.{sibling}" for sibling in family]
            if leaf in family and len(set(map(kinds.get, siblings))) > 1 and siblings not in mixed:
                mixed.append(siblings)
    return mixed


def _format(kind: Kind) -> str:
    return "int-quantized" if kind.dynamic else "pack-quantized"


def _group(kind: Kind, names: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": kind.num_bits,
        "type": "int",
        "symmetric": kind.symmetric,
        "strategy": "channel" if kind.group_size is None else "group",
        "group_size": kind.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    joined = [
        name.removesuffix(ours) + theirs
        for name in names
        for ours, theirs in VLLM_NAMES.items()
        if name.endswith(f".{ours}") and ".visual." in name
    ]
    return {
        "targets": names + joined,
        "weights": weights,
        "input_activations": inputs if kind.dynamic else None,
        "output_activations": None,
        "format": _format(kind),
    }
