"""Triton's kernels for a few rows: bf16, int8 and int4 weights, read once and multiplied by tensor cores.

A product of a few rows mostly reads the weight. The tensor cores' smallest tile has eight columns, so up to eight rows
cost the same, and since tiles are always padded, a row's result does not depend on the other rows. The weight is the
left operand: ``BN`` output channels a program, ``BK`` bytes of each at a time. The reduction is divided into ``splits``
(the grid's second axis), so that a small weight fills the GPU too; each split writes its own sums in fp32
``[splits, M, N]``, which a later kernel adds in a fixed order (`reduce` of `labkit.quantization.kernels.cuda_products`).

Imports triton, which torch installs with CUDA: import this module only then.
"""

import triton
import triton.language as tl


@triton.jit
def _nibbles(packed, NATIVE: tl.constexpr):
    """Bytes -> their low and high halves as bf16, 128 + code each: the code is or-ed into the mantissa of 128."""
    if NATIVE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
            shr.u32 a, a, 4;
            shr.u32 b, b, 4;
            lop3.b32 $2, a, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $3, b, 0x000f000f, 0x43004300, 0xea;
            }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = (packed & 15).to(tl.float32) + 128
        high = (packed >> 4).to(tl.float32) + 128
    return low, high


@triton.jit
def _dot(a, b, NATIVE: tl.constexpr):
    """a [BN, BK] times b [BK, BM] in fp32; Triton's interpreter knows no products of bf16 (NATIVE is false there)."""
    if NATIVE:
        return tl.dot(a.to(tl.bfloat16), b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _scale_and_zero(pair):
    """int32 that holds two bf16, scale and zero -> both in fp32; zero is that of codes with 128 added."""
    scale = (pair << 16).to(tl.float32, bitcast=True)
    zero = ((pair >> 16) << 16).to(tl.float32, bitcast=True)
    return scale, zero - 136 * scale


@triton.jit
def _twice(at, there):
    """A tile of x for two products. Loaded once, it would be copied between them and waited for: Triton prefetches
    what feeds one product only. Two loads that differ, if only in what the cache is told, are not merged."""
    return (
        tl.load(at, mask=there, other=0.0),
        tl.load(at, mask=there, other=0.0, eviction_policy="evict_last"),
    )


@triton.jit
def _store(acc, out_ptr, bias_ptr, n, m, M, N, split, BIAS: tl.constexpr):
    """acc [BN, BM] -> out [splits, M, N]; with BIAS rounded to out's type before the bias is added."""
    inside = (n < N)[:, None] & (m < M)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32) + bias[:, None]
    tl.store(
        out_ptr + (split * M + m[None, :]) * N + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded to ``dtype`` where the modules of a model round."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return gate * up.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["M", "splits"])
def bytes_product(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, M, N, K, splits,
    SCALED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [M, K] bf16 times w [N, K] int8 or bf16, with scale [N] if SCALED -> out [splits, M, N].

    GATED: w is [2 N, K], gate over up, and the answer silu(x gate) * (x up).
    """
    split = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    tiles = K // BK
    share = (tiles + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, tiles)
    there = (m < M)[None, :]
    w_at = w_ptr + row[:, None] * K + columns[None, :]
    x_at = x_ptr + m[None, :] * K + columns[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    if GATED:
        up_at = w_ptr + (row + N)[:, None] * K + columns[None, :]
        up = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        w = tl.load(w_at + tile * BK)
        if GATED:
            x, y = _twice(x_at + tile * BK, there)
            v = tl.load(up_at + tile * BK)
            up += _dot(v, y, NATIVE)
        else:
            x = tl.load(x_at + tile * BK, mask=there, other=0.0)
        acc += _dot(w, x, NATIVE)
    if SCALED:
        acc *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale_ptr + row + N).to(tl.float32)[:, None]
    if GATED:
        acc = _gated(acc, up, out_ptr.dtype.element_ty)
    _store(acc, out_ptr, bias_ptr, n, m, M, N, split, BIAS)


@triton.jit(do_not_specialize=["M", "splits"])
def nibbles_product(
    x_ptr, w_ptr, pair_ptr, bias_ptr, out_ptr, M, N, stride, K, half, splits,
    GROUP: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [M, K] bf16 times w [N, K/2], two codes a byte (`affine.pack`), pair [K/G, N] int32 = bf16 (scale, zero),
    its lines ``stride`` apart.

    A code c stands for (c - 8) scale + zero. The tensor cores sum up (128 + c) x and x over one group at a time;
    scale and zero come in afterwards, in fp32. half is K/2, GATED as in `bytes_product`.
    """
    split = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)
    m = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    tiles = half // BK
    share = (tiles + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, tiles)
    there = (m < M)[None, :]
    w_at = w_ptr + row.to(tl.int64)[:, None] * half + columns[None, :]
    x_at = x_ptr + m[None, :] * K + columns[:, None]
    pair_at = pair_ptr + row
    acc = tl.zeros((BN, BM), tl.float32)
    ones = tl.full((BN, BK), 1.0, tl.bfloat16)
    if GATED:
        up_at = w_ptr + (row.to(tl.int64) + N)[:, None] * half + columns[None, :]
        up = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        at = tile * BK
        low = pair_at + at // GROUP * stride
        high = pair_at + (at + half) // GROUP * stride
        x_low, y_low = _twice(x_at + at, there)
        x_high, y_high = _twice(x_at + (at + half), there)
        a, b = _nibbles(tl.load(w_at + at), NATIVE)
        sum_low = _dot(ones, y_low, NATIVE)
        sum_high = _dot(ones, y_high, NATIVE)
        scale, zero = _scale_and_zero(tl.load(low))
        acc += _dot(a, x_low, NATIVE) * scale[:, None] + sum_low * zero[:, None]
        scale, zero = _scale_and_zero(tl.load(high))
        acc += _dot(b, x_high, NATIVE) * scale[:, None] + sum_high * zero[:, None]
        if GATED:
            a, b = _nibbles(tl.load(up_at + at), NATIVE)
            scale, zero = _scale_and_zero(tl.load(low + N))
            up += _dot(a, x_low, NATIVE) * scale[:, None] + sum_low * zero[:, None]
            scale, zero = _scale_and_zero(tl.load(high + N))
            up += _dot(b, x_high, NATIVE) * scale[:, None] + sum_high * zero[:, None]
    if GATED:
        acc = _gated(acc, up, out_ptr.dtype.element_ty)
    _store(acc, out_ptr, bias_ptr, n, m, M, N, split, BIAS)


@triton.jit(do_not_specialize=["first", "rows"])
def nibbles_dequantize(
    w_ptr, pair_ptr, out_ptr, first, rows, stride, K, half,
    GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The channels ``first`` ... ``first + rows`` of the weight of `nibbles_product` -> out [rows, K].

    A program takes ``TILES`` times ``BK`` bytes of each channel; each ``BK`` lie in one group on both sides, so that
    scale and zero are read once for all of them.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = n < rows
    channel = (tl.minimum(n, rows - 1) + first).to(tl.int64)
    columns = tl.arange(0, BK)
    for tile in tl.static_range(TILES):
        at = (tl.program_id(1) * TILES + tile) * BK
        inside = valid[:, None] & (at + columns < half)[None, :]
        packed = tl.load(w_ptr + channel[:, None] * half + at + columns[None, :], mask=inside, other=0)
        out = out_ptr + n.to(tl.int64)[:, None] * K + at + columns[None, :]
        for side in tl.static_range(2):
            group = (tl.minimum(at, half - BK) + side * half) // GROUP
            pair = tl.load(pair_ptr + group * stride + channel)
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = ((pair >> 16) << 16).to(tl.float32, bitcast=True)
            code = (packed >> (4 * side)) & 15
            value = (code.to(tl.float32) - 8) * scale[:, None] + zero[:, None]
            tl.store(out + side * half, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "rows"])
def bytes_dequantize(
    w_ptr, scale_ptr, out_ptr, first, rows, K, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The channels ``first`` ... ``first + rows`` of w [N, K] int8 times scale [N] -> out [rows, K]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < rows)[:, None] & (column < K)[None, :]
    channel = (tl.minimum(n, rows - 1) + first).to(tl.int64)
    w = tl.load(w_ptr + channel[:, None] * K + column[None, :], mask=inside, other=0)
    value = w.to(tl.float32) * tl.load(scale_ptr + channel).to(tl.float32)[:, None]
    tl.store(
        out_ptr + n.to(tl.int64)[:, None] * K + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["size", "splits"])
def sum_splits(partial_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """partial [splits, size] fp32 -> out [size]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "splits"])
def gate_splits(partial_ptr, out_ptr, M, N, splits, BLOCK: tl.constexpr):
    """partial [splits, M, 2 N] fp32 of gate over up -> out [M, N] = silu(gate) * up."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    inside = n < N
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = partial_ptr + (split * M + m) * 2 * N + n
        gate += tl.load(at, mask=inside, other=0.0)
        up += tl.load(at + N, mask=inside, other=0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + m * N + n, _gated(gate, up, dtype).to(dtype), mask=inside)
