// One decoding step of a Llama- or Glm-like decoder for a few rows, all of it: embedding, layers, head.
//
// Between two operations the values are rounded to the dtype in which torch would have stored them. Threads share the
// channels of each product and the heads of each row's attention; what is small (norms, residuals) every thread
// computes for itself, which takes less time than to wait for another.

#include <atomic>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#define GIVE_WAY sched_yield()
#else
#define GIVE_WAY
#endif

#include "attention.h"
#include "products.h"

namespace {

// Threads that work on one step meet here. They wait awake for a little while, then let others have the core.
class Meeting {
public:
    explicit Meeting(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; round_.load(std::memory_order_acquire) == round; ++tries) {
            if (tries < 4000) {
#if defined(__x86_64__) || defined(__i386__)
                __builtin_ia32_pause();
#endif
            } else {
                GIVE_WAY;
            }
        }
    }

private:
    const int threads_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

struct Shared {  // [rows, …] each
    float *query, *key, *value, *attended, *inner, *product;
};

struct Own {  // one thread's
    Room<float> hidden, normed, gate;
    Inputs inputs;
    Scratch attention;
};

// x [rows, width] -> out [rows, width]
template <Type T>
void normalise(const Model& model, const float* weight, const float* x, float* out, int rows) {
    const int width = model.width;
    for (int r = 0; r < rows; ++r, x += width, out += width) {
        Vector squares = fill(0);
        int k = 0;
        for (; k + WIDTH <= width; k += WIDTH) squares = multiply_add(load(x + k), load(x + k), squares);
        float total = sum(squares);
        for (; k < width; ++k) total += x[k] * x[k];
        const float factor = 1.0f / std::sqrt(total / float(width) + model.epsilon);
        for (int i = 0; i < width; ++i) out[i] = rounded<T>(rounded<T>(x[i] * factor) * weight[i]);
    }
}

// The thread's share of a product: [rows, y_stride], rounded to the model's dtype, but for logits.
void multiply_share(const Linear& linear, const Model& model, Inputs& inputs, float* y, int y_stride, int thread,
                    int threads) {
    inputs.prepare(linear);
    const int units = units_of(linear), from = units * thread / threads, to = units * (thread + 1) / threads;
    for (int unit = from; unit < to; ++unit) multiply_unit(linear, unit, inputs, y, y_stride);
    const int first = from * UNIT, end = std::min(to * UNIT, linear.out);
    for (int r = 0; r < inputs.rows; ++r) {
        finish(linear, y + int64_t(r) * y_stride, first, end);
        if (linear.given != model.dtype && &linear != &model.head)
            round_all(y + int64_t(r) * y_stride + first, end - first, model.dtype);
    }
}

template <Type T>
void embed(const Model& model, int64_t token, float* hidden) {
    const int width = model.width;
    const int64_t first = token * width;
    if (model.embedding_type == F32) {
        const auto* from = static_cast<const float*>(model.embedding) + first;
        std::copy(from, from + width, hidden);
    } else if (model.embedding_type == INT8) {
        const auto* from = static_cast<const int8_t*>(model.embedding) + first;
        const float scale = float_of_bf16(static_cast<const uint16_t*>(model.embedding_scale)[token]);
        for (int i = 0; i < width; ++i) hidden[i] = float(from[i]) * scale;
    } else {
        const auto* from = static_cast<const uint16_t*>(model.embedding) + first;
        const bool half = model.embedding_type == F16;
        for (int i = 0; i < width; ++i) hidden[i] = half ? float_of_f16(from[i]) : float_of_bf16(from[i]);
    }
    round_all(hidden, width, model.embedding_given);
    round_all(hidden, width, T);
}

// hidden += product, through a norm where there is one; normed is overwritten.
template <Type T>
void add_product(const Model& model, const float* norm, const float* product, float* hidden, float* normed, int rows) {
    if (norm) {
        normalise<T>(model, norm, product, normed, rows);
        product = normed;
    }
    const int count = rows * model.width;
    for (int i = 0; i < count; ++i) hidden[i] = rounded<T>(hidden[i] + product[i]);
}

template <Type T>
void gate_and_up(const Layer& layer, const Model& model, float* inner, Own& own, int thread, int threads) {
    const int rows = own.inputs.rows;
    float* gate = own.gate.take(int64_t(rows) * model.inner);
    multiply_share(layer.gate, model, own.inputs, gate, model.inner, thread, threads);
    multiply_share(layer.up, model, own.inputs, inner, model.inner, thread, threads);
    const int units = units_of(layer.gate);
    const int from = units * thread / threads * UNIT, to = std::min(units * (thread + 1) / threads * UNIT, model.inner);
    for (int r = 0; r < rows; ++r) {
        const float* one = gate + int64_t(r) * model.inner;
        float* up = inner + int64_t(r) * model.inner;
        for (int i = from; i < to; ++i) up[i] = rounded<T>(up[i] * rounded<T>(one[i] / (1.0f + exponential(-one[i]))));
    }
}

template <Type T>
void work(const Model& model, const Row* rows, int count, float* logits, const Shared& shared, Meeting& meeting,
          int thread, int threads) {
    const int width = model.width, wide = model.heads * model.head_width, narrow = model.key_heads * model.head_width;
    thread_local Own own;  // kept: the next step needs as much room
    float* hidden = own.hidden.take(int64_t(count) * width);
    float* normed = own.normed.take(int64_t(count) * width);
    Inputs& inputs = own.inputs;
    for (int r = 0; r < count; ++r) embed<T>(model, rows[r].token, hidden + int64_t(r) * width);
    for (int l = 0; l < model.layers; ++l) {
        const Layer& layer = model.layer[l];
        normalise<T>(model, layer.before_attention, hidden, normed, count);
        inputs.begin(normed, count, width, model.dtype);
        multiply_share(layer.query, model, inputs, shared.query, wide, thread, threads);
        multiply_share(layer.key, model, inputs, shared.key, narrow, thread, threads);
        multiply_share(layer.value, model, inputs, shared.value, narrow, thread, threads);
        meeting.wait();
        const int tasks = count * model.heads;
        attend_share<T>(model, rows, l, tasks * thread / threads, tasks * (thread + 1) / threads, shared.query,
                        shared.key, shared.value, shared.attended, own.attention);
        meeting.wait();
        inputs.begin(shared.attended, count, wide, model.dtype);
        multiply_share(layer.out, model, inputs, shared.product, width, thread, threads);
        meeting.wait();
        add_product<T>(model, layer.after_attention, shared.product, hidden, normed, count);
        normalise<T>(model, layer.before_mlp, hidden, normed, count);
        inputs.begin(normed, count, width, model.dtype);
        gate_and_up<T>(layer, model, shared.inner, own, thread, threads);
        meeting.wait();
        inputs.begin(shared.inner, count, model.inner, model.dtype);
        multiply_share(layer.down, model, inputs, shared.product, width, thread, threads);
        meeting.wait();
        add_product<T>(model, layer.after_mlp, shared.product, hidden, normed, count);
    }
    normalise<T>(model, model.norm, hidden, normed, count);
    inputs.begin(normed, count, width, model.dtype);
    multiply_share(model.head, model, inputs, logits, model.vocabulary, thread, threads);
}

}  // namespace

