// One decoding step of a Llama- or Glm-like decoder for a few rows, all of it: embedding, layers, head.
//
// Between two operations the values are rounded to the dtype in which torch would have stored them. Threads share the
// channels of each product and the heads of each row's attention; what is small (norms, residuals) every thread
// computes for itself, which takes less time than to wait for another.

#include <atomic>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#define GIVE_WAY sched_yield()
#else
#define GIVE_WAY
#endif

#include "products.h"

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

struct Shared {
    std::vector<float> query, key, value, attended, inner, product;
};

struct Own {  // one thread's
    std::vector<float> hidden, normed, sums, scores;
    Halves halves;
};

// x [rows, width] -> normed [rows, width]
void normalise(const Model& model, const float* weight, const float* x, float* out, int rows) {
    const int width = model.width;
    for (int r = 0; r < rows; ++r, x += width, out += width) {
        Vector squares = fill(0);
        int k = 0;
        for (; k + WIDTH <= width; k += WIDTH) squares = multiply_add(load(x + k), load(x + k), squares);
        float total = sum(squares);
        for (; k < width; ++k) total += x[k] * x[k];
        const float factor = 1.0f / std::sqrt(total / float(width) + model.epsilon);
        for (int i = 0; i < width; ++i) out[i] = x[i] * factor;
        round_all(out, width, model.dtype);
        for (int i = 0; i < width; ++i) out[i] *= weight[i];
        round_all(out, width, model.dtype);
    }
}

// What a product needs of its inputs: x itself or a copy in the type it takes, and INT4's sums of each group.
const float* prepared(const Linear& linear, const Model& model, const float* x, int rows, Own& own,
                      std::vector<float>& copy) {
    const int64_t count = int64_t(rows) * linear.in;
    if (linear.taken != model.dtype && linear.taken != F32) {
        copy.assign(x, x + count);
        round_all(copy.data(), int(count), linear.taken);
        x = copy.data();
    }
    if (linear.type == INT4) {
        const int64_t groups = count / linear.group;
        if (int64_t(own.sums.size()) < groups) own.sums.resize(groups);
        for (int64_t g = 0; g < groups; ++g) {
            const float* from = x + g * linear.group;
            Vector total = fill(0);
            for (int k = 0; k < linear.group; k += WIDTH) total = add(total, load(from + k));
            own.sums[g] = sum(total);
        }
    }
    return x;
}

// The thread's share of a product: x [rows, K] -> y [rows, y_stride], rounded to the model's dtype, but for logits.
void multiply_share(const Linear& linear, const Model& model, const float* x, int rows, float* y, int y_stride,
                    Own& own, int thread, int threads) {
    std::vector<float> copy;
    x = prepared(linear, model, x, rows, own, copy);
    const int units = units_of(linear), from = units * thread / threads, to = units * (thread + 1) / threads;
    const bool pairs = takes_pairs(linear, model.dtype);
    if (pairs) own.halves.take(x, rows, linear.in);
    for (int unit = from; unit < to; ++unit)
        multiply_unit(linear, unit, x, pairs ? &own.halves : nullptr, rows, own.sums.data(), y, y_stride);
    const int first = from * UNIT, end = std::min(to * UNIT, linear.out);
    for (int r = 0; r < rows; ++r) {
        finish(linear, y + int64_t(r) * y_stride, first, end);
        if (linear.given != model.dtype && &linear != &model.head)
            round_all(y + int64_t(r) * y_stride + first, end - first, model.dtype);
    }
}

void rotate(const Model& model, const Row& row, const float* from, float* to) {
    const int half = model.rotary / 2, type = model.dtype;
    std::copy(from, from + model.head_width, to);
    for (int i = 0; i < half; ++i) {
        const int a = model.interleaved ? 2 * i : i, b = model.interleaved ? 2 * i + 1 : i + half;
        to[a] = rounded(rounded(from[a] * row.cosine[a], type) + rounded(-from[b] * row.sine[a], type), type);
        to[b] = rounded(rounded(from[b] * row.cosine[b], type) + rounded(from[a] * row.sine[b], type), type);
    }
}

