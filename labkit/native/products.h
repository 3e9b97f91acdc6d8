// Products of a few rows with the weights of linear.h, in fp32.
//
// Every sum runs over the inputs in the same order whatever the number of rows, so a row's product is the same to the
// last bit alone and in any company. Activations are floats that hold values of the model's dtype.

#pragma once

#include "pairs.h"

// R rows times C channels from `channel` on.
template <Type T, int R, int C>
inline void dense_tile(const Linear& linear, int channel, const float* x, float* y, int y_stride) {
    using S = Stored<T>;
    const int inputs = linear.in, whole = inputs / WIDTH * WIDTH;
    const auto* weight = static_cast<const typename S::Element*>(linear.weight) + int64_t(channel) * inputs;
    Vector sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = fill(0);
    for (int k = 0; k < whole; k += WIDTH) {
        Vector given[R];
        for (int r = 0; r < R; ++r) given[r] = load(x + int64_t(r) * inputs + k);
        for (int c = 0; c < C; ++c) {
            const auto* from = weight + int64_t(c) * inputs + k;
            fetch(from + CHANNELS_AHEAD * int64_t(inputs));
            Vector values = S::vector(from);
            for (int r = 0; r < R; ++r) sums[r][c] = multiply_add(given[r], values, sums[r][c]);
        }
    }
    float totals[R * C];
    add_up<R, C>(sums, totals);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float total = totals[r * C + c];
            for (int k = whole; k < inputs; ++k)
                total += x[int64_t(r) * inputs + k] * S::one(weight[int64_t(c) * inputs + k]);
            y[int64_t(r) * y_stride + channel + c] = total;
        }
}

template <Type T, int R, int C>
inline void dense_rows(const Linear& linear, int from, int to, const float* x, float* y, int y_stride) {
    int channel = from;
    for (; channel + C <= to; channel += C) dense_tile<T, R, C>(linear, channel, x, y, y_stride);
    for (; channel < to; ++channel) dense_tile<T, R, 1>(linear, channel, x, y, y_stride);
}

template <Type T>
void dense(const Linear& linear, int from, int to, const float* x, int rows, float* y, int y_stride) {
    constexpr int C = ROWS == 4 ? 4 : 2;
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        dense_rows<T, ROWS, C>(linear, from, to, x + int64_t(row) * linear.in, y + int64_t(row) * y_stride, y_stride);
    for (; row < rows; ++row)
        dense_rows<T, 1, 4 * C>(linear, from, to, x + int64_t(row) * linear.in, y + int64_t(row) * y_stride, y_stride);
}

// R rows times the channels of C columns of a block; a column is WIDTH bytes wide, and holds 2 * WIDTH channels.
// Even and odd inputs have a sum each: more products under way at a time. group_sums [rows, K / group].
template <int R, int C>
inline void int4_tile(const Linear& linear, int block, int column, const float* x, const float* group_sums, float* y,
                      int y_stride) {
    const int inputs = linear.in, half = linear.block / 2, groups = inputs / linear.group;
    const auto* codes = static_cast<const uint8_t*>(linear.weight) + int64_t(block) * inputs * half + column * WIDTH;
    const auto* pairs = static_cast<const uint16_t*>(linear.scale);
    const Nibbles nibbles;
    const int first = block * linear.block + column * WIDTH;  // channel of the first low half
    Vector totals[R][C][2];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) totals[r][c][0] = totals[r][c][1] = fill(0);
    for (int g = 0; g < groups; ++g) {
        const uint16_t* later = pairs + 2 * (int64_t(std::min(g + AHEAD, groups - 1)) * linear.stride + first);
        for (int i = 0; i < 2 * linear.block; i += 32) fetch(later + i);
        Vector sums[2][R][C][2];
        for (int p = 0; p < 2; ++p)
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < C; ++c) sums[p][r][c][0] = sums[p][r][c][1] = fill(0);
        const int end = (g + 1) * linear.group;
        for (int k = g * linear.group; k < end; k += 2) {
            fetch(codes + int64_t(k) * half + 2048);
            for (int p = 0; p < 2; ++p)
                for (int c = 0; c < C; ++c) {
                    Vector low, high;
                    nibbles.load(codes + int64_t(k + p) * half + c * WIDTH, low, high);
                    for (int r = 0; r < R; ++r) {
                        Vector given = fill(x[int64_t(r) * inputs + k + p]);
                        sums[p][r][c][0] = multiply_add(low, given, sums[p][r][c][0]);
                        sums[p][r][c][1] = multiply_add(high, given, sums[p][r][c][1]);
                    }
                }
        }
        for (int c = 0; c < C; ++c)
            for (int side = 0; side < 2; ++side) {
                Vector scale, zero;
                load_pairs(pairs + 2 * (int64_t(g) * linear.stride + first + c * WIDTH + side * half), scale, zero);
                for (int r = 0; r < R; ++r) {
                    Vector& total = totals[r][c][side];
                    total = multiply_add(add(sums[0][r][c][side], sums[1][r][c][side]), scale, total);
                    total = multiply_add(fill(group_sums[int64_t(r) * groups + g]), zero, total);
                }
            }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            for (int side = 0; side < 2; ++side)
                store(y + int64_t(r) * y_stride + first + c * WIDTH + side * half, totals[r][c][side]);
}

