// A decoder and its rows as labkit/engine/step_cpu/ describes them.

#pragma once

#include "linear.h"

extern "C" {

struct Layer {
    const float* before_attention;  // weights of norms, [width]
    const float* after_attention;   // or null
    const float* before_mlp;
    const float* after_mlp;  // or null
    Linear query, key, value, out, gate, up, down;
};

struct Model {
    int32_t dtype;  // F32, BF16 or F16: of the hidden states and the cache
    int32_t layers, width, heads, key_heads, head_width;
    int32_t rotary;       // how much of a head is rotated
    int32_t interleaved;  // whether neighbours are rotated together, or those half a head apart
    int32_t inner, vocabulary;
    int32_t embedding_type;  // F32, BF16, F16 or INT8
    int32_t embedding_given;  // the type that its rows are rounded to
    float epsilon, scaling;
    const void* embedding;        // [vocabulary, width]
    const void* embedding_scale;  // INT8: bf16 [vocabulary]
    const Layer* layer;
    const float* norm;  // [width]
    Linear head;
};

struct Row {
    const float* cosine;  // [rotary] at its position
    const float* sine;
    void* const* keys;  // of each layer [key_heads, room, head_width] in the model's dtype
    void* const* values;
    int64_t length;  // tokens in the cache, before this one
    int64_t room;
    int64_t token;
};
}
