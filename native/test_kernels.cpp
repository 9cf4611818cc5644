// Tests and measures the kernels without a model: `test_kernels` checks those of each instruction set
// that this processor has against float64, `test_kernels only SET` those of one, for which it does not
// ask the processor (a space in the name is a _ there).
// `test_kernels rate [TYPE]` prints their speed as JSON lines. ggml's own functions make the weights and
// read them back.

#include "kernels.h"

#include "ggml.h"

#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iterator>
#include <random>
#include <string>
#include <vector>

using namespace gguf_embed;

namespace {

int failures = 0;
uint64_t digest = 0;  // of all results; sets with vectors of one length give the same bits

void digest_of(const std::vector<float> & results) {
    for (const float x : results) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        digest = (digest ^ bits) * 0x100000001b3;  // FNV
    }
}

#define CHECK(what, ...)                                     \
    do {                                                     \
        if (!(what)) {                                       \
            failures++;                                      \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #what); \
            std::printf(__VA_ARGS__);                        \
            std::printf("\n");                               \
        }                                                    \
    } while (0)

struct Format {
    Weight weight;
    ggml_type type;
    double bound;  // of the error of a product, as a share of the lengths of its vectors
};

// The float kernel rounds as float32 does, int16 with one scale for a block gives about 1e-5 where
// weights have that scale as well, and 1e-4 where theirs are made of smaller ones.
const Format formats[] = {
    {Weight::f32, GGML_TYPE_F32, 2e-6},     {Weight::f16, GGML_TYPE_F16, 6e-5},
    {Weight::bf16, GGML_TYPE_BF16, 6e-5},   {Weight::q8_0, GGML_TYPE_Q8_0, 2e-4},
    {Weight::q4_0, GGML_TYPE_Q4_0, 2e-4},   {Weight::q5_0, GGML_TYPE_Q5_0, 2e-4},
    {Weight::q4_k, GGML_TYPE_Q4_K, 2e-4},   {Weight::q5_k, GGML_TYPE_Q5_K, 2e-4},
    {Weight::q6_k, GGML_TYPE_Q6_K, 2e-4},   {Weight::iq4_nl, GGML_TYPE_IQ4_NL, 2e-4},
    {Weight::iq4_xs, GGML_TYPE_IQ4_XS, 2e-4}, {Weight::other, GGML_TYPE_Q4_1, 2e-4},
    {Weight::other, GGML_TYPE_Q3_K, 2e-4},
};

struct Matrix {
    std::vector<char> bytes;
    std::vector<float> floats;  // what the bytes mean
};

std::vector<float> normal(int64_t n, std::mt19937 & random, float size = 1) {
    std::normal_distribution<float> values(0, size);
    std::vector<float> out(static_cast<size_t>(n));
    for (auto & x : out) x = values(random);
    return out;
}

void to_float(ggml_type type, const void * from, float * to, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(to, from, static_cast<size_t>(n) * 4);
    } else {
        ggml_get_type_traits(type)->to_float(from, to, n);
    }
}

Matrix matrix(const Format & format, int64_t n_rows, int64_t n, std::mt19937 & random) {
    Matrix m;
    m.floats = normal(n_rows * n, random, 0.05f);
    m.bytes.resize(ggml_row_size(format.type, n) * static_cast<size_t>(n_rows));
    const std::vector<float> importance(static_cast<size_t>(n), 1.0f);
    if (format.type == GGML_TYPE_F32) {
        std::memcpy(m.bytes.data(), m.floats.data(), m.bytes.size());
    } else {
        ggml_quantize_chunk(format.type, m.floats.data(), m.bytes.data(), 0, n_rows, n, importance.data());
    }
    to_float(format.type, m.bytes.data(), m.floats.data(), n_rows * n);
    return m;
}

// A product with all that it points to.
struct Job {
    Matrix weights;
    std::vector<float> x, out, bias, residual;
    std::vector<RowBlock> blocks;
    std::vector<char> quantized, scratch;
    Product product{};

    int16_t * aligned_rows() { return reinterpret_cast<int16_t *>(aligned(quantized)); }
    char * aligned_scratch() { return aligned(scratch); }

  private:
    static char * aligned(std::vector<char> & v) { return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64; }
};

void quantize(Job & job, const Kernels & kernels) {
    auto & p = job.product;
    if (!kernels.is_integer(p.type)) return;
    kernels.quantize_rows(p.x, p.x_stride, p.n_rows, p.n_inner, p.block, 0, p.n_rows, job.aligned_rows(), job.blocks.data());
}

