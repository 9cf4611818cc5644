// What a kernel file offers to the backend: products, attention and small operations over plain
// memory. Nothing in here knows ggml's tensors; the same file is compiled once for each
// instruction set.
//
// Every function computes a row in one order, whatever rows are beside it: the result of a row
// depends on the row alone. Integer sums are exact, so their order is free.

#pragma once

#include <cstddef>
#include <cstdint>

namespace gguf_embed {

// How the numbers of a weight matrix are stored. The values are our own; `other` goes through a
// function of ggml that makes floats.
enum class Weight : int { f32, f16, bf16, q8_0, q4_0, q5_0, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, other };

using ToFloat = void (*)(const void * source, float * target, int64_t n);

enum class Activation : int { none, gelu, swiglu };

// A block of a row as int16.
struct RowBlock {
    float scale;
    int32_t before;  // what its sums begin with: see `crossed_tile`
};

// out[m][n] = activation(sum over k of x[m][k] * weights[n][k] + bias[n]) + residual[m][n]
// With a gate, a second matrix of the same type and shape, for Activation::swiglu and without bias:
// out[m][n] = silu(sum over k of x[m][k] * gate[n][k]) * (sum over k of x[m][k] * weights[n][k]) + residual[m][n]
struct Product {
    Weight type;
    const char * weights;
    const char * gate;  // or null
    size_t row_bytes;  // from one column's weights to the next
    ToFloat to_float;  // for Weight::other
    int64_t n_rows;     // m
    int64_t n_columns;  // n
    int64_t n_inner;    // k
    int64_t block;      // inner values that share a scale
    const int16_t * quantized;  // what `quantize_rows` wrote
    const RowBlock * blocks;    // [block of k][row]
    const float * x;            // the float kernel reads the rows themselves
    int64_t x_stride;           // floats from row to row
    float * out;
    int64_t out_stride;
    const float * bias;      // or null
    const float * residual;  // or null
    int64_t residual_stride;
    Activation activation;
};

// One query tile's attention: rows of a sequence against the cells that they may see.
struct Attention {
    const char * q;  // float
    const char * k;  // half or float
    const char * v;
    size_t q_row, q_head;  // strides in bytes
    size_t k_row, k_head;
    size_t v_row, v_head;
    bool k_is_half, v_is_half;
    int64_t head_dim;    // of q and k
    int64_t value_dim;   // of v and the result
    int64_t heads_per_kv;
    float scale;
    float * out;             // [row][head][value_dim]
    size_t out_row, out_head;  // in floats
};

// `value_dim` is a multiple of so many.
constexpr int attention_values = 16;

struct Span {
    int32_t begin, end;  // cells [begin, end)
};

struct Kernels {
    const char * name;
    int columns;      // of a strip
    int query_rows;   // of an attention tile
    bool (*supported)();  // by this processor

    // Inner values that share a scale, for a matrix with `n_inner` of them.
    int64_t (*block_of)(Weight type, int64_t n_inner);
    // Whether the type is multiplied as integers.
    bool (*is_integer)(Weight type);
    // How many numbers `quantize_rows` writes at most; they lie in an order of their own, with zeros between.
    int64_t (*quantized_size)(int64_t n_rows, int64_t n_inner, int64_t block);
    // Rows [first, last) of x as int16, and what belongs to each row and block.
    void (*quantize_rows)(const float * x, int64_t stride, int64_t n_rows, int64_t n_inner, int64_t block,
                          int64_t first, int64_t last, int16_t * quantized, RowBlock * blocks);
    // Bytes of scratch that `product` needs for so many rows, and `attend` for so many cells.
    size_t (*product_scratch)(const Product & product);
    size_t (*attention_scratch)(const Attention & attention, int64_t n_cells);
    // All rows of the columns [strip * columns, (strip + 1) * columns).
    void (*product)(const Product & product, int64_t strip, char * scratch);

    // The cells of `spans`, of one key-value head, as floats in scratch; then tiles of query rows.
    void (*gather_cells)(const Attention & attention, int64_t kv_head, const Span * spans, int n_spans, char * scratch);
    // Rows rows[0..n_rows), at most `query_rows`, of one head. Row i sees the gathered cells
    // [hidden[i], visible[i]); `added` is null, or holds what is added to its scores: [row][cell].
    void (*attend)(const Attention & attention, int64_t head, const int32_t * rows, int n_rows,
                   const int32_t * hidden, const int32_t * visible, const float * added, int64_t n_cells, char * scratch);

    // Small operations over one row of n floats.
    void (*norm)(const float * x, float * out, int64_t n, float eps, bool centre, const float * weight, const float * bias);
    void (*gelu)(const float * x, float * out, int64_t n);
    void (*swiglu)(const float * gate, const float * up, float * out, int64_t n);
    void (*add)(const float * a, const float * b, float * out, int64_t n);
    void (*multiply)(const float * a, const float * b, float * out, int64_t n);
    void (*to_half)(const float * x, void * out, int64_t n);
    // The first n_rotated numbers are pairs, each rotated by its angle; the others stay. The halves of a pair
    // lie n_rotated / 2 apart, or side by side. `out` may be x.
    void (*rotate)(const float * x, float * out, int64_t n, int64_t n_rotated, bool side_by_side, const float * cosines, const float * sines);
};

// Each from a unit of its own, for its own processors.
const Kernels * amx_kernels();
const Kernels * avx512_vnni_kernels();
const Kernels * avx512_kernels();
const Kernels * avx_vnni_kernels();
const Kernels * avx2_kernels();

// Those that were compiled, the fastest first; null after the last.
// Visible, so that the test program tests what is shipped.
__attribute__((visibility("default"))) const Kernels * kernels_at(int number);

}  // namespace gguf_embed
