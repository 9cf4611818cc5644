// A ggml backend of type ACCEL: it takes the operations that our kernels do better than ggml's CPU
// backend, exactly as they are defined, and leaves every other one to that.
//
// Weights stay where ggml put them, in host memory. What a graph needs besides is kept with the
// backend, which belongs to one llama.cpp context and is used by one of its threads at a time.

#include "ggml_plugin.h"
#include "kernels.h"

#include <omp.h>

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace gguf_embed {
namespace {

// The first kernels that this processor runs, and that have this name if there is one; or null.
const Kernels * supported_kernels(const char * name = nullptr) {
    for (int number = 0; const Kernels * kernels = kernels_at(number); number++) {
        if (kernels->supported() && (name == nullptr || std::strcmp(kernels->name, name) == 0)) return kernels;
    }
    return nullptr;
}

const Kernels *& chosen_kernels() {
    static const Kernels * chosen = supported_kernels();
    return chosen;
}

// --------------------------------------------------------------------------- what is supported

bool weight_of(ggml_type type, Weight & weight) {
    switch (type) {
        case GGML_TYPE_F32: weight = Weight::f32; return true;
        case GGML_TYPE_F16: weight = Weight::f16; return true;
        case GGML_TYPE_BF16: weight = Weight::bf16; return true;
        case GGML_TYPE_Q8_0: weight = Weight::q8_0; return true;
        case GGML_TYPE_Q4_0: weight = Weight::q4_0; return true;
        case GGML_TYPE_Q5_0: weight = Weight::q5_0; return true;
        case GGML_TYPE_Q4_K: weight = Weight::q4_k; return true;
        case GGML_TYPE_Q5_K: weight = Weight::q5_k; return true;
        case GGML_TYPE_Q6_K: weight = Weight::q6_k; return true;
        case GGML_TYPE_IQ4_NL: weight = Weight::iq4_nl; return true;
        case GGML_TYPE_IQ4_XS: weight = Weight::iq4_xs; return true;
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K: weight = Weight::other; return true;
        default: return false;
    }
}

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

bool is_matrix(const ggml_tensor * t) { return t->ne[2] == 1 && t->ne[3] == 1; }

bool no_params(const ggml_tensor * t) {
    return std::all_of(std::begin(t->op_params), std::end(t->op_params), [](int32_t x) { return x == 0; });
}

bool no_sources_from(const ggml_tensor * t, int first) {
    return std::all_of(t->src + first, t->src + GGML_MAX_SRC, [](const ggml_tensor * s) { return s == nullptr; });
}

// Floats whose rows are whole; the rows may lie anywhere.
bool float_rows(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0 &&
           t->nb[2] % sizeof(float) == 0 && t->nb[3] % sizeof(float) == 0;
}

bool packed_floats(const ggml_tensor * t) { return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t); }

bool same_shape(const ggml_tensor * a, const ggml_tensor * b) { return std::equal(a->ne, a->ne + GGML_MAX_DIMS, b->ne); }

// One row of floats, as long as the rows of `t`.
bool is_row_for(const ggml_tensor * row, const ggml_tensor * t) {
    return packed_floats(row) && row->ne[0] == t->ne[0] && ggml_nrows(row) == 1;
}

bool takes_product(const ggml_tensor * t) {
    const ggml_tensor *w = t->src[0], *x = t->src[1];
    Weight weight;
    return weight_of(w->type, weight) && is_matrix(w) && is_matrix(x) && is_matrix(t) && float_rows(x) && packed_floats(t) &&
           w->nb[0] == ggml_type_size(w->type) && w->nb[1] == ggml_row_size(w->type, w->ne[0]) && no_params(t) &&
           no_sources_from(t, 2);
}

bool takes_attention(const ggml_tensor * t) {
    const ggml_tensor *q = t->src[0], *k = t->src[1], *v = t->src[2], *mask = t->src[3];
    float params[3];  // scale, ALiBi's bias, soft cap
    std::memcpy(params, t->op_params, sizeof params);
    const int32_t precision = t->op_params[3];
    const auto cells = [](const ggml_tensor * c) {
        return (c->type == GGML_TYPE_F16 || c->type == GGML_TYPE_F32) && c->nb[0] == ggml_type_size(c->type);
    };
    return float_rows(q) && cells(k) && cells(v) && packed_floats(t) && params[1] == 0 && params[2] == 0 &&
           (precision == GGML_PREC_UNDEFINED || precision == GGML_PREC_F32) && no_sources_from(t, 4) && q->ne[3] == 1 &&
           k->ne[3] == 1 && v->ne[3] == 1 && k->ne[0] == q->ne[0] && k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] &&
           q->ne[2] % k->ne[2] == 0 && v->ne[0] % attention_values == 0 && mask != nullptr &&
           mask->type == GGML_TYPE_F16 && ggml_is_contiguous(mask) && is_matrix(mask) && mask->ne[0] == k->ne[1] &&
           mask->ne[1] >= q->ne[1] && k->ne[1] <= INT32_MAX;
}

bool takes_pair(const ggml_tensor * t) {  // sums and products, value by value
    const ggml_tensor *a = t->src[0], *b = t->src[1];
    return packed_floats(t) && float_rows(a) && same_shape(a, t) && (is_row_for(b, t) || (float_rows(b) && same_shape(b, t))) &&
           no_sources_from(t, 2);
}

