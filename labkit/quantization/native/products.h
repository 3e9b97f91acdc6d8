// Products of a few rows with the weights of linear.h, in fp32.
//
// Every sum runs over the inputs in the same order whatever the number of rows, so a row's product is the same to the
// last bit alone and in any company. Activations are floats that hold values of the model's dtype.

#pragma once

#include "pairs.h"

// The inputs that fill no vector; x is the rows' last piece.
template <Type T>
void add_rest(const typename Stored<T>::Element* weight, int inputs, const float* x, int rows, int channels,
              float* totals) {
    const int rest = inputs % WIDTH;
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < channels; ++c)
            for (int k = 0; k < rest; ++k)
                totals[r * channels + c] +=
                    x[r * WIDTH + k] * Stored<T>::one(weight[int64_t(c + 1) * inputs - rest + k]);
}

// R rows times C channels from `channel` on; x in pieces of WIDTH.
template <Type T, int R, int C>
APART void dense_tile(const Linear& linear, int channel, const float* x, float* y, int y_stride) {
    using S = Stored<T>;
    const int inputs = linear.in, whole = inputs / WIDTH * WIDTH;
    const auto* weight = static_cast<const typename S::Element*>(linear.weight) + int64_t(channel) * inputs;
    Vector sums[R][C];
    each<R>([&](auto r) WITHIN { each<C>([&](auto c) WITHIN { sums[r][c] = fill(0); }); });
    for (int k = 0; k < whole; k += WIDTH) {
        Vector given[R];
        each<R>([&](auto r) WITHIN { hold(given[r] = load(x + int64_t(k) * R + r * WIDTH)); });
        each<C>([&](auto c) WITHIN {
            const auto* from = weight + int64_t(c) * inputs + k;
            FETCH(from + CHANNELS_AHEAD * int64_t(inputs));
            Vector values = S::vector(from);
            hold(values);
            each<R>([&](auto r) WITHIN { sums[r][c] = multiply_add(given[r], values, sums[r][c]); });
        });
    }
    float totals[R * C];
    add_up<R, C>(sums, totals);
    if (whole < inputs) add_rest<T>(weight, inputs, x + int64_t(whole) * R, R, C, totals);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) y[int64_t(r) * y_stride + channel + c] = totals[r * C + c];
}

template <Type T>
void dense(const Linear& linear, int from, int to, const Inputs& inputs, float* y, int y_stride) {
    by_rows<ROWS>(inputs.rows, [&](auto count, int row) {
        constexpr int R = decltype(count)::value, C = channels_for(R);
        const float* x = inputs.floats(row);
        float* out = y + int64_t(row) * y_stride;
        int channel = from;
        for (; channel + C <= to; channel += C) dense_tile<T, R, C>(linear, channel, x, out, y_stride);
        for (; channel < to; ++channel) dense_tile<T, R, 1>(linear, channel, x, out, y_stride);
    });
}

