"""The fastest tile sizes of a product on this device: measured once, stored in a file.

The file lies in ``~/.cache/labkit/`` (or ``$LABKIT_CACHE``), one for each GPU model and version of Triton.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from labkit.common.files import atomic_path
from labkit.quantization.kernels import cuda_products as cuda
from labkit.quantization.kernels.cuda_products import Packed, Tiles

DEQUANTIZE = "dequantize"
COPIES_BYTES = 192 * 2**20
"""Least total size of the copies of a timed weight: larger than any GPU's L2 cache, so that none stays in it."""
SPLITS = (1, 2, 4, 8, 16)
LAUNCHES = 24  # products in the timed graph


def cache_folder() -> Path:
    """The folder of the measured tile sizes."""
    override = os.environ.get("LABKIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(override) if override else Path(base) / "labkit"


def tiles_for(packed: Packed, rows: int, gated: bool = False) -> Tiles | None:
    """Tile sizes for ``rows`` rows: the measured ones, or `default_tiles`. None: dequantize and use cuBLAS."""
    if rows > cuda.MOST_ROWS or not cuda.takes(packed):
        return None
    choice = _known(packed.weight.device).get(_key(packed, cuda.row_tile(rows), gated))
    if choice == DEQUANTIZE and not gated:
        return None
    return Tiles(**choice) if isinstance(choice, dict) else default_tiles(packed, gated)


def default_tiles(packed: Packed, gated: bool = False) -> Tiles:
    """Tile sizes that suit any GPU: about four programs for each multiprocessor."""
    channels = packed.out_features // (2 if gated else 1)
    bn = 64 if channels >= 64 else 32
    programs = 4 * _processors(packed.weight.device)
    splits = 1
    while not gated and splits < 8 and -(-channels // bn) * splits * 2 <= programs:
        splits *= 2
    return Tiles(bn, packed.steps[0], splits, stages=3)


def candidates(packed: Packed, rows: int, gated: bool = False) -> list[Tiles]:
    """The tile sizes worth timing for this weight."""
    processors = _processors(packed.weight.device)
    choices = []
    for bn, warps in ((32, 4), (64, 4), (128, 4), (128, 8)):
        blocks = -(-packed.out_features // bn)
        if bn > max(packed.out_features, 32):
            continue
        counts = [splits for splits in SPLITS if processors <= blocks * splits <= 12 * processors]
        counts = counts or [1 if blocks > processors else SPLITS[-1]]
        if gated:  # one split computes gate and up in one program; several splits need a second kernel
            counts = ([1] if bn <= 64 else []) + [splits for splits in counts if splits > 1]
        for splits in counts:
            choices += [Tiles(bn, packed.steps[0], splits, warps, stages) for stages in (3, 5)]
    return [tiles for tiles in choices if _shared_bytes(packed, tiles, rows, gated) <= 160 * 1024]


def measure(packed: Packed, rows: int, gated: bool = False) -> dict[str, float]:
    """Seconds of one product for each method that runs: the candidates as JSON, and `DEQUANTIZE`.

    `DEQUANTIZE` means dequantizing the weight and multiplying through cuBLAS. Each method is timed in a CUDA graph
    over copies of the weight that together do not fit into the cache.
    """
    from triton.errors import TritonError

    device = packed.weight.device
    generator = torch.Generator(device).manual_seed(0)  # not the caller's
    x = torch.randn(rows, packed.in_features, dtype=torch.bfloat16, device=device, generator=generator)
    copies = [packed]
    while sum(copy.nbytes for copy in copies) < COPIES_BYTES and len(copies) < LAUNCHES:
        scales = None if packed.scales is None else packed.scales.clone()
        copies.append(Packed(packed.weight.clone(), scales, packed.group_size))
    times = {}
    for tiles in candidates(packed, rows, gated):

        def call(weight: Packed, tiles: Tiles = tiles) -> Tensor:
            return cuda.product(x, weight, tiles, gated=gated, partial=tiles.splits > 1 and not gated)

        # a candidate may need more registers or shared memory than this GPU has
        with suppress(RuntimeError, ValueError, TritonError):
            times[json.dumps(asdict(tiles))] = _time(call, copies)
    if rows > cuda.ROW_TILES[0] and not gated:
        times[DEQUANTIZE] = _time(lambda weight: _by_dequantizing(x, weight), copies)
    return times


def tune(weights: Iterable[tuple[Packed, bool]], row_tiles: Iterable[int] = cuda.ROW_TILES[:1]) -> int:
    """Measure and store the weights (with whether they are gated) that have no entry; returns how many."""
    count = 0
    for packed, gated in weights:
        for rows in row_tiles:
            device = packed.weight.device
            key = _key(packed, rows, gated)
            if not cuda.takes(packed) or key in _known(device) or device.type != "cuda":
                continue
            times = measure(packed, rows, gated)
            if not times:
                continue
            best = min(times, key=times.get)
            keep(device, key, best if best == DEQUANTIZE else json.loads(best))
            count += 1
    return count


def keep(device: torch.device, key: str, found: dict | str) -> None:
    """Store a measured choice in memory and in the file."""
    choices = _known(device)
    choices[key] = found
    with atomic_path(_path(device)) as temporary:
        temporary.write_text(json.dumps(choices, indent=1), encoding="utf-8")


def _by_dequantizing(rows: Tensor, packed: Packed) -> Tensor:
    weight = packed.weight if packed.scales is None else cuda.dequantize(packed, rows.dtype)
    return rows @ weight.T


def _time(call: Callable[[Packed], Tensor], copies: list[Packed]) -> float:
    """Seconds of one call, from the fastest of a few replays of a graph."""
    call(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            call(copies[index % len(copies)])
    times = []
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return min(times[1:])


def _key(packed: Packed, rows: int, gated: bool) -> str:
    shape = f"{packed.out_features}x{packed.in_features}"
    return f"{packed.format} {shape} rows {rows}{' gated' if gated else ''}"


@cache
def _known(device: torch.device) -> dict[str, dict | str]:
    try:
        return json.loads(_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _path(device: torch.device) -> Path:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return cache_folder() / f"tiles-{name.replace(' ', '-')}-triton-{triton.__version__}.json"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _shared_bytes(packed: Packed, tiles: Tiles, rows: int, gated: bool) -> int:
    """Shared memory of a program's prefetched tiles: the weight's, and those of x for each product that reads it."""
    weight = tiles.bn * tiles.bk * (2 if packed.format == "bf16" else 1) * (2 if gated else 1)
    reads = 4 if packed.group_size else 2
    return (weight + reads * tiles.bk * cuda.row_tile(rows) * 2) * (tiles.stages - 1)