template <int R, int C>
inline void int4_columns(const Linear& linear, int block, const float* x, const float* sums, float* y, int y_stride) {
    for (int column = 0; column < linear.block / 2 / WIDTH; column += C)
        int4_tile<R, C>(linear, block, column, x, sums, y, y_stride);
}

inline void int4(const Linear& linear, int block, const float* x, int rows, const float* group_sums, float* y,
                 int y_stride) {
    const int groups = linear.in / linear.group;
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        int4_columns<ROWS, 1>(linear, block, x + int64_t(row) * linear.in, group_sums + int64_t(row) * groups,
                              y + int64_t(row) * y_stride, y_stride);
    const bool even = linear.block / 2 / WIDTH % 2 == 0;
    for (; row < rows; ++row) {
        const float *own = x + int64_t(row) * linear.in, *sums = group_sums + int64_t(row) * groups;
        if (even) int4_columns<1, 2>(linear, block, own, sums, y + int64_t(row) * y_stride, y_stride);
        else int4_columns<1, 1>(linear, block, own, sums, y + int64_t(row) * y_stride, y_stride);
    }
}

// The sums of the unit's channels for all rows: x [rows, K] -> y [rows, y_stride]; `halves` is x in bf16, where pairs are taken.
inline void multiply_unit(const Linear& linear, int unit, const float* x, const Halves* halves, int rows,
                          const float* group_sums, float* y, int y_stride) {
    const int from = unit * UNIT, to = std::min(from + UNIT, linear.out);
#ifdef __AVX512BF16__
    if constexpr (PAIRED)
        if (halves) {
            if (linear.type == BF16) return paired<BF16>(linear, from, to, *halves, rows, y, y_stride);
            if (linear.type == INT8) return paired<INT8>(linear, from, to, *halves, rows, y, y_stride);
            return int4_paired(linear, unit, *halves, rows, group_sums, y, y_stride);
        }
#endif
    (void)halves;
    switch (linear.type) {
        case F32: return dense<F32>(linear, from, to, x, rows, y, y_stride);
        case BF16: return dense<BF16>(linear, from, to, x, rows, y, y_stride);
        case F16: return dense<F16>(linear, from, to, x, rows, y, y_stride);
        case INT8: return dense<INT8>(linear, from, to, x, rows, y, y_stride);
        default:
            for (int block = from / linear.block; block < to / linear.block; ++block)
                int4(linear, block, x, rows, group_sums, y, y_stride);
    }
}

// A block's weight, dequantized and turned over: values [K, stride] of type T, from column `block * linear.block` on.
template <Type T>
void dequantize_block(const Linear& linear, int block, typename Stored<T>::Element* values, int64_t stride) {
    const int half = linear.block / 2, first = block * linear.block;
    const auto* codes = static_cast<const uint8_t*>(linear.weight) + int64_t(block) * linear.in * half;
    const auto* pairs = static_cast<const uint16_t*>(linear.scale);
    const Nibbles nibbles;
    constexpr int MOST = 64 / WIDTH;  // vectors in a block's half: 128 channels at most
    for (int g = 0; g < linear.in / linear.group; ++g) {
        Vector scale[2][MOST], zero[2][MOST];
        for (int side = 0; side < 2; ++side)
            for (int i = 0; i < half / WIDTH; ++i)
                load_pairs(pairs + 2 * (int64_t(g) * linear.stride + first + i * WIDTH + side * half), scale[side][i],
                           zero[side][i]);
        for (int k = g * linear.group; k < (g + 1) * linear.group; ++k) {
            float floats[128];
            for (int i = 0; i < half / WIDTH; ++i) {
                Vector low, high;
                nibbles.load(codes + int64_t(k) * half + i * WIDTH, low, high);
                store(floats + i * WIDTH, multiply_add(low, scale[0][i], zero[0][i]));
                store(floats + half + i * WIDTH, multiply_add(high, scale[1][i], zero[1][i]));
            }
            auto* to = values + k * stride + first;
            for (int i = 0; i < 2 * half; ++i) to[i] = Stored<T>::kept(rounded(floats[i], T));
        }
    }
}
