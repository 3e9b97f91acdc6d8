// One new token's attention to a row's keys and values, heads that share keys together.

#pragma once

#include "inputs.h"
#include "model.h"

constexpr int HEADS = 4;  // most heads of a group at a time

struct Scratch {
    Room<float> turned, scores;
};

// One head at the row's position: from [head_width] -> to.
template <Type T>
inline void rotate(const Model& model, const Row& row, const float* from, float* to) {
    const int rotary = model.rotary, half = rotary / 2;
    std::copy(from + rotary, from + model.head_width, to + rotary);
    const float *cosine = row.cosine, *sine = row.sine;
    if (model.interleaved) {
        for (int i = 0; i < rotary; i += 2) {
            to[i] = rounded<T>(rounded<T>(from[i] * cosine[i]) + rounded<T>(-from[i + 1] * sine[i]));
            to[i + 1] = rounded<T>(rounded<T>(from[i + 1] * cosine[i + 1]) + rounded<T>(from[i] * sine[i + 1]));
        }
    } else {
        for (int a = 0, b = half; a < half; ++a, ++b) {
            to[a] = rounded<T>(rounded<T>(from[a] * cosine[a]) + rounded<T>(-from[b] * sine[a]));
            to[b] = rounded<T>(rounded<T>(from[b] * cosine[b]) + rounded<T>(from[a] * sine[b]));
        }
    }
}

// Scores of the `length` tokens before: q [H, width] times keys [length, width] -> scores [H, stride].
template <Type T, int H>
inline void score(const float* q, const typename Stored<T>::Element* keys, int64_t length, int width, float scaling,
                  float* scores, int64_t stride) {
    using S = Stored<T>;
    const int whole = width / WIDTH * WIDTH;
    for (int64_t first = 0; first < length; first += 16) {
        const int count = int(std::min<int64_t>(16, length - first));
        Vector totals[H][16];
        for (int t = 0; t < count; ++t) {
            const auto* at = keys + (first + t) * width;
            Vector total[H];
            each<H>([&](auto h) WITHIN { total[h] = fill(0); });
            for (int i = 0; i < whole; i += WIDTH) {
                const Vector key = S::vector(at + i);
                each<H>([&](auto h) WITHIN { total[h] = multiply_add(load(q + h * width + i), key, total[h]); });
            }
            each<H>([&](auto h) WITHIN { totals[h][t] = total[h]; });
        }
        for (int h = 0; h < H; ++h) {
            float* to = scores + h * stride + first;
            sum_every(totals[h], count, to);
            for (int t = 0; t < count; ++t) {
                for (int i = whole; i < width; ++i) to[t] += q[h * width + i] * S::one(keys[(first + t) * width + i]);
                to[t] *= scaling;
            }
        }
    }
}

// Columns [i, i + J * WIDTH) of the weighted means: weights [H, stride] times values [length, width], and v -> out.
template <Type T, int H, int J>
inline void average(const float* weights, int64_t stride, const typename Stored<T>::Element* values, int64_t length,
                    int width, const float* v, const float* shares, int i, float* out) {
    using S = Stored<T>;
    Vector means[H][J];
    each<H>([&](auto h) WITHIN {
        each<J>([&](auto j) WITHIN {
            means[h][j] = multiply(fill(weights[h * stride + length]), load(v + i + j * WIDTH));
        });
    });
    for (int64_t t = 0; t < length; ++t) {
        Vector value[J];
        each<J>([&](auto j) WITHIN { value[j] = S::vector(values + t * width + i + j * WIDTH); });
        each<H>([&](auto h) WITHIN {
            const Vector weight = fill(weights[h * stride + t]);
            each<J>([&](auto j) WITHIN { means[h][j] = multiply_add(weight, value[j], means[h][j]); });
        });
    }
    each<H>([&](auto h) WITHIN {
        each<J>([&](auto j) WITHIN {
            store(out + h * width + i + j * WIDTH, multiply(means[h][j], fill(shares[h])));
        });
    });
}