bool takes_cast(const ggml_tensor * t) {
    const ggml_tensor * x = t->src[0];
    return t->type == GGML_TYPE_F16 && ggml_is_contiguous(t) && float_rows(x) && same_shape(x, t);
}

bool takes_swiglu(const ggml_tensor * t) {  // gate and up apart
    const ggml_tensor *gate = t->src[0], *up = t->src[1];
    return ggml_get_glu_op(t) == GGML_GLU_OP_SWIGLU && up != nullptr && packed_floats(t) && float_rows(gate) && float_rows(up) &&
           same_shape(gate, t) && same_shape(up, t) && no_sources_from(t, 2);
}

// A rotation of pairs by angles that grow with the position.
struct Rope {
    int32_t n_rotated, mode, first;
    float base, scale, extrapolation, magnitude;
};

Rope rope_of(const ggml_tensor * t) {
    Rope rope{};
    rope.n_rotated = t->op_params[1];
    rope.mode = t->op_params[2];
    rope.first = t->op_params[15];
    float values[4];
    std::memcpy(values, t->op_params + 5, sizeof values);
    rope.base = values[0];
    rope.scale = values[1];
    rope.extrapolation = values[2];
    rope.magnitude = values[3];
    return rope;
}

bool takes_rope(const ggml_tensor * t) {
    const ggml_tensor *x = t->src[0], *positions = t->src[1], *factors = t->src[2];
    const Rope rope = rope_of(t);
    return packed_floats(t) && float_rows(x) && same_shape(x, t) && positions->type == GGML_TYPE_I32 && ggml_is_contiguous(positions) &&
           (factors == nullptr || packed_floats(factors)) && (rope.mode == GGML_ROPE_TYPE_NORMAL || rope.mode == GGML_ROPE_TYPE_NEOX) &&
           rope.extrapolation == 0 && rope.first == 0 && no_sources_from(t, 3);
}

// Rows of floats that go to rows of a cache.
bool takes_set_rows(const ggml_tensor * t) {
    const ggml_tensor *rows = t->src[0], *numbers = t->src[1];
    return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32) && t->nb[0] == ggml_type_size(t->type) && is_matrix(t) &&
           float_rows(rows) && is_matrix(rows) && numbers->type == GGML_TYPE_I64 && ggml_is_contiguous(numbers) &&
           ggml_nelements(numbers) == rows->ne[1] && no_sources_from(t, 3);
}

bool takes(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        case GGML_OP_MUL_MAT: return takes_product(t);
        case GGML_OP_FLASH_ATTN_EXT: return takes_attention(t);
        case GGML_OP_ADD:
        case GGML_OP_MUL: return takes_pair(t);
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM: return packed_floats(t) && float_rows(t->src[0]) && same_shape(t->src[0], t) && no_sources_from(t, 1);
        case GGML_OP_UNARY:
            return ggml_get_unary_op(t) == GGML_UNARY_OP_GELU && packed_floats(t) && float_rows(t->src[0]) &&
                   same_shape(t->src[0], t);
        case GGML_OP_GLU: return takes_swiglu(t);
        case GGML_OP_CPY: return takes_cast(t);
        case GGML_OP_ROPE: return takes_rope(t);
        case GGML_OP_SET_ROWS: return takes_set_rows(t);
        default: return false;
    }
}

// ------------------------------------------------------------------------------------- memory

struct Free {
    void operator()(char * p) const { ::operator delete(p, std::align_val_t{64}); }
};

// Memory that grows and is never read before it is written.
class Room {
  public:
    char * of(size_t bytes) {
        if (bytes > size_) {
            bytes_.reset();
            bytes_.reset(static_cast<char *>(::operator new(bytes, std::align_val_t{64})));
            size_ = bytes;
        }
        return bytes_.get();
    }

  private:
    std::unique_ptr<char, Free> bytes_;
    size_t size_ = 0;
};

// ----------------------------------------------------------------------- who sees which cells

// Query rows that share the cells of `spans`. Row i sees the cells [hidden[i], visible[i]) of
// those, counted from the first span's begin on.
struct Group {
    std::vector<Span> spans;
    std::vector<int32_t> rows, hidden, visible;
    int32_t n_cells = 0;
};

struct Visibility {
    const ggml_tensor * mask = nullptr;
    std::vector<Group> groups;
    bool added = false;  // the mask holds other values than 0 and -infinity
};

constexpr uint16_t half_zero = 0, half_minus_zero = 0x8000, half_minus_infinity = 0xfc00;

void spans_of(const uint16_t * row, int32_t n, std::vector<Span> & spans, bool & added) {
    spans.clear();
    int32_t i = 0;
    while (i < n) {
        if (row[i] == half_minus_infinity) {
            i++;
            continue;
        }
        Span span{i, i};
        for (; i < n && row[i] != half_minus_infinity; i++) added |= row[i] != half_zero && row[i] != half_minus_zero;
        span.end = i;
        spans.push_back(span);
    }
}

int32_t count(const std::vector<Span> & spans) {
    int32_t n = 0;
    for (const auto & span : spans) n += span.end - span.begin;
    return n;
}

// The part of `spans` within [begin, end).
std::vector<Span> clipped(const std::vector<Span> & spans, int32_t begin, int32_t end) {
    std::vector<Span> out;
    for (const auto & span : spans) {
        const Span part{std::max(span.begin, begin), std::min(span.end, end)};
        if (part.begin < part.end) out.push_back(part);
    }
    return out;
}