void multiply(Job & job, const Kernels & kernels) {
    for (int64_t strip = 0; strip * kernels.columns < job.product.n_columns; strip++) {
        kernels.product(job.product, strip, job.aligned_scratch());
    }
}

// Without weights and rows.
Job empty_job(const Format & format, int64_t n_rows, int64_t n_columns, int64_t n_inner, const Kernels & kernels) {
    Job j;
    auto & p = j.product;
    p.type = format.weight;
    p.row_bytes = ggml_row_size(format.type, n_inner);
    if (format.type != GGML_TYPE_F32) p.to_float = ggml_get_type_traits(format.type)->to_float;
    p.n_rows = n_rows;
    p.n_columns = n_columns;
    p.n_inner = n_inner;
    p.block = kernels.block_of(p.type, n_inner);
    p.x_stride = n_inner;
    const auto n_blocks = (n_inner + p.block - 1) / p.block;
    j.quantized.resize(static_cast<size_t>(kernels.quantized_size(n_rows, n_inner, p.block)) * sizeof(int16_t) + 64);
    j.blocks.resize(static_cast<size_t>(n_rows * n_blocks));
    j.out.resize(static_cast<size_t>(n_rows * n_columns));
    p.quantized = j.aligned_rows();
    p.blocks = j.blocks.data();
    p.out = j.out.data();
    p.out_stride = n_columns;
    p.activation = Activation::none;
    j.scratch.resize(kernels.product_scratch(p) + 64);
    return j;
}

Job job(const Format & format, int64_t n_rows, int64_t n_columns, int64_t n_inner, const Kernels & kernels, std::mt19937 & random) {
    Job j = empty_job(format, n_rows, n_columns, n_inner, kernels);
    j.weights = matrix(format, n_columns, n_inner, random);
    j.x = normal(n_rows * n_inner, random);
    j.product.weights = j.weights.bytes.data();
    j.product.x = j.x.data();
    return j;
}

double length(const float * x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += double{x[i]} * x[i];
    return std::sqrt(sum);
}

// Of a result, as a share of the lengths of its two vectors.
double error_of(const Job & j, int64_t row, int64_t column) {
    const int64_t n_inner = j.product.n_inner;
    const float * x = &j.x[static_cast<size_t>(row * n_inner)];
    const float * w = &j.weights.floats[static_cast<size_t>(column * n_inner)];
    double exact = 0;
    for (int64_t i = 0; i < n_inner; i++) exact += double{x[i]} * w[i];
    return std::fabs(j.out[static_cast<size_t>(row * j.product.n_columns + column)] - exact) / (length(x, n_inner) * length(w, n_inner));
}

void test_product(const Kernels & kernels, const Format & format, int64_t n_rows, int64_t n_columns, int64_t n_inner) {
    std::mt19937 random(static_cast<unsigned>(n_rows * 7 + n_columns * 3 + n_inner));
    Job j = job(format, n_rows, n_columns, n_inner, kernels, random);
    quantize(j, kernels);
    multiply(j, kernels);
    digest_of(j.out);
    double worst = 0;
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t column = 0; column < n_columns; column++) {
            worst = std::fmax(worst, error_of(j, row, column));
        }
    }
    CHECK(worst <= format.bound, "%s %ld x %ld x %ld: error %.2e, bound %.0e", ggml_type_name(format.type), n_rows, n_columns,
          n_inner, worst, format.bound);

    // A row alone, to the bit, and what is done on the way out.
    const std::vector<float> together = j.out;
    j.bias = normal(n_columns, random);
    j.residual = normal(n_rows * n_columns, random);
    auto & p = j.product;
    for (int64_t row = 0; row < n_rows; row++) {
        Job alone = empty_job(format, 1, n_columns, n_inner, kernels);
        alone.product.weights = j.weights.bytes.data();
        alone.product.x = &j.x[static_cast<size_t>(row * n_inner)];
        quantize(alone, kernels);
        multiply(alone, kernels);
        CHECK(std::memcmp(alone.out.data(), &together[static_cast<size_t>(row * n_columns)], alone.out.size() * 4) == 0,
              "%s row %ld of %ld differs alone", ggml_type_name(format.type), row, n_rows);
    }
    p.bias = j.bias.data();
    p.residual = j.residual.data();
    p.residual_stride = n_columns;
    p.activation = Activation::gelu;
    multiply(j, kernels);
    for (size_t i = 0; i < together.size(); i++) {
        const double x = double{together[i]} + double{j.bias[i % static_cast<size_t>(n_columns)]};
        const double gelu = 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        CHECK(std::fabs(j.out[i] - (gelu + j.residual[i])) < 2e-6 * (1 + std::fabs(x)), "gelu of %g: %g", x, double{j.out[i]});
    }
}

