// Vectors of floats, and loading them from the types that weights and caches are stored in.
//
// Three forms of the same functions: AVX-512 (16 floats), AVX2 (8), and plain C++ (8) that any compiler takes.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

// A function that is compiled for itself, so that what is around it does not push its sums out of the registers; and
// one that is part of the function that calls it.
#if defined(__GNUC__)
#define APART __attribute__((noinline)) static
#define WITHIN __attribute__((always_inline))
#else
#define APART static
#define WITHIN
#endif

template <typename Do, int... I>
WITHIN inline void each_of(const Do& take, std::integer_sequence<int, I...>) {
    (take(std::integral_constant<int, I>()), ...);
}

// Calls take(0), take(1) ... take(N - 1) with numbers that the compiler knows: an array of sums, so indexed, is N registers.
template <int N, typename Do>
WITHIN inline void each(const Do& take) {
    each_of(take, std::make_integer_sequence<int, N>());
}

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of_bf16(uint16_t value) { return float_of_bits(uint32_t(value) << 16); }

// The nearest bf16, ties to even, as a float. Values that are not finite stay so.
inline float round_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
    return value == value ? float_of_bits(rounded) : value;
}

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
inline float float_of_f16(uint16_t value) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value))); }
inline uint16_t f16_of_float(float value) {
    return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}
#else
inline float float_of_f16(uint16_t value) {
    uint32_t sign = uint32_t(value & 0x8000) << 16, exponent = (value >> 10) & 31, mantissa = value & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7F800000u | (mantissa << 13));
    if (exponent) return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
    float tiny = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -tiny : tiny;
}
inline uint16_t f16_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000;
    float size = std::fabs(value);
    if (!(size == size)) return uint16_t(sign | 0x7E00);
    if (size >= 65520.0f) return uint16_t(sign | 0x7C00);
    if (size < 6.103515625e-5f) return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
    bits &= 0x7FFFFFFF;
    bits += 0xFFF + ((bits >> 13) & 1);
    return uint16_t(sign | ((bits >> 13) - (112u << 10)));
}
#endif

#if defined(__AVX512F__)

constexpr int WIDTH = 16;  // floats in a vector
constexpr int ROWS = 8;    // most rows that are multiplied together
constexpr int SUMS = 16;   // sums that are kept in registers meanwhile
using Vector = __m512;

inline Vector fill(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline float sum(Vector value) { return _mm512_reduce_add_ps(value); }
// The sums of 16 vectors, each added up in the same order.
WITHIN inline Vector sums_of_16(const Vector (&v)[16]) {
    Vector a[8], b[4], c[2];
    each<8>([&](auto i) WITHIN {
        a[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    });
    each<4>([&](auto i) WITHIN {
        const __m512d one = _mm512_castps_pd(a[2 * i]), other = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    });
    each<2>([&](auto i) WITHIN {
        c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xEE));
    });
    return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
}
// out[i] = the sum of the i-th of `count` vectors, 16 at most; vectors from `count` on are anything.
WITHIN inline void sum_each(const Vector (&vectors)[16], int count, float* out) {
    _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), sums_of_16(vectors));
}
// The same, but each added up in the order of `sum`.
inline void sum_every(const Vector (&vectors)[16], int count, float* out) {
    Vector a[8], b[4];
    for (int i = 0; i < 8; ++i) {
        const Vector one = vectors[i], other = vectors[i + 8];
        a[i] = add(_mm512_shuffle_f32x4(one, other, 0x44), _mm512_shuffle_f32x4(one, other, 0xEE));
    }
    for (int i = 0; i < 4; ++i)  // vectors i, i + 8, i + 4, i + 12
        b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
    for (int i = 0; i < 2; ++i) {
        const __m512d one = _mm512_castps_pd(b[i]), other = _mm512_castps_pd(b[i + 2]);
        a[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    }
    const Vector all = add(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), _mm512_permutexvar_ps(order, all));
}
inline Vector load(const uint16_t* from, bool bf16) {
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (!bf16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vector load(const int8_t* from) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// 16 bytes -> the codes in their low and in their high halves, less 8.
struct Nibbles {
    const Vector values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    inline void load(const uint8_t* from, Vector& low, Vector& high) const {
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        low = _mm512_permutexvar_ps(codes, values);  // looks at the low four bits only
        high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
    }
};
// WIDTH pairs of bf16, scale and zero.
inline void load_pairs(const uint16_t* from, Vector& scale, Vector& zero) {
    __m512i pairs = _mm512_loadu_si512(from);
    scale = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    zero = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000))));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int WIDTH = 8;
constexpr int ROWS = 4;
constexpr int SUMS = 8;
using Vector = __m256;

inline Vector fill(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline float sum(Vector value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Vector load(const uint16_t* from, bool bf16) {
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (!bf16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vector load(const int8_t* from) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
struct Nibbles {
    const __m256i mask = _mm256_set1_epi32(15);
    const Vector middle = _mm256_set1_ps(8);
    inline void load(const uint8_t* from, Vector& low, Vector& high) const {
        __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        low = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(codes, mask)), middle);
        high = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4)), middle);
    }
};
inline void load_pairs(const uint16_t* from, Vector& scale, Vector& zero) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    scale = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    zero = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000))));
}

#else

constexpr int WIDTH = 8;
constexpr int ROWS = 4;
constexpr int SUMS = 8;
struct Vector {
    float lane[WIDTH];
};
#define LANES for (int i = 0; i < WIDTH; ++i)

