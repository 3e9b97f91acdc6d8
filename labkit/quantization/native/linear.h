// A weight as the lab's modules keep it (labkit/quantization), and what the ways of multiplying by it share.

#pragma once

#include <algorithm>

#include "vectors.h"

extern "C" struct Linear {
    int32_t type;        // of the weight
    int32_t out, in;     // channels [N], inputs [K]
    int32_t group;       // INT4: inputs that share a scale
    int32_t block;       // INT4: channels of a block, see labkit/quantization/kernels/cpu_int4.py
    int32_t stride;      // INT4: channels in a row of scale_zero
    int32_t taken;       // the type that inputs are rounded to
    int32_t given;       // the type that products are rounded to
    int32_t bias_first;  // whether the bias is added before that, as a dense product does
    const void* weight;  // [N, K]; INT4: [N / block, K, block / 2]
    const void* scale;   // INT8: bf16 [N]; INT4: bf16 [K / group, stride, 2], scale and zero
    const float* bias;   // [N], or null
};

constexpr int AHEAD = 4;  // groups whose scales are fetched before they are needed: they lie far apart
constexpr int CHANNELS_AHEAD = 16;  // those of dense weights
constexpr int UNIT = 64;  // channels that a thread takes at a time: one or two of INT4's blocks

inline int units_of(const Linear& linear) { return (linear.out + UNIT - 1) / UNIT; }

#define FETCH(from) __builtin_prefetch(from)  // calls of a function that does no more are taken for idle, and left out

// Sums [from, to) of one row of y become products: scaled, rounded, with the bias.
template <Type T>
inline void finish_as(const Linear& linear, float* y, int from, int to) {
    if (linear.type == INT8) {
        const auto* scale = static_cast<const uint16_t*>(linear.scale);
        for (int i = from; i < to; ++i) y[i] *= float_of_bf16(scale[i]);
    }
    if (!linear.bias) {
        for (int i = from; i < to; ++i) y[i] = rounded<T>(y[i]);
    } else if (linear.bias_first) {
        for (int i = from; i < to; ++i) y[i] = rounded<T>(y[i] + linear.bias[i]);
    } else {
        for (int i = from; i < to; ++i) y[i] = rounded<T>(rounded<T>(y[i]) + linear.bias[i]);
    }
}

inline void finish(const Linear& linear, float* y, int from, int to) {
    if (linear.given == F32) finish_as<F32>(linear, y, from, to);
    if (linear.given == BF16) finish_as<BF16>(linear, y, from, to);
    if (linear.given == F16) finish_as<F16>(linear, y, from, to);
}