// Of two products and SwiGLU apart, to the bit.
void test_gate(const Kernels & kernels, const Format & format, int64_t n_rows, int64_t n_columns, int64_t n_inner) {
    std::mt19937 random(static_cast<unsigned>(n_rows + n_columns + n_inner));
    Job up = job(format, n_rows, n_columns, n_inner, kernels, random), gate = job(format, n_rows, n_columns, n_inner, kernels, random);
    gate.product.x = up.product.x;
    for (Job * j : {&up, &gate}) {
        quantize(*j, kernels);
        multiply(*j, kernels);
    }
    std::vector<float> apart(up.out.size());
    kernels.swiglu(gate.out.data(), up.out.data(), apart.data(), static_cast<int64_t>(apart.size()));
    up.product.gate = gate.product.weights;
    up.product.activation = Activation::swiglu;
    up.scratch.resize(kernels.product_scratch(up.product) + 64);
    multiply(up, kernels);
    digest_of(up.out);
    CHECK(up.out == apart, "%s %ld x %ld x %ld: with a gate it is another result", ggml_type_name(format.type), n_rows, n_columns, n_inner);
}

void test_extremes(const Kernels & kernels) {
    const Format & format = formats[3];
    std::mt19937 random(5);
    for (const float size : {0.0f, 1e-30f, 1e-20f, 1e20f, 1e30f}) {
        Job j = job(format, 3, 16, 512, kernels, random);
        for (auto & x : j.x) x *= size;
        j.x[512] = 1000 * size;  // one value far above the others
        quantize(j, kernels);
        multiply(j, kernels);
        for (int row = 0; row < 3; row++) {
            for (int column = 0; column < 16; column++) {
                const float * x = &j.x[static_cast<size_t>(row) * 512];
                const float * w = &j.weights.floats[static_cast<size_t>(column) * 512];
                double exact = 0;
                for (int i = 0; i < 512; i++) exact += double{x[i]} * w[i];
                const double bound = 2e-4 * length(x, 512) * length(w, 512) * 3;
                CHECK(std::fabs(j.out[static_cast<size_t>(row * 16 + column)] - exact) <= bound, "size %g", double{size});
            }
        }
    }
    for (const float value : {NAN, INFINITY}) {
        Job j = job(format, 3, 16, 512, kernels, random);
        j.x[600] = value;
        quantize(j, kernels);
        multiply(j, kernels);
        for (int i = 0; i < 48; i++) {
            CHECK(std::isfinite(j.out[static_cast<size_t>(i)]) == (i / 16 != 1), "%g spreads wrongly to %d", double{value}, i);
        }
    }
    // All values at their largest: sums come closest to 32 bits.
    Job j = job(format, 6, 16, 512, kernels, random);
    for (auto & x : j.x) x = 3;
    for (int column = 0; column < 16; column++) {
        for (int block = 0; block < 16; block++) {
            auto * bytes = reinterpret_cast<signed char *>(&j.weights.bytes[static_cast<size_t>(column * 16 + block) * 34 + 2]);
            for (int i = 0; i < 32; i++) bytes[i] = column % 2 ? -128 : 127;
        }
    }
    to_float(format.type, j.weights.bytes.data(), j.weights.floats.data(), 16 * 512);
    quantize(j, kernels);
    multiply(j, kernels);
    for (int column = 0; column < 16; column++) {
        double exact = 0;
        for (int i = 0; i < 512; i++) exact += 3.0 * j.weights.floats[static_cast<size_t>(column * 512 + i)];
        CHECK(std::fabs(j.out[static_cast<size_t>(column)] / exact - 1) < 1e-3, "largest values: %g, exact %g",
              double{j.out[static_cast<size_t>(column)]}, exact);
    }
}