inline Vector fill(float value) { Vector out; LANES out.lane[i] = value; return out; }
inline Vector load(const float* from) { Vector out; LANES out.lane[i] = from[i]; return out; }
inline void store(float* to, Vector value) { LANES to[i] = value.lane[i]; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { LANES c.lane[i] += a.lane[i] * b.lane[i]; return c; }
inline Vector add(Vector a, Vector b) { LANES a.lane[i] += b.lane[i]; return a; }
inline Vector multiply(Vector a, Vector b) { LANES a.lane[i] *= b.lane[i]; return a; }
inline Vector larger(Vector a, Vector b) { LANES a.lane[i] = b.lane[i] > a.lane[i] ? b.lane[i] : a.lane[i]; return a; }
inline float sum(Vector value) {
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) value.lane[i] += value.lane[i + half];
    return value.lane[0];
}
inline Vector load(const uint16_t* from, bool bf16) {
    Vector out;
    if (bf16) LANES out.lane[i] = float_of_bf16(from[i]);
    else LANES out.lane[i] = float_of_f16(from[i]);
    return out;
}
inline Vector load(const int8_t* from) { Vector out; LANES out.lane[i] = from[i]; return out; }
struct Nibbles {
    inline void load(const uint8_t* from, Vector& low, Vector& high) const {
        LANES low.lane[i] = float(from[i] & 15) - 8;
        LANES high.lane[i] = float(from[i] >> 4) - 8;
    }
};
inline void load_pairs(const uint16_t* from, Vector& scale, Vector& zero) {
    LANES scale.lane[i] = float_of_bf16(from[2 * i]);
    LANES zero.lane[i] = float_of_bf16(from[2 * i + 1]);
}
#undef LANES

#endif

#if !defined(__AVX512F__)
inline void sum_each(const Vector (&vectors)[16], int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = sum(vectors[i]);
}
inline void sum_every(const Vector (&vectors)[16], int count, float* out) { sum_each(vectors, count, out); }
#endif

// totals[r * C + c] = the sum of sums[r][c]; a copy, so that the sums stay in registers until here.
template <int R, int C>
WITHIN inline void add_up(const Vector (&sums)[R][C], float* totals) {
    static_assert(R * C <= 16, "as many as sum_each takes");
    Vector all[16];
    each<16>([&](auto i) WITHIN {
        if constexpr (i < R * C) all[i] = sums[i / C][i % C];
        else all[i] = fill(0);
    });
    sum_each(all, R * C, totals);
}

// Keeps a value in a register, where the compiler would rather load it again for each use.
template <typename Value>
inline void hold(Value& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    asm("" : "+x"(value));
#else
    (void)value;
#endif
}

// One element, and a vector of elements from the first, of an array of a type.
template <Type T>
struct Stored;
template <>
struct Stored<F32> {
    using Element = float;
    static inline Vector vector(const float* from) { return load(from); }
    static inline float one(float value) { return value; }
    static inline float kept(float value) { return value; }
};
template <>
struct Stored<BF16> {
    using Element = uint16_t;
    static inline Vector vector(const uint16_t* from) { return load(from, true); }
    static inline float one(uint16_t value) { return float_of_bf16(value); }
    static inline uint16_t kept(float value) { return uint16_t(bits_of_float(value) >> 16); }
};
template <>
struct Stored<F16> {
    using Element = uint16_t;
    static inline Vector vector(const uint16_t* from) { return load(from, false); }
    static inline float one(uint16_t value) { return float_of_f16(value); }
    static inline uint16_t kept(float value) { return f16_of_float(value); }
};
template <>
struct Stored<INT8> {
    using Element = int8_t;
    static inline Vector vector(const int8_t* from) { return load(from); }
    static inline float one(int8_t value) { return float(value); }
};

// The value that a type can hold, as a float: where torch would have stored it in between.
template <Type T>
inline float rounded(float value) {
    if (T == BF16) return round_bf16(value);
    if (T == F16) return float_of_f16(f16_of_float(value));
    return value;
}

inline void round_all(float* values, int count, int32_t type) {
    if (type == BF16) {
        for (int i = 0; i < count; ++i) values[i] = rounded<BF16>(values[i]);
    } else if (type == F16) {
        for (int i = 0; i < count; ++i) values[i] = rounded<F16>(values[i]);
    }
}

// Of one value at least; anything if one is NaN.
inline float largest_of(const float* values, int64_t count) {
    float largest = values[0], lanes[WIDTH];
    int64_t i = 0;
    if (count >= WIDTH) {
        Vector found = load(values);
        for (; i + WIDTH <= count; i += WIDTH) found = larger(found, load(values + i));
        store(lanes, found);
        for (float one : lanes) largest = std::max(largest, one);
    }
    for (; i < count; ++i) largest = std::max(largest, values[i]);
    return largest;
}

// e to the power of a value of at most 88; below -87 it is 0. Within 2e-7 of the true one. Loops of it are vectorised.
inline float exponential(float value) {
    float bounded = value < -87.0f ? -87.0f : (value > 88.0f ? 88.0f : value);
    float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // the integer lies in the lowest bits
    float whole = shifted - 12582912.0f;
    float rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    uint32_t exponent = (bits_of_float(shifted) - 0x4B400000u + 127u) << 23;
    return value < -87.0f ? 0.0f : power * float_of_bits(exponent);
}
