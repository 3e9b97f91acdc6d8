// Products of bf16 activations two inputs at a time, where the processor has an instruction for it (AVX512_BF16).
//
// A lane takes two neighbouring inputs of one channel: both are multiplied and added to the lane's sum in fp32. Weights
// of 8 and 4 bits become bf16 first, which holds them exactly. The same sums for any number of rows, as in products.h.

#pragma once

#include "inputs.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)

inline Vector add_pairs(Vector total, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}

// The first `count` of 32 weights as bf16, the others 0.
template <Type T>
WITHIN inline __m512i halves(const void* from, int count) {
    const __mmask32 mask = count >= PAIRS ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
    if (T == BF16) return count >= PAIRS ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
    const __m256i bytes = count >= PAIRS ? _mm256_loadu_si256(static_cast<const __m256i*>(from))
                                         : _mm256_maskz_loadu_epi8(mask, from);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// R rows times C channels from `channel` on; x in pieces of PAIRS.
template <Type T, int R, int C>
APART void paired_tile(const Linear& linear, int channel, const uint16_t* x, float* y, int y_stride) {
    const int inputs = linear.in, size = T == BF16 ? 2 : 1;
    const auto* weight = static_cast<const uint8_t*>(linear.weight) + int64_t(channel) * inputs * size;
    Vector sums[R][C];
    each<R>([&](auto r) WITHIN { each<C>([&](auto c) WITHIN { sums[r][c] = fill(0); }); });
    const auto add_inputs = [&](int k, int count) WITHIN {
        __m512i given[R];
        each<R>([&](auto r) WITHIN { hold(given[r] = _mm512_loadu_si512(x + int64_t(k) * R + r * PAIRS)); });
        each<C>([&](auto c) WITHIN {
            const uint8_t* from = weight + (int64_t(c) * inputs + k) * size;
            FETCH(from + CHANNELS_AHEAD * int64_t(inputs) * size);
            __m512i values = halves<T>(from, count);
            hold(values);
            each<R>([&](auto r) WITHIN { sums[r][c] = add_pairs(sums[r][c], given[r], values); });
        });
    };
    int k = 0;
    for (; k + PAIRS <= inputs; k += PAIRS) add_inputs(k, PAIRS);
    if (k < inputs) add_inputs(k, inputs - k);
    float totals[R * C];
    add_up<R, C>(sums, totals);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) y[int64_t(r) * y_stride + channel + c] = totals[r * C + c];
}

template <Type T>
void paired(const Linear& linear, int from, int to, const Inputs& inputs, float* y, int y_stride) {
    by_rows<ROWS>(inputs.rows, [&](auto count, int row) {
        constexpr int R = decltype(count)::value, C = channels_for(R);
        const uint16_t* x = inputs.halves(row);
        float* out = y + int64_t(row) * y_stride;
        int channel = from;
        for (; channel + C <= to; channel += C) paired_tile<T, R, C>(linear, channel, x, out, y_stride);
        for (; channel < to; ++channel) paired_tile<T, R, 1>(linear, channel, x, out, y_stride);
    });
}

// Two rows of a block of 64 channels (bytes 0 ... 31 are input k, 32 ... 63 input k + 1) -> 16 channels' pairs.
struct Unfold {
    __m512i first, second, values;
    Unfold() {
        alignas(64) uint8_t places[2][64];
        alignas(64) uint16_t codes[32];
        for (int i = 0; i < 32; ++i) {
            for (int part = 0; part < 2; ++part)
                places[part][2 * i] = places[part][2 * i + 1] = uint8_t((i & 1) * 32 + part * 16 + i / 2);
            codes[i] = uint16_t(bits_of_float(float(i & 15) - 8) >> 16);  // twice: the fifth bit does not matter
        }
        first = _mm512_load_si512(places[0]);
        second = _mm512_load_si512(places[1]);
        values = _mm512_load_si512(codes);
    }
    inline __m512i low(__m512i bytes) const { return _mm512_permutexvar_epi16(_mm512_permutexvar_epi8(first, bytes), values); }
    inline __m512i high(__m512i bytes) const { return _mm512_permutexvar_epi16(_mm512_permutexvar_epi8(second, bytes), values); }
};

// R rows times a block's channels, or (V = 2) the half of them whose codes are the bytes' `upper` halves or the lower.
template <int R, int V>
APART void int4_paired_tile(const Linear& linear, int block, bool upper, const uint16_t* x, const float* group_sums,
                             float* y, int y_stride) {
    const int inputs = linear.in, groups = inputs / linear.group, first = block * 64 + (upper ? 32 : 0);
    const auto* codes = static_cast<const uint8_t*>(linear.weight) + int64_t(block) * inputs * 32;
    const auto* pairs = static_cast<const uint16_t*>(linear.scale);
    const Unfold unfold;
    Vector totals[R][V];
    each<R>([&](auto r) WITHIN { each<V>([&](auto i) WITHIN { totals[r][i] = fill(0); }); });
    for (int g = 0; g < groups; ++g) {
        const uint16_t* later = pairs + 2 * (int64_t(std::min(g + AHEAD, groups - 1)) * linear.stride + first);
        for (int i = 0; i < 32 * V; i += 32) FETCH(later + i);
        Vector sums[R][V];
        each<R>([&](auto r) WITHIN { each<V>([&](auto i) WITHIN { sums[r][i] = fill(0); }); });
        for (int k = g * linear.group; k < (g + 1) * linear.group; k += 2) {
            FETCH(codes + int64_t(k) * 32 + 2048);
            __m512i bytes = _mm512_loadu_si512(codes + int64_t(k) * 32), values[V];
            if (V == 2 && upper) bytes = _mm512_srli_epi16(bytes, 4);
            values[0] = unfold.low(bytes);
            values[1] = unfold.high(bytes);
            if constexpr (V == 4) {
                bytes = _mm512_srli_epi16(bytes, 4);
                values[2] = unfold.low(bytes);
                values[3] = unfold.high(bytes);
            }
            each<R>([&](auto r) WITHIN {
                int32_t both;
                std::memcpy(&both, x + int64_t(r) * inputs + k, 4);
                const __m512i given = _mm512_set1_epi32(both);
                each<V>([&](auto i) WITHIN { sums[r][i] = add_pairs(sums[r][i], given, values[i]); });
            });
        }
        each<V>([&](auto i) WITHIN {
            Vector scale, zero;
            load_pairs(pairs + 2 * (int64_t(g) * linear.stride + first + 16 * i), scale, zero);
            each<R>([&](auto r) WITHIN {
                totals[r][i] = multiply_add(sums[r][i], scale, totals[r][i]);
                totals[r][i] = multiply_add(fill(group_sums[int64_t(r) * groups + g]), zero, totals[r][i]);
            });
        });
    }
    each<R>([&](auto r) WITHIN {
        each<V>([&](auto i) WITHIN { store(y + int64_t(r) * y_stride + first + 16 * i, totals[r][i]); });
    });
}

inline void int4_paired(const Linear& linear, int block, const Inputs& inputs, float* y, int y_stride) {
    const int groups = linear.in / linear.group;
    by_rows<ROWS>(inputs.rows, [&](auto count, int row) {
        constexpr int R = decltype(count)::value, V = R > 4 ? 2 : 4;
        for (int part = 0; part < 4; part += V)
            int4_paired_tile<R, V>(linear, block, part > 0, inputs.halves(row), inputs.sums + int64_t(row) * groups,
                                   y + int64_t(row) * y_stride, y_stride);
    });
}

#endif
