// What a ggml backend must hand over, as llama.cpp 0c1e57098 (llama-cpp-python 0.3.36) lays it out.
//
// ggml's public headers are installed with llama-cpp-python; these tables are not. ggml checks
// the version of the tables when it loads us. It does not check the layout of its tensors and
// graphs: `gguf_embed/native/accelerator.py` loads us beside exactly this version only.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

extern "C" {

constexpr int plugin_api_version = 2;

struct ggml_backend_i {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void * set_tensor_async;
    void * get_tensor_async;
    void * set_tensor_2d_async;
    void * get_tensor_2d_async;
    void * cpy_tensor_async;
    void * synchronize;
    void * graph_plan_create;
    void * graph_plan_free;
    void * graph_plan_update;
    void * graph_plan_compute;
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void * event_record;
    void * event_wait;
    void * graph_optimize;
};

struct ggml_backend {
    ggml_guid_t guid;
    ggml_backend_i iface;
    ggml_backend_dev_t device;
    void * context;
};

struct ggml_backend_device_i {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t * free, size_t * total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char * params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void *, size_t size, size_t max_tensor_size);
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    void * offload_op;
    void * event_new;
    void * event_free;
    void * event_synchronize;
};

struct ggml_backend_device {
    ggml_backend_device_i iface;
    ggml_backend_reg_t reg;
    void * context;
};

struct ggml_backend_reg_i {
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
    void * (*get_proc_address)(ggml_backend_reg_t, const char *);
};

struct ggml_backend_reg {
    int api_version;
    ggml_backend_reg_i iface;
    void * context;
};

struct ggml_hash_set {
    size_t size;
    uint32_t * used;  // a bit each
    ggml_tensor ** keys;
};

struct ggml_cgraph {
    int size;
    int n_nodes;
    int n_leafs;
    ggml_tensor ** nodes;
    ggml_tensor ** grads;
    ggml_tensor ** grad_accs;
    ggml_tensor ** leafs;
    int32_t * use_counts;  // by place in the set
    ggml_hash_set visited_hash_set;
    int order;
    uint64_t uid;
};

}  // extern "C"