bool equal(const std::vector<Span> & a, const std::vector<Span> & b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](Span x, Span y) {
               return x.begin == y.begin && x.end == y.end;
           });
}

// Puts a row into the group where its cells follow each other within the group's, perhaps with
// new ones at the end; false where they do not.
bool join(Group & group, int32_t row, const std::vector<Span> & spans) {
    if (group.spans.empty() || spans.empty()) return false;
    const int32_t end = group.spans.back().end;
    if (spans.front().begin >= end || spans.front().begin < group.spans.front().begin) return false;
    if (!equal(clipped(spans, 0, end), clipped(group.spans, spans.front().begin, std::min(end, spans.back().end)))) return false;
    for (const auto & span : clipped(spans, end, INT32_MAX)) {
        group.n_cells += span.end - span.begin;
        if (span.begin == group.spans.back().end) {
            group.spans.back().end = span.end;
        } else {
            group.spans.push_back(span);
        }
    }
    const int32_t hidden = count(clipped(group.spans, 0, spans.front().begin));
    group.rows.push_back(row);
    group.hidden.push_back(hidden);
    group.visible.push_back(hidden + count(spans));
    return true;
}

void read_mask(const ggml_tensor * mask, int64_t n_rows, Visibility & visibility) {
    visibility.mask = mask;
    visibility.groups.clear();
    visibility.added = false;
    std::vector<Span> spans;
    for (int64_t row = 0; row < n_rows; row++) {
        const auto * values = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) +
                                                                 static_cast<size_t>(row) * mask->nb[1]);
        spans_of(values, static_cast<int32_t>(mask->ne[0]), spans, visibility.added);
        const auto number = static_cast<int32_t>(row);
        if (!visibility.groups.empty() && join(visibility.groups.back(), number, spans)) continue;
        Group group;
        group.spans = spans;
        group.n_cells = count(spans);
        group.rows = {number};
        group.hidden = {0};
        group.visible = {group.n_cells};
        visibility.groups.push_back(std::move(group));
    }
}

// --------------------------------------------------------------------------------------- steps

// One operation, or several that are computed at once; `node` is the last one, whose memory is
// written.
struct Step {
    const ggml_tensor * node = nullptr;
    const ggml_tensor * first = nullptr;  // the product or the norm
    const ggml_tensor * gate = nullptr;  // a second product of the same rows
    const ggml_tensor * weight = nullptr;  // of a norm
    const ggml_tensor * bias = nullptr;
    const ggml_tensor * residual = nullptr;
    Activation activation = Activation::none;
    bool prepares = false;  // the rows of a product as int16, or the angles of a rotation: a step before may have done it
    bool ends_alone = true;  // the next step begins when all threads are done with this one
};

struct Engine {
    const Kernels * kernels = chosen_kernels();
    int n_threads = GGML_DEFAULT_N_THREADS;
    std::vector<Step> steps;
    Room quantized, row_blocks;
    Room angles;  // of each token: cosines, then sines
    std::vector<Room> scratch;  // of each thread
    Visibility visibility;
    // Numbers of the next pieces of work of a step: two phases each.
    std::unique_ptr<std::atomic<int64_t>[]> next;
    size_t n_next = 0;
};

const char * bytes_of(const ggml_tensor * t) { return static_cast<const char *>(t->data); }

float * floats_of(const ggml_tensor * t) { return static_cast<float *>(t->data); }

char * place_of(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return static_cast<char *>(t->data) + static_cast<size_t>(i1) * t->nb[1] + static_cast<size_t>(i2) * t->nb[2] +
           static_cast<size_t>(i3) * t->nb[3];
}

// The rows of up to four dimensions, in order.
char * row_of(const ggml_tensor * t, int64_t row) {
    return place_of(t, row % t->ne[1], row / t->ne[1] % t->ne[2], row / (t->ne[1] * t->ne[2]));
}

const float * float_row(const ggml_tensor * t, int64_t row) { return reinterpret_cast<const float *>(row_of(t, row)); }

const float * broadcast_row(const ggml_tensor * t, int64_t row) { return float_row(t, ggml_nrows(t) == 1 ? 0 : row); }

int uses_of(const ggml_cgraph * graph, const ggml_tensor * t) {
    const auto & set = graph->visited_hash_set;
    if (set.size == 0 || graph->use_counts == nullptr) return -1;
    const size_t start = (reinterpret_cast<uintptr_t>(t) >> 4) % set.size;
    size_t i = start;
    do {
        if (!(set.used[i / 32] >> (i % 32) & 1)) return -1;
        if (set.keys[i] == t) return graph->use_counts[i];
        i = (i + 1) % set.size;
    } while (i != start);
    return -1;
}

// Whether nobody but the next operation asks for this one's result.
bool is_inner(const ggml_cgraph * graph, const ggml_tensor * t) {
    return (t->flags & GGML_TENSOR_FLAG_OUTPUT) == 0 && t->view_src == nullptr && uses_of(graph, t) == 1;
}