// A number of a row far above its others, and one of a column, which meet where sums are crossed: an int16
// holds both. The last column has none.
void test_outliers(const Kernels & kernels) {
    const Format & format = formats[1];
    const int64_t n_rows = 26, n_columns = 5, n_inner = 64;
    std::mt19937 random(11);
    for (const float size : {1000.0f, -1000.0f}) {
        Job j = job(format, n_rows, n_columns, n_inner, kernels, random);
        std::vector<ggml_fp16_t> halves(j.weights.floats.size());
        for (int64_t column = 0; column < n_columns - 1; column++) j.weights.floats[static_cast<size_t>(column * n_inner + 8 + column)] = size;
        for (int64_t row = 0; row < n_rows; row++) j.x[static_cast<size_t>(row * n_inner + 8 + row % 4)] = size;
        ggml_fp32_to_fp16_row(j.weights.floats.data(), halves.data(), static_cast<int64_t>(halves.size()));
        ggml_fp16_to_fp32_row(halves.data(), j.weights.floats.data(), static_cast<int64_t>(halves.size()));
        std::memcpy(j.weights.bytes.data(), halves.data(), halves.size() * sizeof(ggml_fp16_t));
        quantize(j, kernels);
        multiply(j, kernels);
        digest_of(j.out);
        for (int64_t row = 0; row < n_rows; row++) {
            for (int64_t column = 0; column < n_columns; column++) {
                const double error = error_of(j, row, column);
                CHECK(error <= 2e-4, "outliers of row %ld and column %ld: %g", row, column, error);
            }
        }
    }
}

// A row sees `window` cells before its own at most.
void test_attention(const Kernels & kernels, int64_t dim, bool half, bool causal, int n, int window = 1000) {
    std::mt19937 random(static_cast<unsigned>(dim + n));
    const int n_heads = 4, n_kv = 2;
    const auto q = normal(int64_t{n} * n_heads * dim, random), k = normal(int64_t{n} * n_kv * dim, random),
               v = normal(int64_t{n} * n_kv * dim, random);
    std::vector<ggml_fp16_t> k16(k.size()), v16(v.size());
    ggml_fp32_to_fp16_row(k.data(), k16.data(), static_cast<int64_t>(k.size()));
    ggml_fp32_to_fp16_row(v.data(), v16.data(), static_cast<int64_t>(v.size()));
    std::vector<float> out(q.size());
    const size_t value = half ? 2 : 4, d = static_cast<size_t>(dim);
    Attention a{};
    a.q = reinterpret_cast<const char *>(q.data());
    a.k = half ? reinterpret_cast<const char *>(k16.data()) : reinterpret_cast<const char *>(k.data());
    a.v = half ? reinterpret_cast<const char *>(v16.data()) : reinterpret_cast<const char *>(v.data());
    a.q_head = d * 4;
    a.q_row = d * 4 * n_heads;
    a.k_head = a.v_head = d * value;
    a.k_row = a.v_row = d * value * n_kv;
    a.k_is_half = a.v_is_half = half;
    a.head_dim = a.value_dim = dim;
    a.heads_per_kv = n_heads / n_kv;
    a.scale = 1 / std::sqrt(static_cast<float>(dim));
    a.out = out.data();
    a.out_head = d;
    a.out_row = d * n_heads;
    const Span spans[] = {{0, n / 2}, {n / 2, n}};
    std::vector<char> scratch(kernels.attention_scratch(a, n) + 64);
    char * const at = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    for (int head = 0; head < n_heads; head++) {
        kernels.gather_cells(a, head / a.heads_per_kv, spans, 2, at);
        for (int first = 0; first < n; first += kernels.query_rows) {
            std::vector<int32_t> rows, hidden, visible;
            for (int i = first; i < n && i < first + kernels.query_rows; i++) {
                rows.push_back(i);
                hidden.push_back(std::max(0, i - window));
                visible.push_back(causal ? i + 1 : n);
            }
            kernels.attend(a, head, rows.data(), static_cast<int>(rows.size()), hidden.data(), visible.data(), nullptr, n, at);
        }
    }
    digest_of(out);
    // Rounding queries and keys to int16 may take no more than half precision takes from keys and values.
    std::vector<float> halved_keys(k.size()), halved_values(v.size());
    ggml_fp16_to_fp32_row(k16.data(), halved_keys.data(), static_cast<int64_t>(k.size()));
    ggml_fp16_to_fp32_row(v16.data(), halved_values.data(), static_cast<int64_t>(v.size()));
    double worst = 0, halves = 0;
    const auto attended = [&](int head, int row, const std::vector<float> & keys, const std::vector<float> & values) {
        const int hidden = std::max(0, row - window), seen = causal ? row + 1 : n, kv = head / (n_heads / n_kv);
        std::vector<double> p(static_cast<size_t>(seen)), result(d);
        double sum = 0;
        const auto cell_at = [&](int cell, size_t i) { return static_cast<size_t>(cell * n_kv + kv) * d + i; };
        for (int cell = hidden; cell < seen; cell++) {
            double s = 0;
            for (size_t i = 0; i < d; i++) {
                s += double{q[static_cast<size_t>(row * n_heads + head) * d + i]} * double{keys[cell_at(cell, i)]};
            }
            sum += p[static_cast<size_t>(cell)] = std::exp(s * double{a.scale});
        }
        for (int cell = hidden; cell < seen; cell++) {
            for (size_t i = 0; i < d; i++) result[i] += p[static_cast<size_t>(cell)] / sum * double{values[cell_at(cell, i)]};
        }
        return result;
    };
    for (int head = 0; head < n_heads; head++) {
        for (int row = 0; row < n; row++) {
            const auto whole = attended(head, row, k, v), halved = attended(head, row, halved_keys, halved_values);
            for (size_t i = 0; i < d; i++) {
                const double found = double{out[static_cast<size_t>(row * n_heads + head) * d + i]};
                worst = std::fmax(worst, std::fabs((half ? halved : whole)[i] - found));
                halves = std::fmax(halves, std::fabs(halved[i] - whole[i]));
            }
        }
    }
    CHECK(worst <= halves / 2, "attention of %d cells, %ld values: error %.2e, of halves %.2e", n, dim, worst, halves);
}

