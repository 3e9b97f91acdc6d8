"""Every scheme with some options, and Linears under them."""

import torch
from torch import nn

from labkit.quantization.statistics import InputStatistics

VARIANTS = [
    *[(name, {}) for name in ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8")],
    *[("int4", {"num_bits": bits}) for bits in (2, 3, 8)],
    ("int4", {"symmetric": True, "group_size": 32}),
    ("nf4", {"double_quant": False, "group_size": 128}),
    *[(name, {}) for name in ("gptq", "awq", "hqq")],
    ("gptq", {"num_bits": 3, "symmetric": True}),
    ("awq", {"num_bits": 3, "group_size": 32}),
    ("int8-dynamic", {"smoothing": "rms"}),
]
QUANTIZED = [variant for variant in VARIANTS if variant[0] not in ("fp32", "fp16", "bf16")]


def make(in_features=128, out_features=192, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias)


def replaced(scheme, linear, **options):
    """`Scheme.quantize_linear`, with statistics of standard normal inputs if it wants some."""
    statistics = None
    if scheme.requires_calibration:
        statistics = InputStatistics(linear.in_features, scheme.needs_full_moment)
        statistics.add(torch.randn(1000, linear.in_features, generator=torch.Generator().manual_seed(5)))
    return scheme.quantize_linear(linear, statistics=statistics, **options)


def label(variant):
    return "-".join([variant[0], *map(str, variant[1].values())])