// H heads from `head` on, which share keys: rotates, stores the new key and value (the first head of each group does),
// attends. query, key, value and out are the row's.
template <Type T, int H>
void attend(const Model& model, const Row& row, int layer, int head, const float* query, const float* key,
            const float* value, float* out, Scratch& scratch) {
    using S = Stored<T>;
    using Element = typename S::Element;
    const int width = model.head_width, shared = model.heads / model.key_heads, key_head = head / shared;
    const int64_t length = row.length, stride = (length + 512) / 256 * 256;
    float *q = scratch.turned.take((H + 1) * width), *k = q + H * width;
    float* scores = scratch.scores.take(H * stride);
    for (int h = 0; h < H; ++h) rotate<T>(model, row, query + (head + h) * width, q + h * width);
    rotate<T>(model, row, key + key_head * width, k);
    const float* v = value + key_head * width;
    out += head * width;
    Element* keys = static_cast<Element*>(row.keys[layer]) + key_head * row.room * width;
    Element* values = static_cast<Element*>(row.values[layer]) + key_head * row.room * width;
    if (head % shared == 0)
        for (int i = 0; i < width; ++i) {
            keys[length * width + i] = S::kept(k[i]);
            values[length * width + i] = S::kept(v[i]);
        }
    score<T, H>(q, keys, length, width, model.scaling, scores, stride);
    float own[H], totals[H], shares[H];  // the new token's scores; sums of all heads at a time, each in its order
    for (int h = 0; h < H; ++h) own[h] = totals[h] = 0;
    for (int i = 0; i < width; ++i) each<H>([&](auto h) WITHIN { own[h] += q[h * width + i] * k[i]; });
    for (int h = 0; h < H; ++h) {
        float* of = scores + h * stride;
        of[length] = own[h] * model.scaling;
        const float largest = largest_of(of, length + 1);
        for (int64_t t = 0; t <= length; ++t) of[t] = exponential(of[t] - largest);
    }
    for (int64_t t = 0; t <= length; ++t) each<H>([&](auto h) WITHIN { totals[h] += scores[h * stride + t]; });
    for (int h = 0; h < H; ++h) {
        shares[h] = 1.0f / totals[h];
        round_all(scores + h * stride, int(length) + 1, T);  // as torch's attention passes them on
    }
    int i = 0;
    for (; i + 4 * WIDTH <= width; i += 4 * WIDTH)
        average<T, H, 4>(scores, stride, values, length, width, v, shares, i, out);
    for (; i + WIDTH <= width; i += WIDTH)
        average<T, H, 1>(scores, stride, values, length, width, v, shares, i, out);
    for (; i < width; ++i)
        for (int h = 0; h < H; ++h) {
            const float* own = scores + h * stride;
            float mean = own[length] * v[i];
            for (int64_t t = 0; t < length; ++t) mean += own[t] * S::one(values[t * width + i]);
            out[h * width + i] = mean * shares[h];
        }
    round_all(out, H * width, T);
}

// Heads [from, to) of all rows, counted row by row.
template <Type T>
void attend_share(const Model& model, const Row* rows, int layer, int from, int to, const float* query,
                  const float* key, const float* value, float* out, Scratch& scratch) {
    const int shared = model.heads / model.key_heads;
    const int64_t wide = model.heads * model.head_width, narrow = model.key_heads * model.head_width;
    while (from < to) {
        const int r = from / model.heads, head = from % model.heads;
        const int count = std::min(shared - head % shared, to - from);
        by_rows<HEADS>(count, [&](auto together, int skipped) {
            attend<T, decltype(together)::value>(model, rows[r], layer, head + skipped, query + r * wide, key + r * narrow,
                                                 value + r * narrow, out + r * wide, scratch);
        });
        from += count;
    }
}