// Queries of zeros: the scores are what is added, and the weights those of a softmax. A cell that is not
// seen has no weight at all.
void test_weights(const Kernels & kernels, int n) {
    std::mt19937 random(static_cast<unsigned>(n));
    constexpr int dim = 32;
    auto keys = normal(int64_t{n} * dim, random), values = normal(int64_t{n} * dim, random), added = normal(n, random);
    for (float & x : added) x *= 15;
    if (n == 3) added[0] = 0, added[2] = -0.345f;  // nearly 2^-0.5, where the polynomial is worst
    const int unseen = n / 3;
    added[static_cast<size_t>(unseen)] = -INFINITY;
    for (size_t i = 0; i < dim; i++) values[static_cast<size_t>(unseen) * dim + i] = 1e38f;
    const std::vector<float> q(dim);
    std::vector<float> out(dim);
    Attention a{};
    a.q = reinterpret_cast<const char *>(q.data());
    a.k = reinterpret_cast<const char *>(keys.data());
    a.v = reinterpret_cast<const char *>(values.data());
    a.k_row = a.v_row = dim * sizeof(float);
    a.head_dim = a.value_dim = dim;
    a.heads_per_kv = 1;
    a.scale = 1;
    a.out = out.data();
    const Span span{0, n};
    std::vector<char> scratch(kernels.attention_scratch(a, n) + 64);
    char * const at = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    kernels.gather_cells(a, 0, &span, 1, at);
    const int32_t row = 0, hidden = 0, visible = n;
    kernels.attend(a, 0, &row, 1, &hidden, &visible, added.data(), n, at);
    double sum = 0;
    std::vector<double> exact(dim);
    for (int cell = 0; cell < n; cell++) {
        const double weight = std::exp(double{added[static_cast<size_t>(cell)]});
        sum += weight;
        for (size_t i = 0; i < dim && weight > 0; i++) exact[i] += weight * double{values[static_cast<size_t>(cell) * dim + i]};
    }
    for (size_t i = 0; i < dim; i++) {
        CHECK(std::fabs(out[i] - exact[i] / sum) < 3e-7, "weights of %d cells: %.3e, exactly %.3e", n, double{out[i]}, exact[i] / sum);
    }
}

void test_small(const Kernels & kernels, int64_t n) {
    std::mt19937 random(static_cast<unsigned>(n));
    const auto x = normal(n, random), weight = normal(n, random), bias = normal(n, random);
    std::vector<float> out(static_cast<size_t>(n));
    for (const bool centre : {false, true}) {
        kernels.norm(x.data(), out.data(), n, 1e-6f, centre, weight.data(), centre ? bias.data() : nullptr);
        double mean = 0, square = 0;
        for (const float v : x) mean += centre ? double{v} / static_cast<double>(n) : 0;
        for (const float v : x) square += (v - mean) * (v - mean) / static_cast<double>(n);
        for (size_t i = 0; i < x.size(); i++) {
            const double exact = (x[i] - mean) / std::sqrt(square + 1e-6) * weight[i] + (centre ? double{bias[i]} : 0);
            CHECK(std::fabs(out[i] - exact) < 1e-5, "norm of %ld", n);
        }
    }
    kernels.swiglu(x.data(), weight.data(), out.data(), n);
    for (size_t i = 0; i < x.size(); i++) {
        CHECK(std::fabs(out[i] - x[i] / (1 + std::exp(-double{x[i]})) * weight[i]) < 1e-5, "swiglu of %ld", n);
    }
    kernels.add(x.data(), bias.data(), out.data(), n);
    for (size_t i = 0; i < x.size(); i++) CHECK(out[i] == x[i] + bias[i], "sum of %ld", n);
    kernels.multiply(x.data(), bias.data(), out.data(), n);
    for (size_t i = 0; i < x.size(); i++) CHECK(out[i] == x[i] * bias[i], "product of %ld", n);
    std::vector<ggml_fp16_t> half(x.size()), exact(x.size());
    kernels.to_half(x.data(), half.data(), n);
    ggml_fp32_to_fp16_row(x.data(), exact.data(), n);
    CHECK(half == exact, "half precision of %ld", n);
}