// R rows times the channels of C columns of a block; a column is WIDTH bytes wide, and holds 2 * WIDTH channels.
// Even and odd inputs have a sum each: more products under way at a time. group_sums [rows, K / group].
template <int R, int C>
APART void int4_tile(const Linear& linear, int block, int column, const float* x, const float* group_sums, float* y,
                      int y_stride) {
    const int inputs = linear.in, half = linear.block / 2, groups = inputs / linear.group;
    const auto* codes = static_cast<const uint8_t*>(linear.weight) + int64_t(block) * inputs * half + column * WIDTH;
    const auto* pairs = static_cast<const uint16_t*>(linear.scale);
    const Nibbles nibbles;
    const int first = block * linear.block + column * WIDTH;  // channel of the first low half
    Vector totals[R][C][2];
    const auto every = [](auto take) WITHIN {
        each<R>([&](auto r) WITHIN {
            each<C>([&](auto c) WITHIN { each<2>([&](auto side) WITHIN { take(r, c, side); }); });
        });
    };
    every([&](auto r, auto c, auto side) WITHIN { totals[r][c][side] = fill(0); });
    for (int g = 0; g < groups; ++g) {
        const uint16_t* later = pairs + 2 * (int64_t(std::min(g + AHEAD, groups - 1)) * linear.stride + first);
        for (int i = 0; i < 2 * linear.block; i += 32) FETCH(later + i);
        Vector sums[2][R][C][2];
        every([&](auto r, auto c, auto side) WITHIN { sums[0][r][c][side] = sums[1][r][c][side] = fill(0); });
        const int end = (g + 1) * linear.group;
        for (int k = g * linear.group; k < end; k += 2) {
            FETCH(codes + int64_t(k) * half + 2048);
            each<2>([&](auto p) WITHIN {
                each<C>([&](auto c) WITHIN {
                    Vector low, high;
                    nibbles.load(codes + int64_t(k + p) * half + c * WIDTH, low, high);
                    each<R>([&](auto r) WITHIN {
                        const Vector given = fill(x[int64_t(r) * inputs + k + p]);
                        sums[p][r][c][0] = multiply_add(low, given, sums[p][r][c][0]);
                        sums[p][r][c][1] = multiply_add(high, given, sums[p][r][c][1]);
                    });
                });
            });
        }
        every([&](auto r, auto c, auto side) WITHIN {
            Vector scale, zero, &total = totals[r][c][side];
            load_pairs(pairs + 2 * (int64_t(g) * linear.stride + first + c * WIDTH + side * half), scale, zero);
            total = multiply_add(add(sums[0][r][c][side], sums[1][r][c][side]), scale, total);
            total = multiply_add(fill(group_sums[int64_t(r) * groups + g]), zero, total);
        });
    }
    every([&](auto r, auto c, auto side) WITHIN {
        store(y + int64_t(r) * y_stride + first + c * WIDTH + side * half, totals[r][c][side]);
    });
}

template <int R, int C>
inline void int4_columns(const Linear& linear, int block, const float* x, const float* sums, float* y, int y_stride) {
    for (int column = 0; column < linear.block / 2 / WIDTH; column += C)
        int4_tile<R, C>(linear, block, column, x, sums, y, y_stride);
}

inline void int4(const Linear& linear, int block, const Inputs& inputs, float* y, int y_stride) {
    const int groups = linear.in / linear.group;
    const bool even = linear.block / 2 / WIDTH % 2 == 0;
    by_rows<ROWS / 2>(inputs.rows, [&](auto count, int row) {
        constexpr int R = decltype(count)::value, C = R == 1 ? 2 : 1;
        const float *x = inputs.plain + int64_t(row) * linear.in, *sums = inputs.sums + int64_t(row) * groups;
        float* out = y + int64_t(row) * y_stride;
        if (even) int4_columns<R, C>(linear, block, x, sums, out, y_stride);
        else int4_columns<R, 1>(linear, block, x, sums, out, y_stride);
    });
}

// The sums of the unit's channels for all rows: y [rows, y_stride].
inline void multiply_unit(const Linear& linear, int unit, const Inputs& inputs, float* y, int y_stride) {
    const int from = unit * UNIT, to = std::min(from + UNIT, linear.out);
#ifdef __AVX512BF16__
    if constexpr (PAIRED)
        if (inputs.pairs(linear)) {
            if (linear.type == BF16) return paired<BF16>(linear, from, to, inputs, y, y_stride);
            if (linear.type == INT8) return paired<INT8>(linear, from, to, inputs, y, y_stride);
            return int4_paired(linear, unit, inputs, y, y_stride);
        }
#endif
    switch (linear.type) {
        case F32: return dense<F32>(linear, from, to, inputs, y, y_stride);
        case BF16: return dense<BF16>(linear, from, to, inputs, y, y_stride);
        case F16: return dense<F16>(linear, from, to, inputs, y, y_stride);
        case INT8: return dense<INT8>(linear, from, to, inputs, y, y_stride);
        default:
            for (int block = from / linear.block; block < to / linear.block; ++block)
                int4(linear, block, inputs, y, y_stride);
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
            for (int i = 0; i < 2 * half; ++i) to[i] = Stored<T>::kept(rounded<T>(floats[i]));
        }
    }
}
