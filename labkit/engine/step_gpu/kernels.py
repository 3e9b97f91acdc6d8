"""Triton's kernels between the products of a decoding step: norms, rotation, attention over each row's own cache.

Rounding happens where transformers' modules round, so that the answers are the same but for the order of sums. Keys and
values of a row lie in one buffer ``[layers, 2, groups, capacity, D]``; the kernels find it by its address, so that a
captured step serves any rows: `state` is int64 ``[5, B]``, where the buffers begin (in values from `anchor`, a multiple
of 16), their capacities, the tokens that have come, the positions of the tokens to come, and where the scales of int8
buffers begin (in values from `scales`, the anchor of theirs).

`anchor` has the type that is kept. int8 is written and read as `labkit.engine.kv_cache` does it, to the last bit:
dequantized in the product, a tile at a time. WINDOW: tokens lie in a ring of so many behind the first SINKS; 0: all
are kept.

Imports triton: import this module only where that is (`labkit.quantization.kernels.cuda_products.available`).
"""

import triton
import triton.language as tl


@triton.jit
def _rms(x, weight_ptr, at, inside, size, eps, dtype: tl.constexpr):
    """Glm4vRMSNorm of x [size] fp32: rounded before and after the weight."""
    normed = x * tl.rsqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return (normed.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def add_norm(
    parts_ptr, residual_ptr, post_ptr, next_ptr, sum_ptr, out_ptr, M, size, eps,
    SPLITS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A product's parts [splits, M, size] are summed, normed by ``post`` and added to the residual [M, size]: that is
    ``sum``, and normed by ``next`` it is ``out``. FIRST: only the last of it, of ``residual``."""
    m = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(residual_ptr + m * size + at, mask=inside, other=0.0).to(tl.float32)
    if not FIRST:
        total = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts_ptr + (split * M + m) * size + at, mask=inside, other=0.0).to(tl.float32)
        added = _rms(total.to(dtype).to(tl.float32), post_ptr, at, inside, size, eps, dtype)
        x = (x + added).to(dtype).to(tl.float32)
        tl.store(sum_ptr + m * size + at, x.to(dtype), mask=inside)
    tl.store(out_ptr + m * size + at, _rms(x, next_ptr, at, inside, size, eps, dtype).to(dtype), mask=inside)


@triton.jit
def _head(
    parts_ptr, bias_ptr, row, column, M, width, SPLITS: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr
):
    """Some columns of one row of a product's parts, summed, rounded, with its bias."""
    total = tl.zeros(column.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * M + row) * width + column).to(tl.float32)
    if BIAS:
        total = total.to(dtype).to(tl.float32) + tl.load(bias_ptr + column).to(tl.float32)
    return total.to(dtype).to(tl.float32)


@triton.jit
def _slot(token, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Where a token lies: `labkit.engine.kv_cache.Keeping.slots`."""
    if WINDOW == 0:
        return token
    return tl.where(token < SINKS, token, SINKS + (token - SINKS) % WINDOW)


@triton.jit
def _kept(state_ptr, M, m, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """How many tokens a row attends to, the new one counted."""
    count = (tl.load(state_ptr + 2 * M + m) + 1).to(tl.int32)
    if WINDOW > 0:
        count = tl.minimum(count, WINDOW + SINKS)
    return count


@triton.jit
def _quantized(x):
    """x [D] fp32 -> codes, whole numbers, and their scale, both fp32: `labkit.engine.kv_cache.quantize_vectors`."""
    scale = tl.maximum(tl.max(tl.abs(x)) * (1 / 127), 1e-20)
    bits = scale.to(
        tl.int32, bitcast=True
    )  # to the nearest bf16, ties to even: Triton's interpreter would cut it off
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    shift = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even
    codes = (tl.div_rn(x, scale) + shift) - shift
    return tl.minimum(tl.maximum(codes, -127.0), 127.0), scale


@triton.jit(do_not_specialize=["M", "layer"])
def rotate(
    parts_ptr, bias_ptr, frequency_ptr, state_ptr, anchor_ptr, scales_ptr, query_ptr, M, layer,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Parts of q, k and v [splits, M, (heads + 2 groups) D] -> query [M, heads, D], and the cache's next entry.

    The first ROTATED of a head's values turn in neighbouring pairs by position * frequency [ROTATED/2].
    """
    m = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    width: tl.constexpr = (HEADS + 2 * GROUPS) * D
    x = _head(parts_ptr, bias_ptr, m, head * D + d, M, width, SPLITS, BIAS, dtype)
    if head < HEADS + GROUPS:
        position = tl.load(state_ptr + 3 * M + m).to(tl.float32)
        turns = d < ROTATED
        angle = position * tl.load(frequency_ptr + d // 2, mask=turns, other=0.0)
        cosine = tl.cos(angle).to(dtype).to(tl.float32)
        sine = tl.sin(angle).to(dtype).to(tl.float32)
        partner = _head(parts_ptr, bias_ptr, m, head * D + (d ^ 1), M, width, SPLITS, BIAS, dtype)
        partner = tl.where(d % 2 == 0, -partner, partner)
        turned = (x * cosine).to(dtype).to(tl.float32) + (partner * sine).to(dtype).to(tl.float32)
        x = tl.where(turns, turned, x)
    if head < HEADS:
        tl.store(query_ptr + (m * HEADS + head) * D + d, x.to(dtype))
    else:
        capacity = tl.load(state_ptr + M + m)
        slot = _slot(tl.load(state_ptr + 2 * M + m), WINDOW, SINKS)
        # k is the first of a layer's two halves, v the second: head - HEADS counts through both
        entry = (layer * 2 * GROUPS + head - HEADS) * capacity + slot
        cache = anchor_ptr + tl.multiple_of(tl.load(state_ptr + m), 16)
        kept: tl.constexpr = anchor_ptr.dtype.element_ty
        if kept == tl.int8:
            codes, scale = _quantized(x.to(dtype).to(tl.float32))
            tl.store(
                scales_ptr + tl.load(state_ptr + 4 * M + m) + entry, scale.to(scales_ptr.dtype.element_ty)
            )
            tl.store(cache + entry * D + d, codes.to(tl.int8))
        else:
            tl.store(cache + entry * D + d, x.to(dtype).to(kept))


@triton.jit
def _dot(a, b, dtype: tl.constexpr, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.dot(a.to(dtype), b.to(dtype), input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _share(length, SHARES: tl.constexpr, BT: tl.constexpr):
    """How many tokens each of SHARES programs takes, by the row's own length alone."""
    return tl.cdiv(tl.cdiv(length, SHARES), BT) * BT


@triton.jit
def _dequantized(codes, scale, dtype: tl.constexpr):
    """int8 codes by their scales, rounded as `labkit.engine.kv_cache.dequantize_vectors` rounds."""
    return (codes.to(tl.float32) * scale.to(dtype).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["M", "layer"])
def attend(
    query_ptr, state_ptr, anchor_ptr, scales_ptr, acc_ptr, stats_ptr, M, layer, scaling,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr,
    BH: tl.constexpr, BT: tl.constexpr, NATIVE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One share of one row's tokens for the heads that share keys (flash decoding).

    query [M, heads, D] -> acc [M, heads, shares, D] fp32, not divided, and stats [2, M, heads, shares]: the largest
    score and the sum of exponentials. Shares beyond the row's tokens write nothing.
    """
    m = tl.program_id(0)
    group = tl.program_id(1)
    share = tl.program_id(2)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    per: tl.constexpr = HEADS // GROUPS
    length = _kept(state_ptr, M, m, WINDOW, SINKS)
    each = _share(length, SHARES, BT)
    begin = share * each
    if begin < length:
        capacity = tl.load(state_ptr + M + m)
        cache = anchor_ptr + tl.multiple_of(tl.load(state_ptr + m), 16)
        h = tl.arange(0, BH)
        d = tl.arange(0, D)
        t = tl.arange(0, BT)
        head = group * per + h
        valid = h < per
        q = tl.load(query_ptr + (m * HEADS + head[:, None]) * D + d[None, :], mask=valid[:, None], other=0.0)
        first = (layer * 2 * GROUPS + group) * capacity
        keys = cache + first * D
        values = keys + GROUPS * capacity * D
        key_scales = scales_ptr + tl.load(state_ptr + 4 * M + m) + first
        value_scales = key_scales + GROUPS * capacity
        largest = tl.full((BH,), float("-inf"), tl.float32)
        total = tl.zeros((BH,), tl.float32)
        acc = tl.zeros((BH, D), tl.float32)
        end = tl.minimum(begin + each, length)
        for start in tl.range(begin, end, BT):
            token = start + t
            there = token < end
            k = tl.load(keys + token[None, :] * D + d[:, None], mask=there[None, :], other=0)
            v = tl.load(values + token[:, None] * D + d[None, :], mask=there[:, None], other=0)
            if anchor_ptr.dtype.element_ty == tl.int8:
                k = _dequantized(k, tl.load(key_scales + token, mask=there, other=0.0)[None, :], dtype)
                v = _dequantized(v, tl.load(value_scales + token, mask=there, other=0.0)[:, None], dtype)
            score = tl.where(there[None, :], _dot(q, k, dtype, NATIVE) * scaling, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            kept = tl.exp(largest - higher)
            weight = tl.exp(score - higher[:, None])
            total = total * kept + tl.sum(weight, 1)
            acc = acc * kept[:, None] + _dot(weight, v, dtype, NATIVE)
            largest = higher
        at = (m * HEADS + head) * SHARES + share
        tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=valid[:, None])
        tl.store(stats_ptr + at, largest, mask=valid)
        tl.store(stats_ptr + M * HEADS * SHARES + at, total, mask=valid)


@triton.jit(do_not_specialize=["M"])
def combine(
    acc_ptr, stats_ptr, state_ptr, out_ptr, M,
    HEADS: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr, BT: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The shares of `attend` -> out [M, heads, D]."""
    m = tl.program_id(0)
    head = tl.program_id(1)
    length = _kept(state_ptr, M, m, WINDOW, SINKS)
    share = tl.arange(0, SHARES)
    d = tl.arange(0, D)
    there = share * _share(length, SHARES, BT) < length
    at = (m * HEADS + head) * SHARES + share
    largest = tl.load(stats_ptr + at, mask=there, other=float("-inf"))
    total = tl.load(stats_ptr + M * HEADS * SHARES + at, mask=there, other=0.0)
    weight = tl.exp(largest - tl.max(largest))
    acc = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight)
    tl.store(out_ptr + (m * HEADS + head) * D + d, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def advance(state_ptr, M, BM: tl.constexpr):
    """After a step: one token more in each cache, one position on; rows of filling, of capacity 1, stay."""
    m = tl.arange(0, BM)
    lives = (m < M) & (tl.load(state_ptr + M + m, mask=m < M, other=0) > 1)
    for line in tl.static_range(2, 4):
        tl.store(
            state_ptr + line * M + m, tl.load(state_ptr + line * M + m, mask=lives, other=0) + 1, mask=lives
        )