void test_rotation(const Kernels & kernels, int64_t n, int64_t n_rotated, bool side_by_side) {
    std::mt19937 random(static_cast<unsigned>(n + n_rotated));
    const auto half = static_cast<size_t>(n_rotated / 2);
    const auto x = normal(n, random), cosines = normal(n_rotated / 2, random), sines = normal(n_rotated / 2, random);
    std::vector<float> out(x.size()), there = x;
    kernels.rotate(x.data(), out.data(), n, n_rotated, side_by_side, cosines.data(), sines.data());
    kernels.rotate(there.data(), there.data(), n, n_rotated, side_by_side, cosines.data(), sines.data());
    CHECK(out == there, "a rotation of %ld is another one in place", n);
    for (size_t i = 0; i < half; i++) {
        const size_t first = side_by_side ? 2 * i : i, second = side_by_side ? 2 * i + 1 : i + half;
        const double a = x[first], b = x[second], c = cosines[i], s = sines[i];
        CHECK(std::fabs(out[first] - (a * c - b * s)) < 1e-5 && std::fabs(out[second] - (a * s + b * c)) < 1e-5, "pair %zu of %ld", i, n);
    }
    CHECK(std::equal(out.begin() + n_rotated, out.end(), x.begin() + n_rotated), "what is not rotated stays, of %ld", n);
}

// Numbers far from what models have: the powers of two inside end where floats do.
void test_far(const Kernels & kernels) {
    std::vector<float> x{0.0f, NAN};
    for (const float far : {1e-30f, 1.0f, 9.9f, 10.2f, 60.0f, 88.0f, 89.0f, 130.0f, 1e4f, 1e30f}) x.insert(x.end(), {far, -far});
    const auto n = static_cast<int64_t>(x.size());
    const std::vector<float> ones(x.size(), 1.0f);
    std::vector<float> gelu(x.size()), gated(x.size());
    kernels.gelu(x.data(), gelu.data(), n);
    kernels.swiglu(x.data(), ones.data(), gated.data(), n);
    for (size_t i = 0; i < x.size(); i++) {
        const double v = x[i], exact = 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
        const auto near = [&](double of, double wanted) { return v != v ? of != of : std::fabs(of - wanted) <= 1e-6 * (1 + std::fabs(v)); };
        CHECK(near(gelu[i], exact), "gelu of %g: %g", v, double{gelu[i]});
        CHECK(near(gated[i], v / (1 + std::exp(-v))), "swiglu of %g: %g", v, double{gated[i]});
    }
}

double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Work> double seconds_of(Work work) {
    work();
    double best = 1e30;
    for (int round = 0; round < 5; round++) {
        const double start = cpu_seconds();
        int n = 0;
        do {
            work();
            n++;
        } while (cpu_seconds() - start < 0.03);
        best = std::fmin(best, (cpu_seconds() - start) / n);
    }
    return best;
}

// What `ldtilecfg` reads: the shapes of AMX's eight tiles.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    TileShapes() = default;
    TileShapes(uint8_t n_rows, uint16_t bytes) {
        std::fill_n(row_bytes, 8, bytes);
        std::fill_n(rows, 8, n_rows);
    }
};

// The multiplications and additions of a set's inner loop with nothing loaded or stored: what its products of
// int16 cannot pass.
struct Ceiling {
    const char * kernel;
    double macs;  // of one turn
    void (*work)();
};

constexpr int turns = 10000;  // of one work: to ask for the time takes as long as hundreds of instructions