bool overlaps(const ggml_tensor * a, const ggml_tensor * b) {
    const char *a0 = bytes_of(a), *b0 = bytes_of(b);
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

// What is written may only lie on what is read where each value is read just before.
bool may_write(const ggml_tensor * out, const ggml_tensor * in, bool same_place_is_fine) {
    return !overlaps(out, in) || (same_place_is_fine && out->data == in->data && packed_floats(in) && same_shape(in, out));
}

// The index of the node after i that computes something.
int next_node(const ggml_cgraph * graph, int i) {
    for (i++; i < graph->n_nodes && is_view(graph->nodes[i]); i++) {}
    return i;
}

// Adds what follows a product to its step; returns the index of the last node.
int fuse_product(const ggml_cgraph * graph, int i, Step & step) {
    const auto follows = [&](ggml_op op) -> const ggml_tensor * {
        const int next = next_node(graph, i);
        if (next >= graph->n_nodes) return nullptr;
        const ggml_tensor * t = graph->nodes[next];
        const bool uses = t->src[0] == step.node || (op == GGML_OP_ADD && t->src[1] == step.node);
        // The rows of x are read for every strip of columns, the weights for all rows.
        return t->op == op && uses && is_inner(graph, step.node) && takes(t) && may_write(t, step.first->src[1], false) &&
                       same_shape(t, step.first)
                   ? t
                   : nullptr;
    };
    const auto other_of = [&](const ggml_tensor * sum) { return sum->src[0] == step.node ? sum->src[1] : sum->src[0]; };
    const auto take = [&](const ggml_tensor * t) {
        i = next_node(graph, i);
        step.node = t;
    };
    if (const auto * t = follows(GGML_OP_ADD); t && is_row_for(other_of(t), t) && t->ne[1] > 1 && may_write(t, other_of(t), false)) {
        step.bias = other_of(t);
        take(t);
    } else if (t && is_row_for(other_of(t), t) && other_of(t)->op == GGML_OP_NONE && may_write(t, other_of(t), false)) {
        step.bias = other_of(t);  // a single row: a weight can only be a bias
        take(t);
    }
    if (const auto * t = follows(GGML_OP_UNARY)) {
        step.activation = Activation::gelu;
        take(t);
    }
    if (const auto * t = follows(GGML_OP_ADD);
        t && same_shape(other_of(t), t) && float_rows(other_of(t)) && may_write(t, other_of(t), true)) {
        step.residual = other_of(t);
        take(t);
    }
    return i;
}

// Makes one step of two products of the same rows and the SwiGLU of both; returns the index of the last node, or
// of the first product where they do not follow each other.
int fuse_gate(const ggml_cgraph * graph, int i, Step & step) {
    const int second = next_node(graph, i), last = next_node(graph, second);
    if (last >= graph->n_nodes) return i;
    const ggml_tensor *a = graph->nodes[i], *b = graph->nodes[second], *t = graph->nodes[last];
    const bool pair = b->op == GGML_OP_MUL_MAT && takes(b) && b->src[1] == a->src[1] && b->src[0]->type == a->src[0]->type && same_shape(b, a);
    if (!pair || !is_inner(graph, a) || !is_inner(graph, b)) return i;
    if (t->op != GGML_OP_GLU || !takes(t) || !may_write(t, a->src[1], false)) return i;
    if ((t->src[0] != a || t->src[1] != b) && (t->src[0] != b || t->src[1] != a)) return i;
    step.gate = t->src[0];
    step.first = t->src[1];
    step.node = t;
    step.activation = Activation::swiglu;
    return last;
}

// The same for a norm, its weight and its bias.
int fuse_norm(const ggml_cgraph * graph, int i, Step & step) {
    const auto follows = [&](ggml_op op) -> const ggml_tensor * {
        const int next = next_node(graph, i);
        if (next >= graph->n_nodes) return nullptr;
        const ggml_tensor * t = graph->nodes[next];
        const ggml_tensor * x = step.first->src[0];
        return t->op == op && t->src[0] == step.node && is_inner(graph, step.node) && takes(t) && is_row_for(t->src[1], t) &&
                       same_shape(t, step.first) && may_write(t, t->src[1], false) && may_write(t, x, true)
                   ? t
                   : nullptr;
    };
    if (const auto * t = follows(GGML_OP_MUL)) {
        step.weight = t->src[1];
        step.node = t;
        i = next_node(graph, i);
    }
    if (const auto * t = follows(GGML_OP_ADD)) {
        step.bias = t->src[1];
        step.node = t;
        i = next_node(graph, i);
    }
    return i;
}

// Whether threads may begin with a product while others still compute the one before it: of the same rows, where
// neither touches what the other writes.
bool may_overlap(const Step & before, const Step & step) {
    if (before.first->op != GGML_OP_MUL_MAT || step.first->op != GGML_OP_MUL_MAT) return false;
    if (before.first->src[1] != step.first->src[1] || step.prepares) return false;
    const auto apart = [](const Step & writes, const Step & reads) {
        const ggml_tensor * const x = reads.first->src[1];
        for (const ggml_tensor * t : {reads.node, x, reads.bias, reads.residual}) {
            if (t != nullptr && overlaps(writes.node, t)) return false;
        }
        return true;
    };
    return apart(before, step) && apart(step, before);
}

bool same_angles(const ggml_tensor * a, const ggml_tensor * b) {
    return a->src[1] == b->src[1] && a->src[2] == b->src[2] && std::equal(std::begin(a->op_params), std::end(a->op_params), b->op_params);
}

void plan(Engine & engine, const ggml_cgraph * graph) {
    engine.steps.clear();
    const ggml_tensor * quantized = nullptr;  // whose rows the buffer holds
    const ggml_tensor * rotated = nullptr;    // whose angles are there
    int64_t block = 0;
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * t = graph->nodes[i];
        if (is_view(t) || ggml_is_empty(t) || (t->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
        Step step;
        step.node = step.first = t;
        if (t->op == GGML_OP_MUL_MAT) {
            Weight weight;
            weight_of(t->src[0]->type, weight);
            if (engine.kernels->is_integer(weight)) {
                const int64_t wanted = engine.kernels->block_of(weight, t->src[0]->ne[0]);
                step.prepares = quantized != t->src[1] || block != wanted;
                quantized = t->src[1];
                block = wanted;
            }
            const int last = fuse_gate(graph, i, step);
            i = last > i ? last : fuse_product(graph, i, step);
        } else if (t->op == GGML_OP_NORM || t->op == GGML_OP_RMS_NORM) {
            i = fuse_norm(graph, i, step);
        } else if (t->op == GGML_OP_ROPE) {
            step.prepares = rotated == nullptr || !same_angles(rotated, t);
            rotated = t;
        }
        // A view that is written to may be the rows that were quantized.
        if (step.node->view_src != nullptr) quantized = nullptr;
        if (!engine.steps.empty()) engine.steps.back().ends_alone = !may_overlap(engine.steps.back(), step);
        engine.steps.push_back(step);
    }
}

// ------------------------------------------------------------------------------------- running

// One thread's part in a graph. Threads meet after each phase of a step.
class Worker {
  public:
    Worker(Engine & engine, int number, int n_threads)
        : engine_(engine), kernels_(*engine.kernels), scratch_(engine.scratch[static_cast<size_t>(number)]), number_(number),
          n_threads_(n_threads) {}

    void run() {
        for (step_ = 0; step_ < engine_.steps.size(); step_++) {
            const Step & step = engine_.steps[step_];
            switch (step.first->op) {
                case GGML_OP_MUL_MAT: product(step); break;
                case GGML_OP_FLASH_ATTN_EXT: attention(step.node); break;
                case GGML_OP_ROPE: rotation(step); break;
                case GGML_OP_SET_ROWS: set_rows(step.node); break;
                default: rows(step); break;
            }
            if (step.ends_alone) meet();
        }
    }

  private:
    void meet() const {
        if (n_threads_ > 1) {
#pragma omp barrier
        }
    }

    // Calls work(i) for those of n pieces that fall to this thread.
    template <class Work> void share(int phase, int64_t n, Work work) {
        auto & next = engine_.next[2 * step_ + static_cast<size_t>(phase)];
        for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n; i = next.fetch_add(1, std::memory_order_relaxed)) {
            work(i);
        }
    }

    void product(const Step & step) {
        const ggml_tensor *w = step.first->src[0], *x = step.first->src[1], *out = step.node;
        Product p{};
        weight_of(w->type, p.type);
        p.weights = bytes_of(w);
        if (step.gate) p.gate = bytes_of(step.gate->src[0]);
        p.row_bytes = w->nb[1];
        if (p.type == Weight::other) p.to_float = ggml_get_type_traits(w->type)->to_float;
        p.n_rows = x->ne[1];
        p.n_columns = w->ne[1];
        p.n_inner = w->ne[0];
        p.block = kernels_.block_of(p.type, p.n_inner);
        p.x = floats_of(x);
        p.x_stride = static_cast<int64_t>(x->nb[1] / sizeof(float));
        p.out = floats_of(out);
        p.out_stride = static_cast<int64_t>(out->nb[1] / sizeof(float));
        if (step.bias) p.bias = floats_of(step.bias);
        if (step.residual) {
            p.residual = floats_of(step.residual);
            p.residual_stride = static_cast<int64_t>(step.residual->nb[1] / sizeof(float));
        }
        p.activation = step.activation;
        if (kernels_.is_integer(p.type)) {
            auto * quantized = reinterpret_cast<int16_t *>(engine_.quantized.of(0));
            auto * blocks = reinterpret_cast<RowBlock *>(engine_.row_blocks.of(0));
            p.quantized = quantized;
            p.blocks = blocks;
            if (step.prepares) {
                const int64_t piece = std::min<int64_t>(16, (p.n_rows + n_threads_ - 1) / n_threads_);
                share(0, (p.n_rows + piece - 1) / piece, [&](int64_t i) {
                    kernels_.quantize_rows(p.x, p.x_stride, p.n_rows, p.n_inner, p.block, i * piece,
                                           std::min(p.n_rows, (i + 1) * piece), quantized, blocks);
                });
                meet();
            }
        }
        char * const scratch = scratch_.of(kernels_.product_scratch(p));
        // Some strips at once: the memory behind a strip is fetched while it is computed.
        const int64_t n_strips = (p.n_columns + kernels_.columns - 1) / kernels_.columns;
        const int64_t piece = std::clamp<int64_t>(n_strips / (8 * n_threads_), 1, 8);
        share(1, (n_strips + piece - 1) / piece, [&](int64_t i) {
            for (int64_t strip = i * piece; strip < std::min(n_strips, (i + 1) * piece); strip++) kernels_.product(p, strip, scratch);
        });
    }

    void attention(const ggml_tensor * t) {
        const ggml_tensor *q = t->src[0], *k = t->src[1], *v = t->src[2], *mask = t->src[3];
        auto & visibility = engine_.visibility;
        if (number_ == 0 && visibility.mask != mask) read_mask(mask, q->ne[1], visibility);
        meet();
        Attention a{};
        a.q = bytes_of(q);
        a.k = bytes_of(k);
        a.v = bytes_of(v);
        a.q_row = q->nb[1];
        a.q_head = q->nb[2];
        a.k_row = k->nb[1];
        a.k_head = k->nb[2];
        a.v_row = v->nb[1];
        a.v_head = v->nb[2];
        a.k_is_half = k->type == GGML_TYPE_F16;
        a.v_is_half = v->type == GGML_TYPE_F16;
        a.head_dim = q->ne[0];
        a.value_dim = v->ne[0];
        a.heads_per_kv = q->ne[2] / k->ne[2];
        std::memcpy(&a.scale, t->op_params, sizeof a.scale);
        a.out = floats_of(t);
        a.out_head = t->nb[1] / sizeof(float);
        a.out_row = t->nb[2] / sizeof(float);
        const auto n_kv = k->ne[2];
        // A piece: some rows of a group, for one head of keys and the heads of queries that use it.
        // The more rows, the less often keys and values are made floats.
        const auto n_groups = static_cast<int64_t>(visibility.groups.size());
        const int64_t piece = n_groups * n_kv >= 4 * n_threads_ ? 256 : 64;
        int64_t n_pieces = 0;
        for (const auto & group : visibility.groups) n_pieces += (static_cast<int64_t>(group.rows.size()) + piece - 1) / piece;
        share(0, n_pieces * n_kv, [&](int64_t number) {
            int64_t at = number / n_kv;
            for (const auto & group : visibility.groups) {
                const auto rows = static_cast<int64_t>(group.rows.size()), here = (rows + piece - 1) / piece;
                if (at < here) {
                    attend(a, group, at * piece, std::min(rows, (at + 1) * piece), number % n_kv, mask);
                    return;
                }
                at -= here;
            }
        });
    }

    void attend(const Attention & a, const Group & group, int64_t first, int64_t last, int64_t kv_head, const ggml_tensor * mask) {
        const auto begin = static_cast<size_t>(first), end = static_cast<size_t>(last);
        // The cells that these rows see, counted from the first of them.
        int32_t from = group.n_cells, to = 0;
        for (size_t i = begin; i < end; i++) {
            from = std::min(from, group.hidden[i]);
            to = std::max(to, group.visible[i]);
        }
        from = std::min(from, to);
        std::vector<Span> spans;
        int32_t before = 0;
        for (const auto & span : group.spans) {
            const int32_t length = span.end - span.begin;
            const int32_t left = std::max(from - before, 0), right = std::min(to - before, length);
            if (left < right) spans.push_back({span.begin + left, span.begin + right});
            before += length;
        }
        const int32_t n_cells = to - from;
        char * const scratch = scratch_.of(kernels_.attention_scratch(a, n_cells));
        kernels_.gather_cells(a, kv_head, spans.data(), static_cast<int>(spans.size()), scratch);
        std::vector<int32_t> hidden, visible;
        std::vector<float> added;
        const auto width = static_cast<size_t>(kernels_.query_rows);
        for (size_t row = begin; row < end; row += width) {
            const size_t n = std::min(width, end - row);
            hidden.clear();
            visible.clear();
            for (size_t i = row; i < row + n; i++) {
                hidden.push_back(group.hidden[i] - from);
                visible.push_back(group.visible[i] - from);
            }
            if (engine_.visibility.added) added_by(mask, group, row, n, spans, n_cells, added);
            for (int64_t head = kv_head * a.heads_per_kv; head < (kv_head + 1) * a.heads_per_kv; head++) {
                kernels_.attend(a, head, &group.rows[row], static_cast<int>(n), hidden.data(), visible.data(),
                                added.empty() ? nullptr : added.data(), n_cells, scratch);
            }
        }
    }

    // What the mask adds to the scores of some rows: [row][cell].
    static void added_by(const ggml_tensor * mask, const Group & group, size_t row, size_t n, const std::vector<Span> & spans,
                         int32_t n_cells, std::vector<float> & added) {
        added.clear();
        added.reserve(n * static_cast<size_t>(n_cells) + 1);
        for (size_t i = row; i < row + n; i++) {
            const auto * values = reinterpret_cast<const ggml_fp16_t *>(bytes_of(mask) + static_cast<size_t>(group.rows[i]) * mask->nb[1]);
            for (const auto & span : spans) {
                for (int32_t cell = span.begin; cell < span.end; cell++) added.push_back(ggml_fp16_to_fp32(values[cell]));
            }
        }
        added.push_back(0);
    }

    void rotation(const Step & step) {
        const ggml_tensor *out = step.node, *x = out->src[0];
        const auto * positions = static_cast<const int32_t *>(out->src[1]->data);
        const Rope rope = rope_of(out);
        const int64_t half = rope.n_rotated / 2, n_tokens = out->ne[2], n_heads = out->ne[1];
        auto * const angles = reinterpret_cast<float *>(engine_.angles.of(0));
        const int64_t piece = 16;
        if (step.prepares) {
            // Step by step, as ggml has them: floats that come another way are other angles far from the start.
            const float * const factors = out->src[2] ? floats_of(out->src[2]) : nullptr;
            const float step_down = powf(rope.base, -2.0f / static_cast<float>(rope.n_rotated));
            share(0, (n_tokens + piece - 1) / piece, [&](int64_t number) {
                for (int64_t token = number * piece; token < std::min(n_tokens, (number + 1) * piece); token++) {
                    float *cosines = angles + token * rope.n_rotated, *sines = cosines + half;
                    auto theta = static_cast<float>(positions[token]);
                    for (int64_t i = 0; i < half; i++) {
                        const float angle = rope.scale * (factors ? theta / factors[i] : theta);
                        cosines[i] = cosf(angle) * rope.magnitude;
                        sines[i] = sinf(angle) * rope.magnitude;
                        theta *= step_down;
                    }
                }
            });
            meet();
        }
        share(1, out->ne[3] * ((n_tokens + piece - 1) / piece), [&](int64_t number) {
            const int64_t n_pieces = (n_tokens + piece - 1) / piece, batch = number / n_pieces, at = number % n_pieces * piece;
            for (int64_t token = at; token < std::min(n_tokens, at + piece); token++) {
                const float *cosines = angles + token * rope.n_rotated, *sines = cosines + half;
                for (int64_t head = 0; head < n_heads; head++) {
                    const auto * from = reinterpret_cast<const float *>(place_of(x, head, token, batch));
                    auto * to = reinterpret_cast<float *>(place_of(out, head, token, batch));
                    kernels_.rotate(from, to, out->ne[0], rope.n_rotated, rope.mode == GGML_ROPE_TYPE_NORMAL, cosines, sines);
                }
            }
        });
    }

    void set_rows(const ggml_tensor * t) {
        const ggml_tensor * rows = t->src[0];
        const auto * numbers = static_cast<const int64_t *>(t->src[1]->data);
        const int64_t n = rows->ne[0], piece = std::max<int64_t>(1, 8192 / n);
        share(0, (rows->ne[1] + piece - 1) / piece, [&](int64_t number) {
            for (int64_t row = number * piece; row < std::min(rows->ne[1], (number + 1) * piece); row++) {
                GGML_ASSERT(numbers[row] >= 0 && numbers[row] < t->ne[1]);
                char * const to = place_of(t, numbers[row], 0, 0);
                if (t->type == GGML_TYPE_F16) {
                    kernels_.to_half(float_row(rows, row), to, n);
                } else {
                    std::memcpy(to, float_row(rows, row), static_cast<size_t>(n) * sizeof(float));
                }
            }
        });
    }

    // Operations on rows, each on its own.
    void rows(const Step & step) {
        const ggml_tensor *out = step.node, *a = step.first->src[0], *b = step.first->src[1];
        const int64_t n_rows = ggml_nrows(out), n = out->ne[0];
        float eps = 0;
        if (step.first->op == GGML_OP_NORM || step.first->op == GGML_OP_RMS_NORM) {
            std::memcpy(&eps, step.first->op_params, sizeof eps);
        }
        const float * weight = step.weight ? floats_of(step.weight) : nullptr;
        const float * bias = step.bias ? floats_of(step.bias) : nullptr;
        const int64_t piece = std::max<int64_t>(1, 8192 / n);
        share(0, (n_rows + piece - 1) / piece, [&](int64_t number) {
            for (int64_t row = number * piece; row < std::min(n_rows, (number + 1) * piece); row++) {
                const auto floats = [&] { return reinterpret_cast<float *>(row_of(out, row)); };
                switch (step.first->op) {
                    case GGML_OP_NORM: kernels_.norm(float_row(a, row), floats(), n, eps, true, weight, bias); break;
                    case GGML_OP_RMS_NORM: kernels_.norm(float_row(a, row), floats(), n, eps, false, weight, bias); break;
                    case GGML_OP_ADD: kernels_.add(float_row(a, row), broadcast_row(b, row), floats(), n); break;
                    case GGML_OP_MUL: kernels_.multiply(float_row(a, row), broadcast_row(b, row), floats(), n); break;
                    case GGML_OP_UNARY: kernels_.gelu(float_row(a, row), floats(), n); break;
                    case GGML_OP_GLU: {
                        const float *gate = float_row(a, row), *up = float_row(b, row);
                        kernels_.swiglu(gate, up, floats(), n);
                        break;
                    }
                    default: {
                        // A token's heads lie side by side: they are read so.
                        const int64_t n_heads = out->ne[2] * out->ne[3], token = row / n_heads, head = row - token * n_heads;
                        const int64_t of_three = head / out->ne[2], of_two = head - of_three * out->ne[2];
                        kernels_.to_half(reinterpret_cast<const float *>(place_of(a, token, of_two, of_three)),
                                         place_of(out, token, of_two, of_three), n);
                        break;
                    }
                }
            }
        });
    }

    Engine & engine_;
    const Kernels & kernels_;
    Room & scratch_;
    const int number_;
    const int n_threads_;
    size_t step_ = 0;
};

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    Engine & engine = *static_cast<Engine *>(backend->context);
    try {
        plan(engine, graph);
        if (engine.steps.empty()) return GGML_STATUS_SUCCESS;
        size_t quantized = 0, row_blocks = 0, angles = 0;
        for (const auto & step : engine.steps) {
            if (step.first->op == GGML_OP_ROPE) {
                angles = std::max(angles, static_cast<size_t>(step.node->ne[2] * rope_of(step.node).n_rotated) * sizeof(float));
            }
            if (step.first->op != GGML_OP_MUL_MAT) continue;
            const ggml_tensor *w = step.first->src[0], *x = step.first->src[1];
            const int64_t rows = x->ne[1], inner = w->ne[0];
            Weight weight;
            weight_of(w->type, weight);
            const auto numbers = engine.kernels->quantized_size(rows, inner, engine.kernels->block_of(weight, inner));
            quantized = std::max(quantized, static_cast<size_t>(numbers) * sizeof(int16_t));
            row_blocks = std::max(row_blocks, static_cast<size_t>(rows * (inner / 32 + 1)) * sizeof(RowBlock));
        }
        engine.quantized.of(quantized);
        engine.row_blocks.of(row_blocks);
        engine.angles.of(angles);
        engine.visibility.mask = nullptr;  // its values are those of this graph
        const int n_threads = std::max(1, engine.n_threads);
        engine.scratch.resize(static_cast<size_t>(n_threads));
        if (engine.n_next < 2 * engine.steps.size()) {
            engine.n_next = 2 * engine.steps.size();
            engine.next = std::make_unique<std::atomic<int64_t>[]>(engine.n_next);
        }
        for (size_t i = 0; i < engine.n_next; i++) engine.next[i].store(0, std::memory_order_relaxed);
    } catch (const std::bad_alloc &) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    if (engine.n_threads <= 1) {
        Worker(engine, 0, 1).run();
        return GGML_STATUS_SUCCESS;
    }
#pragma omp parallel num_threads(engine.n_threads)
    Worker(engine, omp_get_thread_num(), omp_get_num_threads()).run();
    return GGML_STATUS_SUCCESS;
}

