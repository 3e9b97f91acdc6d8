"""Measures this machine: bytes moved, operations and products with quantized weights a second.

The figures take seconds to measure, and show what the machine can do, not what an engine does.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from labkit.quantization import Scheme, get_scheme
from labkit.quantization.torch_state import guarded

BUFFER_BYTES = 128 * 2**20
"""Larger than a processor's caches, so that memory is measured."""


def median_s(run: Callable[[], object], device: str = "cpu", repeats: int = 7) -> float:
    """Seconds of one call: the median of ``repeats`` calls after two for warm-up; on a GPU, until its work is done."""
    spent = []
    for number in range(repeats + 2):
        _finish(device)
        began = time.perf_counter()
        run()
        _finish(device)
        if number > 1:
            spent.append(time.perf_counter() - began)
    return statistics.median(spent)


@guarded
def bandwidth(device: str = "cpu", size: int = BUFFER_BYTES) -> float:
    """Bytes a second that memory moves in a copy, which reads and writes each byte once."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_s(lambda: target.copy_(source), device)


@guarded
def flops(device: str = "cpu", side: int = 1024) -> float:
    """Operations a second of a square matrix product (2 * side³ operations), in fp32 or bf16, whichever is faster."""
    spent = []
    generator = torch.Generator(device).manual_seed(0)  # not the caller's
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(2, side, side, dtype=dtype, device=device, generator=generator)
        spent.append(median_s(lambda left=left, right=right: left @ right, device))
    return 2 * side**3 / min(spent)


@guarded
@torch.no_grad()
def products(
    schemes: Sequence[str | Scheme] | Mapping[str, Scheme],
    rows: Sequence[int] = (1, 16, 256),
    *,
    size: tuple[int, int] = (4096, 1024),
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, list[tuple[int, float]]]:
    """Scheme -> (rows, seconds) of one Linear of random weights.

    rows: of the input: 1 for decoding one conversation, hundreds for a prompt. size: output and input features.
    Raises SchemeError for a scheme that cannot take this Linear here.
    """
    if not isinstance(schemes, Mapping):
        resolved = [get_scheme(scheme) if isinstance(scheme, str) else scheme for scheme in schemes]
        schemes = {scheme.name: scheme for scheme in resolved}
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(size[1], size[0], bias=False, device="meta").to_empty(device="cpu")
    linear.weight.normal_(0, 0.03, generator=generator)
    linear.to(device=device, dtype=dtype)
    timings: dict[str, list[tuple[int, float]]] = {}
    for name, scheme in schemes.items():
        module = scheme.quantize_linear(linear, device=device, dtype=dtype)
        for count in rows:
            inputs = torch.randn(count, size[1], generator=generator).to(device=device, dtype=dtype)
            spent = median_s(lambda module=module, inputs=inputs: module(inputs), device)
            timings.setdefault(name, []).append((count, spent))
    return timings


def _finish(device: str) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)