// The instructions for each of twelve sums, \\n, so many times; registers 12 to 15 are the operands.
#define FOR_SUMS(instructions)                                                                                     \
    [] {                                                                                                           \
        for (int i = 0; i < turns; i++) {                                                                          \
            __asm__ volatile(".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n" instructions "\n.endr"               \
                             : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                               "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                              \
        }                                                                                                          \
        __asm__ volatile("vzeroupper");                                                                            \
    }

const Ceiling ceilings[] = {
    {"AVX2", 12 * 32,
     FOR_SUMS("vpaddw %%ymm12, %%ymm13, %%ymm14\n vpaddw %%ymm13, %%ymm12, %%ymm15\n"
              "vpmaddwd %%ymm14, %%ymm15, %%ymm14\n vpaddd %%ymm14, %%ymm\\n, %%ymm\\n")},
    {"AVX-VNNI", 12 * 16, FOR_SUMS("%{vex%} vpdpwssd %%ymm12, %%ymm13, %%ymm\\n")},
    {"AVX-512", 12 * 32, FOR_SUMS("vpmaddwd %%zmm12, %%zmm13, %%zmm14\n vpaddd %%zmm14, %%zmm\\n, %%zmm\\n")},
    {"AVX-512 VNNI", 12 * 32, FOR_SUMS("vpdpwssd %%zmm12, %%zmm13, %%zmm\\n")},
    {"AMX", 16 * 16 * 64, [] {  // four products of bytes are one of int16
         const TileShapes shapes(16, 64);
         __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
         for (int i = 0; i < turns; i++) {
             __asm__ volatile("tdpbuud %tmm6, %tmm4, %tmm0\n tdpbusd %tmm7, %tmm4, %tmm1\n"
                              "tdpbsud %tmm6, %tmm5, %tmm2\n tdpbssd %tmm7, %tmm5, %tmm3");
         }
         __asm__ volatile("tilerelease");
     }},
};

// Multiply-adds a second of int16, at most.
double most_of(const Kernels & kernels) {
    const auto named = [&](const Ceiling & ceiling) { return std::strcmp(ceiling.kernel, kernels.name) == 0; };
    const Ceiling & ceiling = *std::find_if(std::begin(ceilings), std::end(ceilings), named);
    return ceiling.macs * turns / seconds_of(ceiling.work);
}

void rates(const Kernels & kernels, const std::string & only) {
    std::mt19937 random(1);
    const auto left_out = [&](const Format & format) { return !only.empty() && only != ggml_type_name(format.type); };
    for (const auto & format : formats) {
        if (left_out(format)) continue;
        for (const int64_t n_rows : {1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 512}) {
            Job j = job(format, n_rows, 1024, 1024, kernels, random);
            const double quantizing = seconds_of([&] { quantize(j, kernels); });
            const double seconds = seconds_of([&] { multiply(j, kernels); });
            const double macs = static_cast<double>(n_rows) * 1024 * 1024;
            std::printf("{\"kernel\": \"%s\", \"type\": \"%s\", \"rows\": %ld, \"gmac_per_s\": %.1f, \"with_quantizing\": %.1f",
                        kernels.name, ggml_type_name(format.type), n_rows, macs / seconds * 1e-9,
                        macs / (seconds + quantizing) * 1e-9);
            if (n_rows == 512 && format.weight != Weight::f32) std::printf(", \"of_ceiling\": %.2f", macs / seconds / most_of(kernels));
            std::printf("}\n");
        }
    }
    // Weights that come from memory, whose speed limits few rows.
    for (const size_t number : {size_t{1}, size_t{3}, size_t{6}, size_t{8}}) {
        const auto & format = formats[number];
        if (left_out(format)) continue;
        for (const int64_t n_rows : {1, 2, 4, 8, 12, 16, 24, 32, 64}) {
            Job j = job(format, n_rows, 1024, 1024, kernels, random);
            const int64_t copies = (int64_t{128} << 20) / static_cast<int64_t>(j.weights.bytes.size());
            std::vector<char> one = j.weights.bytes;
            j.weights.bytes.clear();
            for (int64_t i = 0; i < copies; i++) j.weights.bytes.insert(j.weights.bytes.end(), one.begin(), one.end());
            j.product.weights = j.weights.bytes.data();
            quantize(j, kernels);
            int64_t copy = 0;
            const double seconds = seconds_of([&] {
                j.product.weights = j.weights.bytes.data() + static_cast<size_t>(copy++ % copies) * one.size();
                multiply(j, kernels);
            });
            std::printf("{\"kernel\": \"%s\", \"type\": \"%s\", \"rows\": %ld, \"from_memory_gmac_per_s\": %.1f, \"gb_per_s\": %.1f}\n",
                        kernels.name, ggml_type_name(format.type), n_rows, static_cast<double>(n_rows) * 1024 * 1024 / seconds * 1e-9,
                        static_cast<double>(one.size()) / seconds * 1e-9);
        }
    }
    // One strip against rows that stay in the first level cache: the unpacking counts little.
    Job j = job(formats[3], 36, kernels.columns, 256, kernels, random);
    quantize(j, kernels);
    const double rate = 36.0 * kernels.columns * 256 / seconds_of([&] { multiply(j, kernels); }), most = most_of(kernels);
    std::printf("{\"kernel\": \"%s\", \"what\": \"36 rows in the first level cache\", \"gmac_per_s\": %.1f, \"of_ceiling\": %.2f}\n",
                kernels.name, rate * 1e-9, rate / most);
    std::printf("{\"kernel\": \"%s\", \"what\": \"ceiling: its instructions in registers\", \"gmac_per_s\": %.1f}\n", kernels.name,
                most * 1e-9);
}

// ggml tells the processor the shapes of its tiles once for each thread, so they must stay.
void test_foreign_tiles(const Kernels & kernels) {
    if (std::strcmp(kernels.name, "AMX") != 0) return;
    TileShapes before(8, 32), after;
    before.rows[1] = 4;
    before.row_bytes[1] = 16;
    const uint64_t of_all_sets = digest;
    __asm__ volatile("ldtilecfg %0" : : "m"(before));
    test_product(kernels, formats[3], 40, 40, 256);
    test_attention(kernels, 128, true, true, 40);
    __asm__ volatile("sttilecfg %0" : "=m"(after));
    CHECK(std::memcmp(&before, &after, sizeof before) == 0, "the tiles have other shapes than before");
    __asm__ volatile("tilerelease");
    digest = of_all_sets;
}

void test(const Kernels & kernels) {
    failures = 0;
    digest = 0;
    for (const auto & format : formats) {
        const int64_t unit = ggml_blck_size(format.type) > 32 ? 256 : 32;
        for (const int64_t rows : {1, 2, 5, 6, 7, 13}) test_product(kernels, format, rows, 32, 512);
        test_product(kernels, format, 3, 1, unit);
        test_product(kernels, format, 3, 17, 3 * unit);
        test_product(kernels, format, 8, 40, 1024 + unit);
        test_product(kernels, format, 50, 9, 512 + unit);  // so many rows that weights are turned
        for (const int64_t rows : {1, 20, 50}) test_gate(kernels, format, rows, 35, 512 + unit);
    }
    for (const int64_t rows : {33, 36, 37}) test_product(kernels, formats[3], rows, 5, 64);  // tiles of 9, 11 and 12
    for (const int64_t rows : {15, 16, 17, 32}) test_product(kernels, formats[3], rows, 19, 96);  // tiles of 16, half a step
    test_product(kernels, formats[0], 4, 20, 77);
    for (const int64_t rows : {4, 31}) test_product(kernels, formats[1], rows, 20, 301);
    test_extremes(kernels);
    test_outliers(kernels);
    for (const bool half : {false, true}) {
        for (const bool causal : {false, true}) {
            test_attention(kernels, 32, half, causal, 1);
            test_attention(kernels, 48, half, causal, 37);
            test_attention(kernels, 64, half, causal, 37);
            test_attention(kernels, 128, half, causal, 130);
            test_attention(kernels, 32, half, causal, 300);  // cells of three times
            test_attention(kernels, 80, half, causal, 150, 21);
        }
    }
    for (const int n : {2, 3, 9, 200}) test_weights(kernels, n);
    test_foreign_tiles(kernels);
    for (const int64_t n : {1, 7, 8, 31, 384, 1030}) test_small(kernels, n);
    test_far(kernels);
    for (const bool side_by_side : {false, true}) {
        for (const int64_t half : {1, 7, 8, 17, 64}) test_rotation(kernels, 2 * half + half % 3, 2 * half, side_by_side);
    }
    std::printf("%s: %d failures, digest %016llx\n", kernels.name, failures, static_cast<unsigned long long>(digest));
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_free(ggml_init({16, nullptr, true}));  // fills ggml's tables
    const std::string what = argc > 1 ? argv[1] : "", argument = argc > 2 ? argv[2] : "";
    int failed = 0;
    for (int number = 0; const Kernels * kernels = kernels_at(number); number++) {
        if (what == "only") {
            std::string name = kernels->name;
            std::replace(name.begin(), name.end(), ' ', '_');
            if (argument != name) continue;
        } else if (!kernels->supported()) {
            if (what != "rate") std::printf("%s: not tested, this processor does not have it\n", kernels->name);
            continue;
        }
        if (what == "rate") {
            rates(*kernels, argument);
            continue;
        }
        test(*kernels);
        failed += failures != 0;
    }
    std::fflush(stdout);
    tcdrain(STDOUT_FILENO);  // of an emulated machine the program is all: it halts when this ends
    return failed != 0;
}