// ------------------------------------------------------------------------- what ggml asks for

constexpr const char * plugin_name = "GGUF_EMBED";

const char * backend_name(ggml_backend_t) { return plugin_name; }

void backend_free(ggml_backend_t backend) {
    delete static_cast<Engine *>(backend->context);
    delete backend;
}

void set_n_threads(ggml_backend_t backend, int n_threads) { static_cast<Engine *>(backend->context)->n_threads = n_threads; }

const char * device_name(ggml_backend_dev_t) { return plugin_name; }

const char * device_description(ggml_backend_dev_t) { return chosen_kernels()->name; }

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }

// llama.cpp gives every context all devices of type ACCEL. A context that is made while its thread
// does not offer us sees a second CPU device, of which it needs none: so models with the accelerator
// and without it live side by side in one process.
thread_local bool offered = false;

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return offered ? GGML_BACKEND_DEVICE_TYPE_ACCEL : GGML_BACKEND_DEVICE_TYPE_CPU;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(device);
    props->description = device_description(device);
    props->type = device_type(device);
    props->caps.buffer_from_host_ptr = true;
    props->caps.mmap_support = true;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {0x67, 0x67, 0x75, 0x66, 0x2d, 0x65, 0x6d, 0x62, 0x65, 0x64, 0x2d, 0x61, 0x63, 0x63, 0x65, 0x6c};
    ggml_backend_i table{};
    table.get_name = backend_name;
    table.free = backend_free;
    table.graph_compute = compute;
    return new ggml_backend{&guid, table, device, new Engine};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

