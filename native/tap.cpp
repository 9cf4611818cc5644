// Takes rows out of a graph of llama.cpp while it is computed. It is called for each node of the graph, some
// thousand times for a text, which in Python would wait each time for whoever holds the interpreter.

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <cstring>

extern "C" {

// As `gguf_embed/native/tap.py` has it.
struct gguf_embed_taken {
    const char * name;  // of the tensor
    float * rows;
    int64_t dim;
    int64_t n_rows_max;
    int64_t n_rows;  // more than `n_rows_max` where the tensor is another one than was expected
};

GGML_BACKEND_API bool gguf_embed_tap(ggml_tensor *, bool, void *);

// A ggml_backend_sched_eval_callback. False after the tensor ends the graph there.
bool gguf_embed_tap(ggml_tensor * t, bool ask, void * data) {
    auto & taken = *static_cast<gguf_embed_taken *>(data);
    if (ask) return std::strcmp(ggml_get_name(t), taken.name) == 0;
    const int64_t n = ggml_nrows(t);
    if (t->type != GGML_TYPE_F32 || t->ne[0] != taken.dim || !ggml_is_contiguous(t) || taken.n_rows + n > taken.n_rows_max) {
        taken.n_rows = taken.n_rows_max + 1;
        return false;
    }
    if (n > 0) ggml_backend_tensor_get(t, taken.rows + taken.n_rows * taken.dim, 0, ggml_nbytes(t));
    taken.n_rows += n;
    return false;
}

}  // extern "C"