// One head of one row: rotates, stores the new key and value (the first head of each group), attends.
template <Type T>
void attend(const Model& model, const Row& row, int layer, int head, const float* query, const float* key,
            const float* value, float* out, std::vector<float>& scores) {
    using S = Stored<T>;
    using Element = typename S::Element;
    const int width = model.head_width, shared = model.heads / model.key_heads, key_head = head / shared;
    const int64_t length = row.length;
    std::vector<float> turned(2 * width);
    float *q = turned.data(), *k = q + width;
    rotate(model, row, query + head * width, q);
    rotate(model, row, key + key_head * width, k);
    const float* v = value + key_head * width;
    Element* keys = static_cast<Element*>(row.keys[layer]) + key_head * row.room * width;
    Element* values = static_cast<Element*>(row.values[layer]) + key_head * row.room * width;
    if (head % shared == 0)
        for (int i = 0; i < width; ++i) {
            keys[length * width + i] = S::kept(k[i]);
            values[length * width + i] = S::kept(v[i]);
        }
    if (int64_t(scores.size()) <= length) scores.resize(length + 256);
    float largest = 0;
    for (int i = 0; i < width; ++i) largest += q[i] * k[i];
    largest *= model.scaling;
    scores[length] = largest;
    for (int64_t t = 0; t < length; ++t) {
        const Element* at = keys + t * width;
        Vector total = fill(0);
        int i = 0;
        for (; i + WIDTH <= width; i += WIDTH) total = multiply_add(load(q + i), S::vector(at + i), total);
        float score = sum(total);
        for (; i < width; ++i) score += q[i] * S::one(at[i]);
        scores[t] = score * model.scaling;
        largest = std::max(largest, scores[t]);
    }
    for (int64_t t = 0; t <= length; ++t) scores[t] = exponential(scores[t] - largest);
    float total = 0;
    for (int64_t t = 0; t <= length; ++t) total += scores[t];
    const float share = 1.0f / total;
    round_all(scores.data(), int(length) + 1, model.dtype);  // as torch's attention passes them on
    int i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        Vector mean = multiply(fill(scores[length]), load(v + i));
        for (int64_t t = 0; t < length; ++t)
            mean = multiply_add(fill(scores[t]), S::vector(values + t * width + i), mean);
        store(out + head * width + i, multiply(mean, fill(share)));
    }
    for (; i < width; ++i) {
        float mean = scores[length] * v[i];
        for (int64_t t = 0; t < length; ++t) mean += scores[t] * S::one(values[t * width + i]);
        out[head * width + i] = mean * share;
    }
    round_all(out + head * width, width, model.dtype);
}

void embed(const Model& model, int64_t token, float* hidden) {
    const int width = model.width;
    const int64_t first = token * width;
    for (int i = 0; i < width; ++i) {
        if (model.embedding_type == F32) hidden[i] = static_cast<const float*>(model.embedding)[first + i];
        if (model.embedding_type == BF16)
            hidden[i] = float_of_bf16(static_cast<const uint16_t*>(model.embedding)[first + i]);
        if (model.embedding_type == F16)
            hidden[i] = float_of_f16(static_cast<const uint16_t*>(model.embedding)[first + i]);
        if (model.embedding_type == INT8)
            hidden[i] = float(static_cast<const int8_t*>(model.embedding)[first + i]) *
                        float_of_bf16(static_cast<const uint16_t*>(model.embedding_scale)[token]);
    }
    round_all(hidden, width, model.embedding_given);
    round_all(hidden, width, model.dtype);
}

// hidden += product, through a norm where there is one.
void add_product(const Model& model, const float* norm, const float* product, Own& own, int rows) {
    if (norm) {
        normalise(model, norm, product, own.normed.data(), rows);
        product = own.normed.data();
    }
    const int count = rows * model.width;
    for (int i = 0; i < count; ++i) own.hidden[i] += product[i];
    round_all(own.hidden.data(), count, model.dtype);
}

void gate_and_up(const Layer& layer, const Model& model, const float* x, int rows, float* inner, Own& own, int thread,
                 int threads) {
    std::vector<float> gate(int64_t(rows) * model.inner), copy;
    multiply_share(layer.gate, model, x, rows, gate.data(), model.inner, own, thread, threads);
    multiply_share(layer.up, model, x, rows, inner, model.inner, own, thread, threads);
    const int units = units_of(layer.gate);
    const int from = units * thread / threads * UNIT, to = std::min(units * (thread + 1) / threads * UNIT, model.inner);
    for (int r = 0; r < rows; ++r) {
        float* one = gate.data() + int64_t(r) * model.inner;
        float* up = inner + int64_t(r) * model.inner;
        for (int i = from; i < to; ++i) one[i] = one[i] / (1.0f + exponential(-one[i]));
        round_all(one + from, to - from, model.dtype);
        for (int i = from; i < to; ++i) up[i] *= one[i];
        round_all(up + from, to - from, model.dtype);
    }
}