ggml_backend_buffer_t device_buffer(ggml_backend_dev_t, void * p, size_t size, size_t) { return ggml_backend_cpu_buffer_from_ptr(p, size); }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) { return takes(op); }

bool device_supports_buffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

const char * plugin_get_name(ggml_backend_reg_t) { return plugin_name; }

size_t device_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t get_device(ggml_backend_reg_t plugin, size_t) {
    static ggml_backend_device device = [plugin] {
        ggml_backend_device made{};
        made.iface.get_name = device_name;
        made.iface.get_description = device_description;
        made.iface.get_memory = device_memory;
        made.iface.get_type = device_type;
        made.iface.get_props = device_props;
        made.iface.init_backend = device_init;
        made.iface.get_buffer_type = device_buffer_type;
        made.iface.buffer_from_host_ptr = device_buffer;
        made.iface.supports_op = device_supports_op;
        made.iface.supports_buft = device_supports_buffer;
        made.reg = plugin;
        return made;
    }();
    return &device;
}

void * get_function(ggml_backend_reg_t, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void *>(set_n_threads);
    return nullptr;
}

}  // namespace
}  // namespace gguf_embed

extern "C" {

GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void);
GGML_BACKEND_API int ggml_backend_score(void);
GGML_BACKEND_API void gguf_embed_offer(int);
GGML_BACKEND_API int gguf_embed_choose(const char *);

ggml_backend_reg_t ggml_backend_init(void) {
    using namespace gguf_embed;
    static ggml_backend_reg plugin = {plugin_api_version, {plugin_get_name, device_count, get_device, get_function}, nullptr};
    return &plugin;
}

// 0 where this processor has none of our instruction sets: ggml then does not load us.
int ggml_backend_score(void) { return gguf_embed::chosen_kernels() != nullptr; }

// Whether contexts that this thread makes from now on get the accelerator.
void gguf_embed_offer(int whether) { gguf_embed::offered = whether != 0; }

// Takes the kernels of this name instead of the fastest, for tests, before anything is computed;
// 0 where this processor does not run them.
int gguf_embed_choose(const char * name) {
    const auto * const kernels = gguf_embed::supported_kernels(name);
    if (kernels == nullptr) return 0;
    gguf_embed::chosen_kernels() = kernels;
    return 1;
}

}  // extern "C"
