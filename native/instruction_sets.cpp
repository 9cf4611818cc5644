// Which instruction sets were compiled. native/build.py names their functions in `SETS`.

#include "kernels.h"

namespace gguf_embed {

const Kernels * kernels_at(int number) {
    constexpr const Kernels * (*sets[])() = {SETS};
    constexpr int n = sizeof sets / sizeof *sets;
    return number < n ? sets[number]() : nullptr;
}

}  // namespace gguf_embed
