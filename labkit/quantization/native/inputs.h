// The inputs of a product, in the forms that products take.

#pragma once

#include <memory>
#include <type_traits>

#include "linear.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
constexpr bool PAIRED = true;  // the processor multiplies two bf16 inputs at a time: pairs.h
#else
constexpr bool PAIRED = false;
#endif
constexpr int PAIRS = 32;  // inputs in a vector of bf16

// Whether a weight is multiplied so, for activations of the type `dtype`.
inline bool takes_pairs(const Linear& linear, int32_t dtype) {
    if (!PAIRED || dtype != BF16) return false;
    return linear.type == BF16 || linear.type == INT8 || (linear.type == INT4 && linear.block == 64);
}

// Calls take(R, row) for each ROWS rows, and for those that are left: R is a number that the compiler knows.
template <int R, typename Take>
inline void take_rest(int row, int left, const Take& take) {
    if (left == R) take(std::integral_constant<int, R>(), row);
    else if constexpr (R > 1) take_rest<R - 1>(row, left, take);
}

template <int MOST, typename Take>
inline void by_rows(int rows, const Take& take) {
    int row = 0;
    for (; row + MOST <= rows; row += MOST) take(std::integral_constant<int, MOST>(), row);
    if constexpr (MOST > 1) take_rest<MOST - 1>(row, rows - row, take);
}

// Channels that R rows are multiplied by at a time: all sums stay in registers.
constexpr int channels_for(int rows) {
    int channels = SUMS;
    while (channels * rows > SUMS) channels /= 2;
    return channels;
}

// Room for numbers that are written before they are read; it begins where a line of the cache does, so that no vector
// lies across two.
template <typename Element>
class Room {
public:
    Element* take(int64_t count) {
        if (count > count_) {
            constexpr int64_t LINE = 64 / sizeof(Element);
            values_.reset(new Element[count + LINE]);
            count_ = count;
            const auto place = reinterpret_cast<uintptr_t>(values_.get());
            first_ = values_.get() + (64 - place % 64) % 64 / sizeof(Element);
        }
        return first_;
    }
    Element* data() const { return first_; }

private:
    std::unique_ptr<Element[]> values_;
    Element* first_ = nullptr;
    int64_t count_ = 0;
};

// Rows that are multiplied together, one piece of each after another: [K / piece, rows, piece] for each ROWS rows, filled up
// with zeros. So what a product reads lies together, and the rows do not push each other out of the nearest cache.
template <Type T>
class Pieces {
public:
    using Element = typename Stored<T>::Element;

    void take(const float* x, int rows, int width, int piece) {
        inputs_ = (width + piece - 1) / piece * piece;
        Element* first = values_.take(int64_t(rows) * inputs_);
        for (int r = 0; r < rows; ++r, x += width) {
            const int before = r / ROWS * ROWS, together = std::min(ROWS, rows - before);
            Element* to = first + int64_t(before) * inputs_ + (r - before) * piece;
            for (int k = 0; k < width; k += piece, to += together * piece) {
                const int count = std::min(piece, width - k);
                for (int i = 0; i < count; ++i) to[i] = Stored<T>::kept(x[k + i]);
                for (int i = count; i < piece; ++i) to[i] = 0;
            }
        }
    }
    // Of the rows from `row` on, a multiple of ROWS.
    const Element* from(int row) const { return values_.data() + int64_t(row) * inputs_; }

private:
    Room<Element> values_;
    int inputs_ = 0;  // filled up
};

// The inputs of one product or of several: x [rows, K] in values of `dtype`. Each form is made when it is first asked for.
class Inputs {
public:
    int rows = 0;
    const float* plain = nullptr;  // [rows, K], in the type that the weight takes
    const float* sums = nullptr;   // INT4: of each group, [rows, K / group]

    void begin(const float* x, int count, int width, int32_t dtype) {
        plain = x_ = x;
        rows = count;
        width_ = width;
        type_ = dtype_ = dtype;
        group_ = halved_ = 0;
        pieced_ = false;
    }

    // Makes what a product with this weight reads.
    void prepare(const Linear& linear) {
        const int32_t type = linear.taken == F32 ? dtype_ : linear.taken;
        if (type != type_) {
            begin(x_, rows, width_, dtype_);
            type_ = type;
            float* copy = copy_.take(int64_t(rows) * width_);
            std::copy(x_, x_ + int64_t(rows) * width_, copy);
            round_all(copy, rows * width_, type);
            plain = copy;
        }
        if (linear.type == INT4 && linear.group != group_) add_up_groups(linear.group);
        if (takes_pairs(linear, dtype_)) {
            const int piece = linear.type == INT4 ? width_ : PAIRS;
            if (piece != halved_) halves_.take(plain, rows, width_, halved_ = piece);
        } else if (linear.type != INT4 && rows > 1 && !pieced_) {
            floats_.take(plain, rows, width_, WIDTH);
            pieced_ = true;
        }
    }

    bool pairs(const Linear& linear) const { return takes_pairs(linear, dtype_); }
    // Pieces of WIDTH floats; of PAIRS bf16 or, for INT4, whole rows.
    const float* floats(int row) const { return rows > 1 ? floats_.from(row) : plain; }
    const uint16_t* halves(int row) const { return halves_.from(row); }

private:
    void add_up_groups(int group) {
        const int64_t groups = int64_t(rows) * width_ / group;
        float* to = sums_.take(groups);
        for (int64_t g = 0; g < groups; ++g) {
            const float* from = plain + g * group;
            Vector total = fill(0);
            for (int k = 0; k < group; k += WIDTH) total = add(total, load(from + k));
            to[g] = sum(total);
        }
        sums = to;
        group_ = group;
    }

    const float* x_ = nullptr;
    int width_ = 0, group_ = 0, halved_ = 0;
    int32_t dtype_ = F32, type_ = F32;
    bool pieced_ = false;
    Room<float> copy_, sums_;
    Pieces<F32> floats_;
    Pieces<BF16> halves_;
};