extern "C" {

// Appends one token to each row. logits [count, vocabulary], rounded to what the head gives.
void labkit_step(const Model* model, const Row* rows, int32_t count, float* logits, int32_t threads) {
    const int64_t wide = int64_t(count) * model->heads * model->head_width;
    const int64_t narrow = int64_t(count) * model->key_heads * model->head_width;
    const int64_t inner = int64_t(count) * model->inner, width = int64_t(count) * model->width;
    thread_local Room<float> room;
    Shared shared;
    shared.query = room.take(2 * wide + 2 * narrow + inner + width);
    shared.attended = shared.query + wide;
    shared.key = shared.attended + wide;
    shared.value = shared.key + narrow;
    shared.inner = shared.value + narrow;
    shared.product = shared.inner + inner;
    const auto one = model->dtype == F32 ? work<F32> : model->dtype == BF16 ? work<BF16> : work<F16>;
    Meeting* meeting = nullptr;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) shared(meeting, shared)
    {
#pragma omp single
        meeting = new Meeting(omp_get_num_threads());
        one(*model, rows, count, logits, shared, *meeting, omp_get_thread_num(), omp_get_num_threads());
    }
#else
    meeting = new Meeting(1);
    one(*model, rows, count, logits, shared, *meeting, 0, 1);
#endif
    delete meeting;
}

// y [rows, N] = x [rows, K] times one weight: for tests and for measuring.
void labkit_multiply(const Linear* linear, const float* x, int32_t rows, float* y, int32_t threads) {
    Model model{};
    model.dtype = linear->given;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        Inputs inputs;
        inputs.begin(x, rows, linear->in, model.dtype);
#ifdef _OPENMP
        multiply_share(*linear, model, inputs, y, linear->out, omp_get_thread_num(), omp_get_num_threads());
#else
        multiply_share(*linear, model, inputs, y, linear->out, 0, 1);
#endif
    }
}

// values [K, N] of a type = an int4 weight, dequantized and turned over.
void labkit_dequantize(const Linear* linear, void* values, int32_t type, int32_t threads) {
    const int blocks = linear->out / linear->block;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads)
#endif
    for (int block = 0; block < blocks; ++block) {
        if (type == F32) dequantize_block<F32>(*linear, block, static_cast<float*>(values), linear->out);
        if (type == BF16) dequantize_block<BF16>(*linear, block, static_cast<uint16_t*>(values), linear->out);
        if (type == F16) dequantize_block<F16>(*linear, block, static_cast<uint16_t*>(values), linear->out);
    }
}

// The largest of each row [count, width] and its place, the first of several; NaN and its place if there is one.
void labkit_largest(const float* rows, int32_t count, int32_t width, float* values, int64_t* places) {
    for (int r = 0; r < count; ++r, rows += width) {
        int strange = 0, place = 0;
        for (int i = 0; i < width; ++i) strange |= rows[i] != rows[i];
        const float largest = strange ? NAN : largest_of(rows, width);
        while (strange ? rows[place] == rows[place] : rows[place] != largest) ++place;
        values[r] = largest;
        places[r] = place;
    }
}

int32_t labkit_vector_width() { return WIDTH; }
}