void work(const Model& model, const Row* rows, int count, float* logits, Shared& shared, Meeting& meeting, int thread,
          int threads) {
    const int width = model.width, wide = model.heads * model.head_width, narrow = model.key_heads * model.head_width;
    Own own;
    own.hidden.resize(int64_t(count) * width);
    own.normed.resize(int64_t(count) * width);
    for (int r = 0; r < count; ++r) embed(model, rows[r].token, own.hidden.data() + int64_t(r) * width);
    for (int l = 0; l < model.layers; ++l) {
        const Layer& layer = model.layer[l];
        normalise(model, layer.before_attention, own.hidden.data(), own.normed.data(), count);
        const float* x = own.normed.data();
        multiply_share(layer.query, model, x, count, shared.query.data(), wide, own, thread, threads);
        multiply_share(layer.key, model, x, count, shared.key.data(), narrow, own, thread, threads);
        multiply_share(layer.value, model, x, count, shared.value.data(), narrow, own, thread, threads);
        meeting.wait();
        const int tasks = count * model.heads;
        for (int task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
            const int r = task / model.heads, head = task % model.heads;
            const float* query = shared.query.data() + int64_t(r) * wide;
            const float* key = shared.key.data() + int64_t(r) * narrow;
            const float* value = shared.value.data() + int64_t(r) * narrow;
            float* out = shared.attended.data() + int64_t(r) * wide;
            if (model.dtype == F32) attend<F32>(model, rows[r], l, head, query, key, value, out, own.scores);
            if (model.dtype == BF16) attend<BF16>(model, rows[r], l, head, query, key, value, out, own.scores);
            if (model.dtype == F16) attend<F16>(model, rows[r], l, head, query, key, value, out, own.scores);
        }
        meeting.wait();
        multiply_share(layer.out, model, shared.attended.data(), count, shared.product.data(), width, own, thread,
                       threads);
        meeting.wait();
        add_product(model, layer.after_attention, shared.product.data(), own, count);
        normalise(model, layer.before_mlp, own.hidden.data(), own.normed.data(), count);
        gate_and_up(layer, model, own.normed.data(), count, shared.inner.data(), own, thread, threads);
        meeting.wait();
        multiply_share(layer.down, model, shared.inner.data(), count, shared.product.data(), width, own, thread,
                       threads);
        meeting.wait();
        add_product(model, layer.after_mlp, shared.product.data(), own, count);
    }
    normalise(model, model.norm, own.hidden.data(), own.normed.data(), count);
    multiply_share(model.head, model, own.normed.data(), count, logits, model.vocabulary, own, thread, threads);
}

}  // namespace

extern "C" {

// Appends one token to each row. logits [count, vocabulary], rounded to what the head gives.
void labkit_step(const Model* model, const Row* rows, int32_t count, float* logits, int32_t threads) {
    Shared shared;
    shared.query.resize(int64_t(count) * model->heads * model->head_width);
    shared.attended.resize(shared.query.size());
    shared.key.resize(int64_t(count) * model->key_heads * model->head_width);
    shared.value.resize(shared.key.size());
    shared.inner.resize(int64_t(count) * model->inner);
    shared.product.resize(int64_t(count) * model->width);
    Meeting* meeting = nullptr;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) shared(meeting)
    {
#pragma omp single
        meeting = new Meeting(omp_get_num_threads());
        work(*model, rows, count, logits, shared, *meeting, omp_get_thread_num(), omp_get_num_threads());
    }
#else
    meeting = new Meeting(1);
    work(*model, rows, count, logits, shared, *meeting, 0, 1);
#endif
    delete meeting;
}

// y [rows, N] = x [rows, K] times one weight: for tests and for measuring.
void labkit_multiply(const Linear* linear, const float* x, int32_t rows, float* y, int32_t threads) {
    Model model{};
    model.dtype = linear->given;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        Own own;
        multiply_share(*linear, model, x, rows, y, linear->out, own, omp_get_thread_num(), omp_get_num_threads());
    }
#else
    Own own;
    multiply_share(*linear, model, x, rows, y, linear->out, own, 0, 1);
#endif
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

int32_t labkit_vector_width() { return WIDTH; }
}
