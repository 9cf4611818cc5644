// The kernels. Compiled once for each instruction set (native/build.py says with which flags): `ISA`
// is its struct, which names its vectors and the few instructions that differ, and `KERNELS` is the
// function that gives its table.
//
// A product works on a strip of columns: one block of their weights is unpacked into the first
// level cache, as pairs of int16 (or as floats), and used for all rows. The rows are int16 with a
// scale for each row and block. Scales are chosen by the length of the vector, so that by
// Cauchy-Schwarz no sum of products leaves 32 bits: sums are exact, and a block is converted to
// float once.
//
// Compile with -ffp-contract=off: a compiler that turns some multiplications and additions into
// one, and others not, gives a row another result in another tile.
//
// Nothing in here may be shared between the units, as inline functions of a library are: the linker
// keeps one of them, perhaps the one with instructions that the processor does not have.

#include "kernels.h"

#if defined __AMX_INT8__ || defined __AMXINT8__  // the second: clang before 16
#include "amx.h"
#elif defined __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

#include <math.h>

#include <cstring>
#include <type_traits>

namespace gguf_embed {
namespace {

float half_to_float(const void * p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
float larger(float a, float b) { return a > b ? a : b; }

// ------------------------------------------------------------------------------- weight formats

// A vector of int16 must be shorter than this: then no sum of products leaves 32 bits, with room
// for what rounding adds.
constexpr float longest = 46300.0f;

// No number of a row, or of a column, is larger: then the sum of two is an int16. A part of quantized weights has 16 or
// 32 numbers of one bound and is shorter than `longest`: they stay below 11,600.
constexpr float largest_of_row = 20000.0f, largest_of_column = 12700.0f;

constexpr int max_block = 512;       // inner values with one scale
constexpr int float_block = 256;     // of the float kernel; its sums go on from block to block
constexpr int max_parts = max_block / 16;

constexpr int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// What the parts of a block are multiplied with, and what is taken away.
struct Scales {
    float factor_unit, offset_unit;
    int8_t factors[16], offsets[16];
};

// The parts of a block, 16 inner values each, as bytes and what they are multiplied with.
// `inner` is where a part begins, within its block of weights.
//
// A format has: `values` and `bytes` of its own block; `largest` magnitude of a byte; whether it
// has an `offset`; `scales`, which reads factor and offset of each part of a block, or a `half` that
// is the only factor; `part`, which loads four rows of bytes, each with 16 values of the
// columns c, c + 4, ... in its lanes; and `row`, which loads 32 values of one column, and is called
// of the format for `Isa::Bytes`, whose vectors are so long.
template <class Isa> struct Q8_0 {
    static constexpr int values = 32, bytes = 34, lowest = -128, highest = 127, part_values = 32;
    static constexpr bool offset = false;
    static constexpr bool half = true;  // before everything else
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            const char * p[Isa::lanes];
            for (int c = 0; c < Isa::lanes; c += 4) p[c] = blocks[row + c] + 2 + inner;
            out[row] = Isa::lanes_of(p);
        }
    }
    template <int> static typename Isa::Ints row(const char * block) { return Isa::load(block + 2); }
};

// Bytes at `at`, the low four bits where the part is in the first half, else the high four.
template <class Isa, int at, bool high> void nibbles(const char * const * blocks, int row, typename Isa::Ints & out) {
    const char * p[Isa::lanes];
    for (int c = 0; c < Isa::lanes; c += 4) p[c] = blocks[row + c] + at;
    out = Isa::lanes_of(p);
    if (high) out = Isa::template down16<4>(out);
    out = Isa::both(out, Isa::all_bytes(15));
}

// The low or the high four bits of 32 bytes.
template <class Isa, bool high> typename Isa::Ints low_or_high(const char * from) {
    auto bytes = Isa::load(from);
    if (high) bytes = Isa::template down16<4>(bytes);
    return Isa::both(bytes, Isa::all_bytes(15));
}

template <class Isa> struct Q4_0 {
    static constexpr int values = 32, bytes = 18, lowest = -8, highest = 7, part_values = 32;
    static constexpr bool offset = false;
    static constexpr bool half = true;  // before everything else
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 2, inner == 16>(blocks, row, out[row]);
            out[row] = Isa::minus8(out[row], Isa::all_bytes(8));
        }
    }
    template <int> static typename Isa::Ints row(const char * block) {
        return Isa::minus8(Isa::nibbles_of(block + 2), Isa::all_bytes(8));
    }
};

template <class Isa> struct Iq4_nl {
    static constexpr int values = 32, bytes = 18, lowest = -127, highest = 113, part_values = 32;
    static constexpr bool offset = false;
    static constexpr bool half = true;  // before everything else
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 2, inner == 16>(blocks, row, out[row]);
            out[row] = Isa::looked_up(Isa::table(iq4_values), out[row]);
        }
    }
    template <int> static typename Isa::Ints row(const char * block) {
        return Isa::looked_up(Isa::table(iq4_values), Isa::nibbles_of(block + 2));
    }
};

template <class Isa> struct Iq4_xs {
    static constexpr int values = 256, bytes = 136, lowest = -127, highest = 113, part_values = 32;
    static constexpr bool half = false;
    static constexpr bool offset = false;
    static void scales(const char * block, Scales & scales) {
        scales.factor_unit = half_to_float(block);
        uint16_t high;
        std::memcpy(&high, block + 2, sizeof high);
        for (int i = 0; i < 8; i++) {
            const int low = static_cast<uint8_t>(block[4 + i / 2]) >> (4 * (i % 2)) & 15;
            scales.factors[i] = static_cast<int8_t>((low | (high >> (2 * i) & 3) << 4) - 32);
        }
    }
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 8 + inner / 32 * 16, inner % 32 == 16>(blocks, row, out[row]);
            out[row] = Isa::looked_up(Isa::table(iq4_values), out[row]);
        }
    }
    template <int inner> static typename Isa::Ints row(const char * block) {
        return Isa::looked_up(Isa::table(iq4_values), Isa::nibbles_of(block + 8 + inner / 2));
    }
};

template <class Isa> struct Q5_0 {
    static constexpr int values = 32, bytes = 22, lowest = -16, highest = 15, part_values = 32;
    static constexpr bool offset = false;
    static constexpr bool half = true;  // before everything else
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        static constexpr int8_t which[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
        static constexpr int8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128};
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 6, inner == 16>(blocks, row, out[row]);
            uint32_t bits[Isa::lanes];
            for (int c = 0; c < Isa::lanes; c += 4) {
                std::memcpy(&bits[c], blocks[row + c] + 2, 4);
                bits[c] >>= inner;
            }
            auto high = Isa::looked_up(Isa::lanes_of_bits(bits), Isa::table(which));
            high = Isa::equal8(Isa::both(high, Isa::table(bit)), Isa::table(bit));
            // q - 16 without the high bit, q with it
            const auto without = Isa::minus8(Isa::all_bytes(0), Isa::all_bytes(16));
            out[row] = Isa::minus8(Isa::either(out[row], without), Isa::both(high, without));
        }
    }
    template <int> static typename Isa::Ints row(const char * block) {
        uint32_t bits;
        std::memcpy(&bits, block + 2, sizeof bits);
        const auto without = Isa::minus8(Isa::all_bytes(0), Isa::all_bytes(16));
        return Isa::minus8(Isa::either(Isa::nibbles_of(block + 6), without), Isa::both(Isa::bytes_of_bits(bits), without));
    }
};

// Six bits of scale and of minimum for each of eight parts, packed into 12 bytes.
inline void unpack_k_scales(const char * block, Scales & scales) {
    uint32_t packed[3];
    std::memcpy(packed, block + 4, sizeof packed);
    const auto high = [&](uint32_t low_bits, uint32_t high_bits) {
        return (low_bits & 0x0f0f0f0f) | (high_bits >> 6 & 0x03030303) << 4;
    };
    const uint32_t factors[2] = {packed[0] & 0x3f3f3f3f, high(packed[2], packed[0])};
    const uint32_t offsets[2] = {packed[1] & 0x3f3f3f3f, high(packed[2] >> 4, packed[1])};
    std::memcpy(scales.factors, factors, sizeof factors);
    std::memcpy(scales.offsets, offsets, sizeof offsets);
    scales.factor_unit = half_to_float(block);
    scales.offset_unit = half_to_float(block + 2);
}

template <class Isa> struct Q4_k {
    static constexpr int values = 256, bytes = 144, lowest = 0, highest = 15, part_values = 32;
    static constexpr bool half = false;
    static constexpr bool offset = true;
    static void scales(const char * block, Scales & scales) { unpack_k_scales(block, scales); }
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 16 + inner / 64 * 32 + inner % 32, inner % 64 >= 32>(blocks, row, out[row]);
        }
    }
    template <int inner> static typename Isa::Ints row(const char * block) {
        return low_or_high<Isa, inner % 64 >= 32>(block + 16 + inner / 64 * 32);
    }
};

template <class Isa> struct Q5_k {
    static constexpr int values = 256, bytes = 176, lowest = 0, highest = 31, part_values = 32;
    static constexpr bool half = false;
    static constexpr bool offset = true;
    static void scales(const char * block, Scales & scales) { unpack_k_scales(block, scales); }
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, 48 + inner / 64 * 32 + inner % 32, inner % 64 >= 32>(blocks, row, out[row]);
            const char * p[Isa::lanes];
            for (int c = 0; c < Isa::lanes; c += 4) p[c] = blocks[row + c] + 16 + inner % 32;
            const auto bit = Isa::all_bytes(1 << inner / 32);
            const auto has = Isa::equal8(Isa::both(Isa::lanes_of(p), bit), bit);
            out[row] = Isa::either(out[row], Isa::both(has, Isa::all_bytes(16)));
        }
    }
    template <int inner> static typename Isa::Ints row(const char * block) {
        const auto bit = Isa::all_bytes(1 << inner / 32);
        const auto has = Isa::equal8(Isa::both(Isa::load(block + 16), bit), bit);
        return Isa::either(low_or_high<Isa, inner % 64 >= 32>(block + 48 + inner / 64 * 32), Isa::both(has, Isa::all_bytes(16)));
    }
};

template <class Isa> struct Q6_k {
    static constexpr int values = 256, bytes = 210, lowest = -32, highest = 31, part_values = 16;
    static constexpr bool half = false;
    static constexpr bool offset = false;
    static void scales(const char * block, Scales & scales) {
        scales.factor_unit = half_to_float(block + 208);
        std::memcpy(scales.factors, block + 192, 16);
    }
    template <int inner> static void part(const char * const * blocks, typename Isa::Ints (&out)[4]) {
        constexpr int half = inner / 128, within = inner % 128, quarter = within / 32;
        for (int row = 0; row < 4; row++) {
            nibbles<Isa, half * 64 + quarter % 2 * 32 + within % 32, quarter >= 2>(blocks, row, out[row]);
            const char * p[Isa::lanes];
            for (int c = 0; c < Isa::lanes; c += 4) p[c] = blocks[row + c] + 128 + half * 32 + within % 32;
            auto high = Isa::template down16<2 * quarter>(Isa::lanes_of(p));
            high = Isa::template up16<4>(Isa::both(high, Isa::all_bytes(3)));
            out[row] = Isa::minus8(Isa::either(out[row], high), Isa::all_bytes(32));
        }
    }
    template <int inner> static typename Isa::Ints row(const char * block) {
        constexpr int half_block = inner / 128, quarter = inner % 128 / 32;
        auto high = Isa::template down16<2 * quarter>(Isa::load(block + 128 + half_block * 32));
        high = Isa::template up16<4>(Isa::both(high, Isa::all_bytes(3)));
        const auto low = low_or_high<Isa, quarter >= 2>(block + half_block * 64 + quarter % 2 * 32);
        return Isa::minus8(Isa::either(low, high), Isa::all_bytes(32));
    }
};

// ---------------------------------------------------------------------------- unpacking a strip

template <class Isa> constexpr int strip_columns = 2 * Isa::lanes;

// How a block of a strip is made ready. Many rows: pairs of inner values of all columns side by
// side. Few rows: the numbers of a column side by side, which costs less; those of Q8_0 are
// unpacked as they are multiplied. The sums are the same integers.
enum class Form { pairs, columns, bytes };

// A block of a strip: int16 pairs [inner / 2][column][2], or bytes of tiles, [inner / 4][low, high][column][4] for
// so many columns after the others; and what a column's sum is scaled with.
template <class Isa> struct Strip {
    alignas(64) int16_t pairs[max_block * strip_columns<Isa>];
    alignas(64) float scale[strip_columns<Isa>];
    alignas(64) int32_t before[strip_columns<Isa>];  // what its sums begin with: see `crossed_tile`

    // For few rows the numbers of a column lie side by side instead. Bytes of tiles begin at their first column's.
    int16_t * column(int c) { return pairs + c * max_block; }
};

// Scales of a format for a block of all columns, as they are multiplied: [part][column].
template <class Isa> struct Factors {
    alignas(64) float factor[max_parts][strip_columns<Isa>];
    alignas(64) float offset[max_parts][strip_columns<Isa>];
    alignas(64) int32_t factor16[max_parts][strip_columns<Isa>];  // twice in each 32 bits
    alignas(64) int32_t offset16[max_parts][strip_columns<Isa>];
};

// Chooses the scale of each column and turns factors into int16.
template <class Isa, class Format> void settle(Factors<Isa> & f, int n_parts, float * scale) {
    for (int c = 0; c < strip_columns<Isa>; c += Isa::lanes) {
        auto squares = Isa::zero_floats(), factors = Isa::zero_floats(), offsets = Isa::zero_floats();
        for (int i = 0; i < n_parts; i++) {
            const auto factor = Isa::load_floats(&f.factor[i][c]);
            auto low = Isa::mul(factor, Isa::all(Format::lowest)), high = Isa::mul(factor, Isa::all(Format::highest));
            if (Format::offset) {
                const auto offset = Isa::load_floats(&f.offset[i][c]);
                low = Isa::sub(low, offset);
                high = Isa::sub(high, offset);
                offsets = Isa::max(offsets, Isa::magnitude(offset));
            }
            const auto bound = Isa::max(Isa::magnitude(low), Isa::magnitude(high));
            squares = Isa::fma(bound, bound, squares);
            factors = Isa::max(factors, Isa::magnitude(factor));
        }
        auto unit = Isa::div(Isa::root(Isa::mul(squares, Isa::all(Format::part_values))), Isa::all(longest));
        const auto enough = Isa::max(Isa::mul(factors, Isa::all(128.0f / 32700.0f)), Isa::div(offsets, Isa::all(16000.0f)));
        unit = Isa::max(unit, enough);
        // Weights that are not finite give a result that is not.
        Isa::store_floats(scale + c, unit);
        const auto inverse = Isa::div(Isa::all(1.0f), unit);
        const auto per_unit = Isa::where_between(inverse, unit, Isa::all(1e-36f), Isa::all(1e36f));
        for (int i = 0; i < n_parts; i++) {
            const auto factor_up = Isa::mul(per_unit, Isa::all(128.0f));
            Isa::store(&f.factor16[i][c], Isa::twice(Isa::to_ints(Isa::mul(Isa::load_floats(&f.factor[i][c]), factor_up))));
            if (Format::offset) {
                Isa::store(&f.offset16[i][c], Isa::twice(Isa::to_ints(Isa::mul(Isa::load_floats(&f.offset[i][c]), per_unit))));
            }
        }
    }
}

// 16 inner values of the columns of one vector: eight rows of pairs, or the bytes of tiles.
template <class Isa, class Format, int inner>
inline void unpack_part(const char * const * blocks, const Factors<Isa> & f, int first_part, int column, int16_t * pairs) {
    using Ints = typename Isa::Ints;
    Ints rows[4];
    Format::template part<inner>(blocks, rows);
    const int part = first_part + inner / Format::part_values;
    const Ints factor = Isa::load(&f.factor16[part][column]);
    const auto unpacked = [&](Ints upper_bytes) {
        const Ints numbers = Isa::scaled(upper_bytes, factor);
        return Format::offset ? Isa::minus16(numbers, Isa::load(&f.offset16[part][column])) : numbers;
    };
    if constexpr (Isa::has_tiles) {
        const Ints a = Isa::low32(rows[0], rows[1]), b = Isa::low32(rows[2], rows[3]);
        const Ints c = Isa::high32(rows[0], rows[1]), d = Isa::high32(rows[2], rows[3]);
        const Ints four[4] = {Isa::low64(a, b), Isa::high64(a, b), Isa::low64(c, d), Isa::high64(c, d)};
        for (int i = 0; i < 4; i++) {
            const Ints even = unpacked(Isa::template up16<8>(four[i])), odd = unpacked(Isa::both(four[i], Isa::upper_bytes()));
            Isa::store_bytes(even, odd, pairs + column * max_block + (inner + 4 * i) * Isa::tile_columns);
        }
    } else {
        const Ints a = Isa::low16(rows[0], rows[1]), b = Isa::low16(rows[2], rows[3]);
        const Ints c = Isa::high16(rows[0], rows[1]), d = Isa::high16(rows[2], rows[3]);
        const Ints two[4] = {Isa::low32(a, b), Isa::high32(a, b), Isa::low32(c, d), Isa::high32(c, d)};
        for (int i = 0; i < 4; i++) {
            int16_t * const to = pairs + (Isa::place_of(inner + 4 * i) / 2 * strip_columns<Isa> + column) * 2;
            Isa::store(to, unpacked(Isa::low_bytes_up(two[i])));
            Isa::store(to + strip_columns<Isa> * 2, unpacked(Isa::high_bytes_up(two[i])));
        }
    }
}

template <class Isa, class Format, int inner>
inline void unpack_parts(const char * const * blocks, const Factors<Isa> & f, int part, int column, int16_t * pairs) {
    unpack_part<Isa, Format, inner>(blocks, f, part, column, pairs);
    if constexpr (inner + 16 < Format::values) unpack_parts<Isa, Format, inner + 16>(blocks, f, part, column, pairs);
}

// 32 inner values of one column.
template <class Isa, class Format, int inner>
inline void unpack_row(const char * block, const Factors<Isa> & f, int first_part, int column, int16_t * to) {
    using Ints = typename Isa::Ints;
    const auto of_parts = [&](const int32_t (&numbers)[max_parts][strip_columns<Isa>]) {
        const int part = first_part + inner / Format::part_values;
        if (Format::part_values == Isa::group) return Isa::all_ints(numbers[part][column]);
        return Isa::halves(numbers[part][column], numbers[part + 1][column]);
    };
    const auto bytes = Format::template row<inner>(block);
    const Ints factor = of_parts(f.factor16);
#pragma GCC unroll 2
    for (int i = 0; i < Isa::group_vectors; i++) {
        Ints numbers = Isa::scaled(Isa::bytes_up(bytes, i), factor);
        if (Format::offset) numbers = Isa::minus16(numbers, of_parts(f.offset16));
        Isa::store(to + inner + i * 2 * Isa::lanes, numbers);
    }
    if constexpr (inner + Isa::group < Format::values) {
        unpack_row<Isa, Format, inner + Isa::group>(block, f, first_part, column, to);
    }
}

// `columns` point to the block's first byte; columns beyond the matrix repeat the last one.
template <class Isa, class Format> void read_scales(const char * const * columns, int n_blocks, Factors<Isa> & f) {
    if constexpr (Format::half) {
        for (int c = 0; c < strip_columns<Isa>; c += Isa::lanes) {
            for (int i = 0; i < n_blocks; i++) {
                Isa::store_floats(&f.factor[i][c], Isa::from_halves_of(columns + c, int64_t{i} * Format::bytes));
            }
        }
    } else {
        constexpr int parts = Format::values / Format::part_values;
        static_assert(parts % 8 == 0);
        for (int i = 0; i < n_blocks; i++) {
            for (int half = 0; half < strip_columns<Isa>; half += Isa::lanes) {
                Scales scales[Isa::lanes];
                for (int c = 0; c < Isa::lanes; c++) Format::scales(columns[half + c] + i * Format::bytes, scales[c]);
                for (int j = 0; j < parts; j += 8) {
                    typename Isa::Floats v[8];
                    const auto turned = [&](float (*to)[strip_columns<Isa>]) {
                        Isa::turn_eight(v);
                        for (int k = 0; k < 8; k++) Isa::store_floats(&to[i * parts + j + k][half], v[k]);
                    };
                    for (int c = 0; c < 8; c++) {
                        v[c] = Isa::eight_of([&](int of) { return scales[of].factor_unit; }, [&](int of) { return scales[of].factors + j; }, c);
                    }
                    turned(f.factor);
                    if (!Format::offset) continue;
                    for (int c = 0; c < 8; c++) {
                        v[c] = Isa::eight_of([&](int of) { return scales[of].offset_unit; }, [&](int of) { return scales[of].offsets + j; }, c);
                    }
                    turned(f.offset);
                }
            }
        }
    }
}

template <class Isa, template <class> class FormatOf>
void unpack(const char * const * columns, int64_t n_inner, Factors<Isa> & f, Strip<Isa> & strip, Form form) {
    using Format = FormatOf<Isa>;
    constexpr int parts = Format::values / Format::part_values;
    const int n_blocks = static_cast<int>(n_inner / Format::values);
    read_scales<Isa, Format>(columns, n_blocks, f);
    settle<Isa, Format>(f, n_blocks * parts, strip.scale);
    if (form == Form::bytes) return;
    if (form == Form::columns) {
        for (int c = 0; c < strip_columns<Isa>; c++) {
            for (int i = 0; i < n_blocks; i++) {
                unpack_row<Isa, FormatOf<typename Isa::Bytes>, 0>(columns[c] + i * Format::bytes, f, i * parts, c, strip.column(c) + i * Format::values);
            }
        }
        return;
    }
    for (int c = 0; c < strip_columns<Isa>; c += Isa::lanes) {
        for (int i = 0; i < n_blocks; i++) {
            const char * blocks[Isa::lanes];
            for (int j = 0; j < Isa::lanes; j++) blocks[j] = columns[c + j] + i * Format::bytes;
            constexpr int width = Isa::has_tiles ? Isa::lanes : strip_columns<Isa>;  // columns that lie together
            unpack_parts<Isa, Format, 0>(blocks, f, i * parts, c, strip.pairs + int64_t{i} * Format::values * width);
        }
    }
}

// The unit of a vector of floats as int16 of at most `limit`, and its inverse, which is 0 where the vector is all
// zeros or not finite.
template <class Isa> float unit_of(const float * x, int64_t n, float limit, float & unit) {
    using Floats = typename Isa::Floats;
    Floats squares = Isa::zero_floats(), top = Isa::zero_floats();
    const auto take = [&](const float * from, Floats & to_squares, Floats & to_top) {
        const auto v = Isa::load_floats(from);
        to_squares = Isa::fma(v, v, to_squares);
        to_top = Isa::max(to_top, Isa::magnitude(v));
    };
    constexpr int chains = 4;  // that do not wait for each other
    int64_t i = 0;
    if (n >= chains * Isa::lanes) {
        Floats each_squares[chains], each_top[chains];
        for (int c = 0; c < chains; c++) each_squares[c] = each_top[c] = Isa::zero_floats();
        for (; i + chains * Isa::lanes <= n; i += chains * Isa::lanes) {
#pragma GCC unroll 4
            for (int c = 0; c < chains; c++) take(x + i + c * Isa::lanes, each_squares[c], each_top[c]);
        }
        for (int c = 0; c < chains; c++) {
            squares = Isa::add(squares, each_squares[c]);
            top = Isa::max(top, each_top[c]);
        }
    }
    for (; i + Isa::lanes <= n; i += Isa::lanes) take(x + i, squares, top);
    float square = Isa::sum(squares), largest = Isa::largest(top);
    for (; i < n; i++) {
        square += x[i] * x[i];
        largest = larger(largest, fabsf(x[i]));
    }
    unit = larger(sqrtf(square) * (1 / longest), largest * (1 / limit));  // a division would cost as much as the root
    if (!(square < 1e30f) || (square < 1e-30f && largest > 0)) {  // out of range, or not a number
        double sum = 0, most = 0;
        for (i = 0; i < n; i++) {
            sum += double{x[i]} * x[i];
            most = most > fabs(double{x[i]}) ? most : fabs(double{x[i]});
        }
        const double exact = sqrt(sum) / longest;
        unit = static_cast<float>(exact > most / limit ? exact : most / limit);
        if (sum != sum) unit = NAN;
    }
    return unit > 1e-37f && unit < 1e37f ? 1.0f / unit : 0.0f;
}

template <int64_t unit> constexpr int64_t rounded_up(int64_t n) { return (n + unit - 1) / unit * unit; }

// A group of int16 is whole: zeros follow the last number.
template <class Isa> constexpr int64_t whole_groups(int64_t n) { return rounded_up<Isa::group>(n); }

// Numbers that a block of all rows takes. Tiles are whole.
template <class Isa> int64_t block_size(int64_t block, int64_t n_rows) {
    if constexpr (Isa::has_tiles) return rounded_up<Isa::tile_inner>(block) * rounded_up<Isa::tile_rows>(n_rows);
    return block * n_rows;
}

template <class Isa> int64_t quantized_size(int64_t n_rows, int64_t n_inner, int64_t block) {
    return (n_inner + block - 1) / block * block_size<Isa>(whole_groups<Isa>(block), n_rows);
}

template <class Isa> void to_int16(const float * x, int64_t n, float per_unit, int16_t * out) {
    const auto factor = Isa::all(per_unit);
    const auto store = [&](const float * from, int16_t * to) {
        constexpr int n_vectors = Isa::group / Isa::lanes;
        typename Isa::Ints numbers[n_vectors];
        for (int i = 0; i < n_vectors; i++) numbers[i] = Isa::to_ints(Isa::mul(Isa::load_floats(from + i * Isa::lanes), factor));
        Isa::store_group(to, numbers);
    };
    if (!(per_unit > 0)) {
        std::memset(out, 0, static_cast<size_t>(whole_groups<Isa>(n)) * sizeof *out);
        return;
    }
    int64_t i = 0;
    for (; i + Isa::group <= n; i += Isa::group) store(x + i, out + i);
    if (i < n) {
        alignas(64) float rest[Isa::group] = {};
        std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof *x);
        store(rest, out + i);
    }
}

// Columns of int16, `stride` apart, as many as lanes: the pairs of each go side by side.
template <class Isa> void turn(const int16_t * columns, int64_t stride, int64_t n_inner, int16_t * pairs) {
    for (int64_t i = 0; i < n_inner; i += 2 * Isa::lanes) {
        typename Isa::Floats v[Isa::lanes];
#pragma GCC unroll 16
        for (int c = 0; c < Isa::lanes; c++) v[c] = Isa::as_floats(Isa::load(columns + c * stride + i));
        Isa::transpose(v);
        int16_t * const to = pairs + i * strip_columns<Isa>;
#pragma GCC unroll 16
        for (int j = 0; j < Isa::lanes; j++) Isa::store(to + j * strip_columns<Isa> * 2, Isa::as_ints(v[j]));
    }
}

// The same as bytes of tiles.
template <class Isa> void turn_bytes(const int16_t * columns, int64_t stride, int64_t n_inner, int16_t * to) {
    for (int64_t i = 0; i < n_inner; i += Isa::tile_inner) {
        typename Isa::Floats low[Isa::lanes], high[Isa::lanes];
        for (int c = 0; c < Isa::lanes; c++) Isa::split(columns + c * stride + i, low[c], high[c]);
        Isa::transpose(low);
        Isa::transpose(high);
        for (int j = 0; j < Isa::lanes; j++) {
            int16_t * const row = to + (i + 4 * j) * Isa::tile_columns;
            Isa::store(row, Isa::as_ints(low[j]));
            Isa::store(row + 2 * Isa::tile_columns, Isa::as_ints(high[j]));
        }
    }
}

// Columns that `load(column, n, floats)` makes floats of: as int16 with the scale of each column's own values,
// then turned, so that the pairs of all columns lie side by side.
template <class Isa, class Load>
void unpack_by_floats(const char * const * columns, int64_t n_inner, Strip<Isa> & strip, Form form, Load load) {
    alignas(64) float floats[max_block];
    alignas(64) int16_t ints[Isa::lanes][max_block];
    const bool few = form == Form::columns;
    for (int half = 0; half < strip_columns<Isa>; half += Isa::lanes) {
        for (int c = 0; c < Isa::lanes; c++) {
            load(columns[half + c], n_inner, floats);
            int16_t * const to = few ? strip.column(half + c) : ints[c];
            to_int16<Isa>(floats, n_inner, unit_of<Isa>(floats, n_inner, largest_of_column, strip.scale[half + c]), to);
        }
        if (few) continue;
        if constexpr (Isa::has_tiles) {
            turn_bytes<Isa>(ints[0], max_block, n_inner, strip.column(half));
        } else {
            turn<Isa>(ints[0], max_block, whole_groups<Isa>(n_inner), strip.pairs + 2 * half);
        }
    }
}

// Numbers of 16 bits, which `of(memory)` makes a vector of floats of; there may be others behind the last.
template <class Isa, class Of> void floats_of_halves(const char * from, int64_t n, float * to, Of of) {
    int64_t i = 0;
    for (; i + Isa::lanes <= n; i += Isa::lanes) Isa::store_floats(to + i, of(from + 2 * i));
    if (i < n) {
        alignas(64) char part[Isa::lanes * sizeof(float)] = {};
        std::memcpy(part, from + 2 * i, static_cast<size_t>(2 * (n - i)));
        Isa::store_floats(to + i, of(part));
    }
}

// ------------------------------------------------------------------------------ small functions

// 2^x of what is not above 126, to about 2e-7 of it; 0 up to -127. What is not a number stays so.
template <class Isa> inline typename Isa::Floats two_to(typename Isa::Floats x) {
    x = Isa::max(Isa::all(-127.0f), x);
    constexpr float shift = 3 << 22;  // its sum with x has the nearest integer in its lowest bits
    const auto shifted = Isa::add(x, Isa::all(shift));
    const auto f = Isa::sub(x, Isa::sub(shifted, Isa::all(shift)));
    auto p = Isa::all(1.32647273e-3f);  // the least largest error for |f| up to 1/2, and exact for 0
    p = Isa::fma(p, f, Isa::all(9.67151299e-3f));
    p = Isa::fma(p, f, Isa::all(5.55073358e-2f));
    p = Isa::fma(p, f, Isa::all(2.40222424e-1f));
    p = Isa::fma(p, f, Isa::all(6.93147004e-1f));
    p = Isa::fma(p, f, Isa::all(1.0f));
    return Isa::exponent_raised(p, shifted);
}

constexpr float log2_e = 1.44269504f;

// x / (1 + 2^y)
template <class Isa> inline typename Isa::Floats gated(typename Isa::Floats x, typename Isa::Floats y) {
    return Isa::div(x, Isa::add(Isa::all(1.0f), two_to<Isa>(Isa::min(Isa::all(126.0f), y))));
}

// x sigmoid(x) y
template <class Isa> inline typename Isa::Floats swiglu_of(typename Isa::Floats x, typename Isa::Floats y) {
    return Isa::mul(gated<Isa>(x, Isa::mul(x, Isa::all(-log2_e))), y);
}

// x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
template <class Isa> inline typename Isa::Floats gelu(typename Isa::Floats x) {
    const auto inner = Isa::fma(Isa::mul(x, x), Isa::all(0.044715f), Isa::all(1.0f));
    return gated<Isa>(x, Isa::mul(Isa::mul(x, inner), Isa::all(-1.5957691216f * log2_e)));
}

// ------------------------------------------------------------------------------ register tiles

// Where the numbers of a tile's rows lie: each row by itself, or dealt out, four numbers of each in turn. Dealt
// out, they are one stream, which comes sooner from beyond the second level cache.
template <int R> struct RowsApart {
    const int16_t * rows[R];
    RowsApart(const int16_t * x, int64_t stride) {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) rows[r] = x + r * stride;
    }
    const int16_t * at(int row, int64_t pair) const { return rows[row] + 2 * pair; }  // an even one
};

template <int R> struct RowsDealt {
    const int16_t * x;
    const int16_t * at(int row, int64_t pair) const { return x + 2 * pair * R + 4 * row; }
};

// Adds to the sums of R rows and two vectors of columns those over `n_pairs` pairs of inner values.
template <class Isa, int R, class Rows>
inline void integer_tile(const int16_t * strip, Rows rows, int64_t n_pairs, typename Isa::Ints (&sums)[R][2]) {
    for (int64_t i = 0; i < n_pairs; i += 2) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            auto left = Isa::load(strip + (i + odd) * strip_columns<Isa> * 2);
            auto right = Isa::load(strip + (i + odd) * strip_columns<Isa> * 2 + Isa::lanes * 2);
            Isa::pin(left);
            Isa::pin(right);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const auto pair = Isa::pair(rows.at(r, i) + 2 * odd);
                Isa::dot(sums[r][0], left, pair);
                Isa::dot(sums[r][1], right, pair);
            }
        }
    }
}

// The same by half as many multiplications: of numbers a, b of a row and c, d of a column,
// (a + d) (b + c) = ac + bd + ab + cd (Winograd, 1968). The sum of all ab belongs to the row and that of all cd to the
// column: the sums begin with what takes them away. They may leave 32 bits on their way; modulo 2^32
// they are exact.
template <class Isa, int R, class Rows>
__attribute__((always_inline)) inline void crossed_tile(const int16_t * strip, Rows rows, int64_t n_pairs,
                                                        typename Isa::Ints (&sums)[R][2]) {
    constexpr int width = strip_columns<Isa> * 2;
    for (int64_t i = 0; i < n_pairs; i += 2) {
        const int16_t * const at = strip + i * width;
        auto left = Isa::load(at), right = Isa::load(at + width / 2);
        auto next_left = Isa::load(at + width), next_right = Isa::load(at + width + width / 2);
        Isa::pin(left);
        Isa::pin(right);
        Isa::pin(next_left);
        Isa::pin(next_right);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const auto pair = Isa::pair(rows.at(r, i)), next = Isa::pair(rows.at(r, i) + 2);
            Isa::dot(sums[r][0], Isa::plus16(pair, next_left), Isa::plus16(next, left));
            Isa::dot(sums[r][1], Isa::plus16(pair, next_right), Isa::plus16(next, right));
        }
    }
}

// What a row's sums begin with.
template <class Isa> int32_t before_row(const int16_t * x, int64_t n) {
    auto sum = Isa::zero();
    for (int64_t i = 0; i < n; i += 2 * Isa::lanes) {
        const auto numbers = Isa::load(x + i);
        Isa::dot(sum, numbers, Isa::second_halves(numbers));
    }
    alignas(64) uint32_t parts[Isa::lanes];
    Isa::store(parts, sum);
    uint32_t all = 0;
    for (const uint32_t part : parts) all -= part;
    return static_cast<int32_t>(all);
}

// And those of a strip's columns.
template <class Isa> void before_columns(const int16_t * strip, int64_t n_pairs, int32_t * before) {
    constexpr int width = strip_columns<Isa> * 2;
    for (int half = 0; half < strip_columns<Isa>; half += Isa::lanes) {
        auto sum = Isa::zero();
        for (int64_t i = 0; i < n_pairs; i += 2) {
            const int16_t * const at = strip + i * width + half * 2;
            Isa::dot(sum, Isa::load(at), Isa::load(at + width));
        }
        Isa::store(before + half, Isa::minus32(Isa::zero(), sum));
    }
}

// The sums of R rows and two vectors of columns, by either of the two. `before_of(r)` is what a row's begin with.
// Always inlined: GCC would keep the sums in memory, which costs a sixth of the speed.
template <class Isa, int R, class Rows, class Before>
__attribute__((always_inline)) inline void whole_tile(const int16_t * strip, const int32_t * before, Rows rows,
                                                      int64_t n_pairs, Before before_of, typename Isa::Ints (&sums)[R][2]) {
    if constexpr (Isa::crosses) {
        const auto left = Isa::load(before), right = Isa::load(before + Isa::lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const auto of_row = Isa::all_ints(before_of(r));
            sums[r][0] = Isa::plus32(left, of_row);
            sums[r][1] = Isa::plus32(right, of_row);
        }
        crossed_tile<Isa, R>(strip, rows, n_pairs, sums);
    } else {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = Isa::zero();
        integer_tile<Isa, R>(strip, rows, n_pairs, sums);
    }
}

// R rows and one column: each lane has a sum of its own, kept in `lane_sums[row * lanes]`. Not
// inlined: the registers of the caller would be taken from the pointers to the rows.
template <class Isa, int R>
__attribute__((noinline)) void column_tile(const int16_t * column, const int16_t * x, int64_t stride, int64_t n,
                                           typename Isa::Ints * lane_sums) {
    constexpr int step = 2 * Isa::lanes, together = 3;  // rows that share a pointer
    typename Isa::Ints sums[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r] = Isa::zero();
    const int16_t * rows[(R + together - 1) / together];
#pragma GCC unroll 12
    for (int r = 0; r < R; r += together) rows[r / together] = x + r * stride;
    for (int64_t i = 0; i < n; i += step) {
        auto weights = Isa::load(column + i);
        Isa::pin(weights);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) Isa::dot(sums[r], weights, Isa::load(rows[r / together] + i + r % together * stride));
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) lane_sums[r * Isa::lanes] = sums[r];
}

// The same straight from the bytes of Q8_0. `factors` are those of the column's parts. One loop for
// both, with the column as an argument, was a sixth slower at 8 and 12 rows.
template <class Isa, int R>
__attribute__((noinline)) void byte_tile(const char * bytes, const int32_t * factors, const int16_t * x, int64_t stride,
                                         int64_t n, typename Isa::Ints * lane_sums) {
    constexpr int together = 3;
    typename Isa::Ints sums[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r] = Isa::zero();
    const int16_t * rows[(R + together - 1) / together];
#pragma GCC unroll 12
    for (int r = 0; r < R; r += together) rows[r / together] = x + r * stride;
    for (int64_t i = 0; i < n; i += Isa::group) {
        const auto whole = Q8_0<typename Isa::Bytes>::template row<0>(bytes);
        const auto factor = Isa::all_ints(*factors);
#pragma GCC unroll 2
        for (int part = 0; part < Isa::group_vectors; part++) {
            auto weights = Isa::scaled(Isa::bytes_up(whole, part), factor);
            Isa::pin(weights);
            const int64_t at = i + part * 2 * Isa::lanes;
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) Isa::dot(sums[r], weights, Isa::load(rows[r / together] + at + r % together * stride));
        }
        bytes += Q8_0<Isa>::bytes;
        factors += strip_columns<Isa>;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) lane_sums[r * Isa::lanes] = sums[r];
}

// The sums go on from what they were: one order over all inner values.
template <class Isa, int R>
inline void float_tile(const float * strip, const float * x, int64_t stride, int64_t n, typename Isa::Floats (&sums)[R][2]) {
    const float * rows[R];
    for (int r = 0; r < R; r++) rows[r] = x + r * stride;
    for (int64_t i = 0; i < n; i++) {
        auto left = Isa::load_floats(strip + i * strip_columns<Isa>);
        auto right = Isa::load_floats(strip + i * strip_columns<Isa> + Isa::lanes);
        Isa::pin(left);
        Isa::pin(right);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const auto value = Isa::all(rows[r][i]);
            sums[r][0] = Isa::fma(left, value, sums[r][0]);
            sums[r][1] = Isa::fma(right, value, sums[r][1]);
        }
    }
}

// ------------------------------------------------------------------------------------ products

// What a thread needs to multiply a strip; the sums of all rows, [row][column], come after it, and then the gate's.
template <class Isa> struct Scratch {
    Strip<Isa> strip;
    Factors<Isa> factors;
    alignas(64) float floats[float_block * strip_columns<Isa>];  // of the float kernel: [inner][column]
    typename Isa::Ints lane_sums[Isa::few_rows][Isa::lanes];  // of few rows: [row][column]
    typename Isa::Parts parts;  // of a tile of many rows
};

constexpr size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

// What a strip's sums become: which rows and columns of the result they are, and where they lie, each row of
// a strip after the other. `gates`: the gate's.
struct Ends {
    int64_t first, last;  // rows
    int64_t column, n_columns;
    const float * sums;
    const float * gates;
};

// Bias, activation and what is added, for columns of V vectors.
template <class Isa, int V, Activation activation> void finish(const Product & p, const Ends & ends) {
    constexpr int width = V * Isa::lanes, stride = strip_columns<Isa>;
    const auto n = static_cast<int>(smaller(width, ends.n_columns));
    typename Isa::Floats bias[V], results[V];
    alignas(64) float padded[width] = {};
    if (p.bias) std::memcpy(padded, p.bias + ends.column, static_cast<size_t>(n) * sizeof(float));
    for (int v = 0; v < V; v++) bias[v] = Isa::load_floats(padded + v * Isa::lanes);
    for (int64_t row = ends.first; row < ends.last; row++) {
        float * const to = p.out + row * p.out_stride + ends.column;
        const float * const residual = p.residual ? p.residual + row * p.residual_stride + ends.column : nullptr;
        for (int v = 0; v < V; v++) {
            const int64_t at = row * stride + v * Isa::lanes;
            results[v] = Isa::add(Isa::load_floats(ends.sums + at), bias[v]);
            if constexpr (activation == Activation::gelu) {
                results[v] = gelu<Isa>(results[v]);
            } else if constexpr (activation == Activation::swiglu) {
                results[v] = swiglu_of<Isa>(Isa::load_floats(ends.gates + at), results[v]);
            }
        }
        if (n == width) {
            for (int v = 0; v < V; v++) {
                if (residual) results[v] = Isa::add(results[v], Isa::load_floats(residual + v * Isa::lanes));
                Isa::store_floats(to + v * Isa::lanes, results[v]);
            }
        } else {
            for (int v = 0; v < V; v++) Isa::store_floats(padded + v * Isa::lanes, results[v]);
            for (int i = 0; i < n; i++) to[i] = residual ? padded[i] + residual[i] : padded[i];
        }
    }
}

template <class Isa, int V> void finish(const Product & p, const Ends & ends) {
    switch (p.activation) {
        case Activation::none: return finish<Isa, V, Activation::none>(p, ends);
        case Activation::gelu: return finish<Isa, V, Activation::gelu>(p, ends);
        case Activation::swiglu: return finish<Isa, V, Activation::swiglu>(p, ends);
    }
}

// Adds the sums of a row and block, of one vector of columns.
template <class Isa>
inline void add_block(typename Isa::Ints whole, typename Isa::Floats scales, float scale, bool first, float * sums) {
    const auto before = first ? Isa::zero_floats() : Isa::load_floats(sums);
    Isa::store_floats(sums, Isa::fma(Isa::to_floats(whole), Isa::mul(scales, Isa::all(scale)), before));
}

template <class Isa, int R>
void integer_rows(const Product & p, int64_t row, int64_t n_inner, int64_t block, const Strip<Isa> & strip, float * sums) {
    typename Isa::Ints whole[R][2];
    const int64_t stride = whole_groups<Isa>(n_inner);
    const int16_t * x = p.quantized + block * block_size<Isa>(p.block, p.n_rows) + row * stride;
    const RowBlock * const of = p.blocks + block * p.n_rows + row;
    whole_tile<Isa, R>(strip.pairs, strip.before, RowsDealt<R>{x}, stride / 2, [&](int r) { return of[r].before; }, whole);
    const auto left = Isa::load_floats(strip.scale), right = Isa::load_floats(strip.scale + Isa::lanes);
    float * to = sums + row * strip_columns<Isa>;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++, to += strip_columns<Isa>) {
        const float scale = of[r].scale;
        add_block<Isa>(whole[r][0], left, scale, block == 0, to);
        add_block<Isa>(whole[r][1], right, scale, block == 0, to + Isa::lanes);
    }
}

// What is needed next is fetched from memory meanwhile.
struct Ahead {
    const char * const * columns;
    int64_t bytes;  // of each
};

template <class Isa> void fetch(const Ahead & ahead, int64_t column) {
    for (int64_t i = 0; i < ahead.bytes; i += 64) Isa::prefetch(ahead.columns[column] + i);
}

// Where some rows of a strip go, and what is added to them: a line of the cache of each.
template <class Isa> void fetch_ends(const Product & p, int64_t row, int64_t n_rows, int64_t column) {
    for (int64_t r = row; r < row + n_rows; r++) {
        Isa::prefetch(reinterpret_cast<const char *>(p.out + r * p.out_stride + column));
        if (p.residual) Isa::prefetch(reinterpret_cast<const char *>(p.residual + r * p.residual_stride + column));
    }
}

// All rows, which are R.
template <class Isa, int R>
void few_rows(const Product & p, int64_t n_inner, int64_t block, const char * const * columns, Form form, Scratch<Isa> & s,
              float * sums, Ahead ahead) {
    const int64_t stride = whole_groups<Isa>(n_inner);
    const int16_t * x = p.quantized + block * block_size<Isa>(p.block, R);
    for (int half = 0; half < strip_columns<Isa>; half += Isa::lanes) {
        for (int c = 0; c < Isa::lanes; c++) {
            fetch<Isa>(ahead, half + c);
            const int column = half + c;
            if (form == Form::bytes) {
                byte_tile<Isa, R>(columns[column], &s.factors.factor16[0][column], x, stride, n_inner, &s.lane_sums[0][c]);
            } else {
                column_tile<Isa, R>(s.strip.column(column), x, stride, stride, &s.lane_sums[0][c]);
            }
        }
        const auto scales = Isa::load_floats(s.strip.scale + half);
        for (int r = 0; r < R; r++) {
            float * const to = sums + r * strip_columns<Isa> + half;
            add_block<Isa>(Isa::sums_of(s.lane_sums[r]), scales, p.blocks[block * R + r].scale, block == 0, to);
        }
    }
}

template <class Isa, int R>
void float_rows(const Product & p, int64_t row, int64_t first, int64_t n_inner, const float * strip, float * sums) {
    typename Isa::Floats whole[R][2];
    for (int r = 0; r < R; r++) {
        const float * from = sums + (row + r) * strip_columns<Isa>;
        whole[r][0] = first ? Isa::load_floats(from) : Isa::zero_floats();
        whole[r][1] = first ? Isa::load_floats(from + Isa::lanes) : Isa::zero_floats();
    }
    float_tile<Isa, R>(strip, p.x + row * p.x_stride + first, p.x_stride, n_inner, whole);
    for (int r = 0; r < R; r++) {
        float * to = sums + (row + r) * strip_columns<Isa>;
        Isa::store_floats(to, whole[r][0]);
        Isa::store_floats(to + Isa::lanes, whole[r][1]);
    }
}

// Calls `work(row, number)` with tiles of at most so many rows, as even as can be.
template <class Isa, int R, class Work> inline void tile_of(int64_t rows, int64_t row, Work & work) {
    if constexpr (R > 1) {
        if (rows < R) return tile_of<Isa, R - 1>(rows, row, work);
    }
    work(row, std::integral_constant<int, R>{});
}

struct Tiling {
    int64_t least, n_larger;  // rows of a tile; the first tiles have one more
    Tiling(int64_t n_rows, int64_t most) {
        const int64_t n_tiles = (n_rows + most - 1) / most;
        least = n_rows / n_tiles;
        n_larger = n_rows % n_tiles;
    }
    int64_t rows_of(int64_t tile) const { return least + (tile < n_larger); }
    int64_t tile_of(int64_t row) const {
        const int64_t tile = row / (least + 1);
        return tile < n_larger ? tile : n_larger + (row - n_larger * (least + 1)) / least;
    }
    int64_t first_of(int64_t tile) const { return tile * least + smaller(tile, n_larger); }
};

template <class Isa, int most = Isa::rows, class Work> void tiles(int64_t n_rows, Work work) {
    if (n_rows < 1) return;
    const Tiling tiling(n_rows, most);
    int64_t tile = 0;
    for (int64_t row = 0; row < n_rows; tile++) {
        const int64_t rows = tiling.rows_of(tile);
        tile_of<Isa, most>(rows, row, work);
        row += rows;
    }
}

// All rows, a register tile after the other. `before(row, n, 0)` is called before n rows.
template <class Isa, class Before>
void vector_rows(const Product & p, int64_t n_inner, int64_t block, Strip<Isa> & strip, float * sums, Before before) {
    if constexpr (Isa::crosses) before_columns<Isa>(strip.pairs, whole_groups<Isa>(n_inner) / 2, strip.before);
    tiles<Isa, Isa::integer_rows>(p.n_rows, [&](int64_t row, auto rows) {
        before(row, rows, 0);
        integer_rows<Isa, rows>(p, row, n_inner, block, strip, sums);
    });
}

// The same by tiles of bytes. While one is multiplied, the one before it is added to the sums, and with
// `ends` done with. `before(row, n, column)` is called before n rows of a tile's columns.
template <class Isa, class Before>
void byte_rows(const Product & p, int64_t n_inner, int64_t block, Scratch<Isa> & s, float * sums, const Ends * ends, Before before) {
    constexpr int width = strip_columns<Isa>;
    const int64_t whole_inner = rounded_up<Isa::tile_inner>(n_inner), n_rows = rounded_up<Isa::tile_rows>(p.n_rows);
    const int16_t * const x = p.quantized + block * block_size<Isa>(p.block, p.n_rows);
    const auto add = [&](int64_t row, int column) {
        const auto scales = Isa::load_floats(s.strip.scale + column);
        const RowBlock * const of = p.blocks + block * p.n_rows + row;
        float * to = sums + row * width + column;
        const auto n = static_cast<int>(smaller(Isa::tile_rows, p.n_rows - row));
        for (int r = 0; r < n; r++, to += width) add_block<Isa>(Isa::whole(s.parts, r), scales, of[r].scale, block == 0, to);
        if (ends && column < ends->n_columns) {
            finish<Isa, 1>(p, {row, row + n, ends->column + column, ends->n_columns - column, sums + column, ends->gates + column});
        }
    };
    const typename Isa::Tiles tiles;
    // Some columns at a time: with all of them the first level cache has no room for the rows.
    for (int column = 0; column < width; column += Isa::tile_columns) {
        for (int64_t row = 0; row < n_rows; row += Isa::tile_rows) {
            before(row, smaller(Isa::tile_rows, p.n_rows - row), column);
            Isa::multiply_bytes(x + row * whole_inner, s.strip.column(column), whole_inner / Isa::tile_inner);
            if (row > 0) add(row - Isa::tile_rows, column);
            Isa::store_parts(s.parts);
        }
        add(n_rows - Isa::tile_rows, column);
    }
}

bool is_integer(Weight type) { return type != Weight::f32; }

int64_t inner_unit(Weight type) {
    switch (type) {
        case Weight::q8_0:
        case Weight::q4_0:
        case Weight::q5_0:
        case Weight::iq4_nl:
        case Weight::f16:
        case Weight::bf16:
            return 32;
        default:
            return 256;
    }
}

int64_t block_of(Weight type, int64_t n_inner) {
    if (!is_integer(type)) return float_block;
    const int64_t unit = inner_unit(type), n_blocks = (n_inner + max_block - 1) / max_block;
    return ((n_inner + n_blocks - 1) / n_blocks + unit - 1) / unit * unit;
}

// Few rows: turning the weights would cost more than summing lanes.
template <class Isa> constexpr bool are_few(int64_t n_rows) { return n_rows <= Isa::few_rows; }

// Four numbers of a row, then those of the other rows of its tile.
inline void deal(const int16_t * numbers, int64_t n, int64_t n_rows, int16_t * to) {
    for (int64_t i = 0; i < n; i += 4) std::memcpy(to + i * n_rows, numbers + i, 4 * sizeof *to);
}

// A row's numbers as bytes, to its places in tiles: [step][low, high][row][inner].
template <class Isa> void deal_bytes(int16_t * numbers, int64_t n, int64_t row, int16_t * to) {
    const int64_t whole_inner = rounded_up<Isa::tile_inner>(n), first_row = row / Isa::tile_rows * Isa::tile_rows;
    if (whole_inner > whole_groups<Isa>(n)) std::memset(numbers + whole_groups<Isa>(n), 0, Isa::group * sizeof *numbers);
    to += first_row * whole_inner + (row - first_row) * (Isa::tile_inner / 2);
    for (int64_t i = 0; i < whole_inner; i += Isa::tile_inner, to += Isa::tile_inner * Isa::tile_rows) {
        typename Isa::Floats low, high;
        Isa::split(numbers + i, low, high);
        Isa::store(to, Isa::as_ints(low));
        Isa::store(to + Isa::tile_inner / 2 * Isa::tile_rows, Isa::as_ints(high));
    }
}

template <class Isa>
void quantize_rows(const float * x, int64_t stride, int64_t n_rows, int64_t n_inner, int64_t block, int64_t first,
                   int64_t last, int16_t * quantized, RowBlock * blocks) {
    const Tiling tiling(n_rows, Isa::integer_rows);
    for (int64_t row = first; row < last; row++) {
        for (int64_t b = 0; b * block < n_inner; b++) {
            const int64_t n = smaller(block, n_inner - b * block);
            const float * from = x + row * stride + b * block;
            RowBlock & of = blocks[b * n_rows + row];
            const int64_t whole = whole_groups<Isa>(n);
            int16_t * const to = quantized + b * block_size<Isa>(block, n_rows);
            const float per_unit = unit_of<Isa>(from, n, largest_of_row, of.scale);
            if (are_few<Isa>(n_rows)) {
                to_int16<Isa>(from, n, per_unit, to + row * whole);
                continue;
            }
            alignas(64) int16_t numbers[max_block];
            to_int16<Isa>(from, n, per_unit, numbers);
            if constexpr (Isa::has_tiles) {
                deal_bytes<Isa>(numbers, n, row, to);
                continue;
            }
            if constexpr (Isa::crosses) of.before = before_row<Isa>(numbers, whole);
            const int64_t tile = tiling.tile_of(row), first_row = tiling.first_of(tile);
            deal(numbers, whole, tiling.rows_of(tile), to + first_row * whole + 4 * (row - first_row));
        }
    }
}

template <class Isa> size_t product_scratch(const Product & p) {
    return aligned(sizeof(Scratch<Isa>)) + static_cast<size_t>(p.n_rows) * strip_columns<Isa> * sizeof(float) * (p.gate ? 2 : 1);
}

// Floats of all columns, [inner][column].
template <class Isa> void unpack_floats(const char * const * columns, int64_t n_inner, float * strip) {
    constexpr int64_t value_bytes = sizeof(float);
    const auto load = [](const char * from) { return Isa::as_floats(Isa::load(from)); };
    for (int64_t i = 0; i < n_inner; i += Isa::lanes) {
        const int n = static_cast<int>(smaller(Isa::lanes, n_inner - i));
        for (int half = 0; half < strip_columns<Isa>; half += Isa::lanes) {
            typename Isa::Floats v[Isa::lanes];
            if (n == Isa::lanes) {
#pragma GCC unroll 16
                for (int c = 0; c < Isa::lanes; c++) v[c] = load(columns[half + c] + i * value_bytes);
            } else {
                for (int c = 0; c < Isa::lanes; c++) {
                    alignas(64) char part[Isa::lanes * sizeof(float)] = {};
                    std::memcpy(part, columns[half + c] + i * value_bytes, static_cast<size_t>(n * value_bytes));
                    v[c] = load(part);
                }
            }
            Isa::transpose(v);
            float * const to = strip + i * strip_columns<Isa> + half;
            if (n == Isa::lanes) {
#pragma GCC unroll 16
                for (int j = 0; j < Isa::lanes; j++) Isa::store_floats(to + j * strip_columns<Isa>, v[j]);
            } else {
                for (int j = 0; j < n; j++) Isa::store_floats(to + j * strip_columns<Isa>, v[j]);
            }
        }
    }
}

template <class Isa>
void unpack_block(const Product & p, const char * const * columns, int64_t n_inner, Scratch<Isa> & s, Form form) {
    switch (p.type) {
        case Weight::f32:
            return unpack_floats<Isa>(columns, n_inner, s.floats);
        case Weight::f16:
            return unpack_by_floats<Isa>(columns, n_inner, s.strip, form, [](const char * from, int64_t n, float * to) {
                floats_of_halves<Isa>(from, n, to, [](const char * at) { return Isa::from_halves(at); });
            });
        case Weight::bf16:
            return unpack_by_floats<Isa>(columns, n_inner, s.strip, form, [](const char * from, int64_t n, float * to) {
                floats_of_halves<Isa>(from, n, to, [](const char * at) { return Isa::from_brain(at); });
            });
        case Weight::q8_0: return unpack<Isa, Q8_0>(columns, n_inner, s.factors, s.strip, form);
        case Weight::q4_0: return unpack<Isa, Q4_0>(columns, n_inner, s.factors, s.strip, form);
        case Weight::q5_0: return unpack<Isa, Q5_0>(columns, n_inner, s.factors, s.strip, form);
        case Weight::q4_k: return unpack<Isa, Q4_k>(columns, n_inner, s.factors, s.strip, form);
        case Weight::q5_k: return unpack<Isa, Q5_k>(columns, n_inner, s.factors, s.strip, form);
        case Weight::q6_k: return unpack<Isa, Q6_k>(columns, n_inner, s.factors, s.strip, form);
        case Weight::iq4_nl: return unpack<Isa, Iq4_nl>(columns, n_inner, s.factors, s.strip, form);
        case Weight::iq4_xs: return unpack<Isa, Iq4_xs>(columns, n_inner, s.factors, s.strip, form);
        case Weight::other: return unpack_by_floats<Isa>(columns, n_inner, s.strip, form, [&](const char * from, int64_t n, float * to) { p.to_float(from, to, n); });
    }
}

// Where a strip begins: in which matrix, at which column.
struct Place {
    const char * weights;
    int64_t column;
};

// The sums of a strip, all rows. `after` is multiplied next. Where that completes the product, its results are written.
template <class Isa>
void multiply(const Product & p, Place at, Place after, bool completes, Scratch<Isa> & s, float * sums, const float * gates) {
    const int n = static_cast<int>(smaller(strip_columns<Isa>, p.n_columns - at.column));
    const bool few = are_few<Isa>(p.n_rows) && is_integer(p.type);
    const Form form = !few ? Form::pairs : p.type == Weight::q8_0 ? Form::bytes : Form::columns;
    const auto bytes_to = [&](int64_t inner) {
        return static_cast<int64_t>(p.row_bytes * static_cast<size_t>(inner) / static_cast<size_t>(p.n_inner));
    };
    const auto columns_of = [&](Place place, int64_t inner, const char ** columns) {
        for (int c = 0; c < strip_columns<Isa>; c++) {
            const auto number = static_cast<size_t>(smaller(place.column + c, p.n_columns - 1));
            columns[c] = place.weights + number * p.row_bytes + bytes_to(inner);
        }
    };
    const Ends ends{0, p.n_rows, at.column, n, sums, gates};
    bool finished = false;
    const char *columns[strip_columns<Isa>], *next[strip_columns<Isa>];
    columns_of(at, 0, columns);
    for (int64_t first = 0; first < p.n_inner; first += p.block) {
        const int64_t n_inner = smaller(p.block, p.n_inner - first), end = first + n_inner;
        unpack_block<Isa>(p, columns, n_inner, s, form);
        const bool last = end == p.n_inner;
        columns_of(last ? after : at, last ? 0 : end, next);
        const int64_t next_end = smaller(last ? p.block : end + p.block, p.n_inner);
        const Ahead ahead{next, bytes_to(next_end) - (last ? 0 : bytes_to(end))};
        if (few) {
            const auto work = [&](int64_t, auto rows) { few_rows<Isa, rows>(p, n_inner, first / p.block, columns, form, s, sums, ahead); };
            tile_of<Isa, Isa::few_rows>(p.n_rows, 0, work);
        } else if (is_integer(p.type)) {
            int64_t fetched = 0;  // columns; each tile fetches its share
            const auto fetch_share = [&](int64_t row, int64_t rows, int64_t column) {
                for (; fetched * p.n_rows < (row + rows) * strip_columns<Isa>; fetched++) fetch<Isa>(ahead, fetched);
                if (last && completes) fetch_ends<Isa>(p, row, rows, at.column + column);
            };
            if constexpr (Isa::has_tiles) {
                byte_rows<Isa>(p, n_inner, first / p.block, s, sums, last && completes ? &ends : nullptr, fetch_share);
                finished = last;
            } else {
                vector_rows<Isa>(p, n_inner, first / p.block, s.strip, sums, fetch_share);
            }
        } else {
            tiles<Isa>(p.n_rows, [&](int64_t row, auto rows) {
                float_rows<Isa, rows>(p, row, first, n_inner, s.floats, sums);
            });
        }
        std::memcpy(columns, next, sizeof columns);
    }
    if (completes && !finished) finish<Isa, strip_columns<Isa> / Isa::lanes>(p, ends);
}

template <class Isa> void product(const Product & p, int64_t strip, char * scratch) {
    auto & s = *reinterpret_cast<Scratch<Isa> *>(scratch);
    auto * sums = reinterpret_cast<float *>(scratch + aligned(sizeof(Scratch<Isa>)));
    float * const gates = sums + p.n_rows * strip_columns<Isa>;
    const int64_t column = strip * strip_columns<Isa>;
    const Place of_gate{p.gate, column}, of_weights{p.weights, column};
    const Place after{p.gate ? p.gate : p.weights, column + strip_columns<Isa>};
    if (p.gate) multiply<Isa>(p, of_gate, of_weights, false, s, gates, nullptr);
    multiply<Isa>(p, of_weights, after, true, s, sums, gates);
}

// ----------------------------------------------------------------------------------- attention
//
// The rows of a query tile lie in the lanes, the cells follow each other: sums over cells go in
// one order, and a cell that a row does not see adds an exact zero. Queries and keys are int16 with a
// scale each, which multiply twice as fast as floats: it changes less than a cache of halves does.

template <class Isa> struct Tile {
    int16_t * keys;      // [cell][inner], or bytes as `deal_bytes` lays them
    float * key_scales;  // [cell]
    int32_t * befores;   // [cell]: what a key's sums begin with
    float * values;      // [cell][value_dim]
    int16_t * queries;   // [inner / 2][row][2], or bytes as a strip has them
    int16_t * turning;   // [row][inner]
    float * floats;      // of one key
    float * scores;      // [cell][row]
};

// Whether tiles of bytes multiply queries and keys. For one step a tile of results costs more than it gains.
template <class Isa> bool by_tiles(const Attention & a) {
    if constexpr (Isa::has_tiles) return a.head_dim > Isa::tile_inner;
    return false;
}

// Numbers of a query or key, with the zeros behind them; and how many cells there is room for.
template <class Isa> int64_t whole_inner(const Attention & a) {
    if constexpr (Isa::has_tiles) {
        if (by_tiles<Isa>(a)) return rounded_up<Isa::tile_inner>(a.head_dim);
    }
    return whole_groups<Isa>(a.head_dim);
}

template <class Isa> int64_t whole_cells(const Attention & a, int64_t n_cells) {
    if constexpr (Isa::has_tiles) {
        if (by_tiles<Isa>(a)) return rounded_up<Isa::tile_rows>(n_cells);
    }
    return n_cells;
}

template <class Isa> Tile<Isa> tile_in(const Attention & a, int64_t n_cells, char * scratch) {
    Tile<Isa> tile{};
    const auto next = [&](int64_t numbers, auto & to) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(scratch);
        scratch += aligned(static_cast<size_t>(numbers) * sizeof *to);
    };
    const int64_t n_inner = whole_inner<Isa>(a);
    next(n_inner * strip_columns<Isa>, tile.queries);
    next(n_inner * strip_columns<Isa>, tile.turning);
    next(n_inner, tile.floats);
    next(whole_cells<Isa>(a, n_cells) * n_inner, tile.keys);
    next(n_cells, tile.key_scales);
    next(n_cells, tile.befores);
    next(n_cells * a.value_dim, tile.values);
    next(n_cells * strip_columns<Isa>, tile.scores);
    return tile;
}

template <class Isa> size_t attention_scratch(const Attention & a, int64_t n_cells) {
    constexpr int width = strip_columns<Isa>, n_parts = 8;
    const int64_t n_inner = whole_inner<Isa>(a);
    const auto halves = static_cast<size_t>(n_inner * (whole_cells<Isa>(a, n_cells) + 2 * width));
    const auto floats = static_cast<size_t>(n_inner + n_cells * (2 + a.value_dim + width));
    return halves * sizeof(int16_t) + floats * sizeof(float) + n_parts * aligned(1);
}

template <class Isa> void to_floats(const char * from, bool is_half, int64_t n, float * to) {
    if (!is_half) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    int64_t i = 0;
    for (; i + Isa::lanes <= n; i += Isa::lanes) Isa::store_floats(to + i, Isa::from_halves(from + 2 * i));
    for (; i < n; i++) to[i] = half_to_float(from + 2 * i);
}

template <class Isa>
void gather_cells(const Attention & a, int64_t kv_head, const Span * spans, int n_spans, char * scratch) {
    int64_t n_cells = 0;
    for (int i = 0; i < n_spans; i++) n_cells += spans[i].end - spans[i].begin;
    const auto tile = tile_in<Isa>(a, n_cells, scratch);
    const int64_t n_inner = whole_inner<Isa>(a);
    int64_t cell = 0;
    for (int i = 0; i < n_spans; i++) {
        for (auto from = static_cast<size_t>(spans[i].begin); from < static_cast<size_t>(spans[i].end); from++, cell++) {
            const auto head = static_cast<size_t>(kv_head);
            to_floats<Isa>(a.k + from * a.k_row + head * a.k_head, a.k_is_half, a.head_dim, tile.floats);
            int16_t * const key = by_tiles<Isa>(a) ? tile.turning : tile.keys + cell * n_inner;
            to_int16<Isa>(tile.floats, a.head_dim, unit_of<Isa>(tile.floats, a.head_dim, largest_of_row, tile.key_scales[cell]), key);
            if constexpr (Isa::crosses) tile.befores[cell] = before_row<Isa>(key, n_inner);
            if constexpr (Isa::has_tiles) {
                if (by_tiles<Isa>(a)) deal_bytes<Isa>(key, a.head_dim, cell, tile.keys);
            }
            to_floats<Isa>(a.v + from * a.v_row + head * a.v_head, a.v_is_half, a.value_dim, tile.values + cell * a.value_dim);
        }
    }
}

// Adds to R rows of the result, V vectors of it, some cells.
template <class Isa, int R, int V>
inline void value_tile(const float * values, int64_t value_dim, const float * scores, int64_t n_cells,
                       typename Isa::Floats (&sums)[R][V]) {
    for (int64_t cell = 0; cell < n_cells; cell++) {
        typename Isa::Floats parts[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            parts[v] = Isa::load_floats(values + cell * value_dim + v * Isa::lanes);
            Isa::pin(parts[v]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const auto weight = Isa::all(scores[cell * strip_columns<Isa> + r]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) sums[r][v] = Isa::fma(parts[v], weight, sums[r][v]);
        }
    }
}

// Gathered cells [from, to), maybe the first of a sequence.
struct Cells {
    int64_t from, to;
    bool are_first;
};

// Adds some cells to V vectors of each row's result, from its value `i` on. Then those are multiplied by the row's factor.
template <class Isa, int V>
void add_values(const Attention & a, const Tile<Isa> & tile, int64_t head, const int32_t * rows, int n_rows, const Cells & cells,
                int64_t i, const float * factors) {
    const float * const values = tile.values + cells.from * a.value_dim + i;
    tiles<Isa>(n_rows, [&](int64_t row, auto n) {
        constexpr int count = n;
        typename Isa::Floats sums[count][V];
        float * out[count];
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            out[r] = a.out + static_cast<size_t>(rows[row + r]) * a.out_row + static_cast<size_t>(head) * a.out_head + i;
            for (int v = 0; v < V; v++) sums[r][v] = cells.are_first ? Isa::zero_floats() : Isa::load_floats(out[r] + v * Isa::lanes);
        }
        const float * const weights = tile.scores + cells.from * strip_columns<Isa> + row;
        value_tile<Isa, count>(values, a.value_dim, weights, cells.to - cells.from, sums);
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            const auto factor = Isa::all(factors[row + r]);
            for (int v = 0; v < V; v++) Isa::store_floats(out[r] + v * Isa::lanes, Isa::mul(sums[r][v], factor));
        }
    });
}

// The scores of the cells [begin, end).
template <class Isa>
void score_by_tiles(const Tile<Isa> & tile, int64_t n_inner, int64_t begin, int64_t end, const float * query_scales) {
    constexpr int width = strip_columns<Isa>, lanes = Isa::lanes;
    for (int column = 0; column < width; column += lanes) {
        turn_bytes<Isa>(tile.turning + column * n_inner, n_inner, n_inner, tile.queries + column * n_inner);
    }
    typename Isa::Parts parts;
    const auto put = [&](int64_t first, int column) {
        const auto scales = Isa::load_floats(query_scales + column);
        for (int64_t cell = first; cell < smaller(first + Isa::tile_rows, end); cell++) {
            const auto sums = Isa::to_floats(Isa::whole(parts, static_cast<int>(cell - first)));
            Isa::store_floats(tile.scores + cell * width + column, Isa::mul(sums, Isa::mul(scales, Isa::all(tile.key_scales[cell]))));
        }
    };
    const typename Isa::Tiles tiles;
    const int64_t n_steps = n_inner / Isa::tile_inner, from = begin / Isa::tile_rows * Isa::tile_rows;
    for (int64_t cell = from; cell < end; cell += Isa::tile_rows) {
        for (int column = 0; column < width; column += lanes) {  // while a tile is multiplied, the one before it is put
            Isa::multiply_bytes(tile.keys + cell * n_inner, tile.queries + column * n_inner, n_steps);
            if (column > 0) {
                put(cell, 0);
            } else if (cell > from) {
                put(cell - Isa::tile_rows, lanes);
            }
            Isa::store_parts(parts);
        }
    }
    if (from < end) put((end - 1) / Isa::tile_rows * Isa::tile_rows, lanes);
}

// The same by vectors.
template <class Isa>
void score_by_vectors(const Tile<Isa> & tile, int64_t n_inner, int64_t begin, int64_t end, const float * query_scales) {
    constexpr int width = strip_columns<Isa>, lanes = Isa::lanes;
    for (int column = 0; column < width; column += lanes) {
        turn<Isa>(tile.turning + column * n_inner, n_inner, n_inner, tile.queries + 2 * column);
    }
    alignas(64) int32_t before[width];
    if constexpr (Isa::crosses) before_columns<Isa>(tile.queries, n_inner / 2, before);
    tiles<Isa, Isa::integer_rows>(end - begin, [&](int64_t at, auto n) {
        constexpr int cells = n;
        typename Isa::Ints sums[cells][2];
        const int64_t cell = begin + at;
        const auto before_of = [&](int i) { return tile.befores[cell + i]; };
        const RowsApart<cells> keys(tile.keys + cell * n_inner, n_inner);
        whole_tile<Isa, cells>(tile.queries, before, keys, n_inner / 2, before_of, sums);
        const auto left = Isa::load_floats(query_scales), right = Isa::load_floats(query_scales + lanes);
        const float * const scales = tile.key_scales + cell;
        float * const to = tile.scores + cell * width;
#pragma GCC unroll 12
        for (int i = 0; i < cells; i++) {
            const auto scale = Isa::all(scales[i]);
            Isa::store_floats(to + i * width, Isa::mul(Isa::to_floats(sums[i][0]), Isa::mul(left, scale)));
            Isa::store_floats(to + i * width + lanes, Isa::mul(Isa::to_floats(sums[i][1]), Isa::mul(right, scale)));
        }
    });
}

template <class Isa>
void score(const Attention & a, const Tile<Isa> & tile, int64_t begin, int64_t end, const float * query_scales) {
    if constexpr (Isa::has_tiles) {
        if (by_tiles<Isa>(a)) return score_by_tiles<Isa>(tile, whole_inner<Isa>(a), begin, end, query_scales);
    }
    score_by_vectors<Isa>(tile, whole_inner<Isa>(a), begin, end, query_scales);
}

template <class Isa>
void attend(const Attention & a, int64_t head, const int32_t * rows, int n_rows, const int32_t * hidden,
            const int32_t * visible, const float * added, int64_t n_cells, char * scratch) {
    constexpr int width = strip_columns<Isa>;
    using Floats = typename Isa::Floats;
    const auto tile = tile_in<Isa>(a, n_cells, scratch);
    int64_t begin = n_cells, end = 0, seen_from = 0, seen_to = n_cells;
    for (int r = 0; r < n_rows; r++) {
        begin = smaller(begin, hidden[r]);
        end = visible[r] > end ? visible[r] : end;
        seen_from = hidden[r] > seen_from ? hidden[r] : seen_from;
        seen_to = smaller(seen_to, visible[r]);
    }
    const int64_t n_inner = whole_inner<Isa>(a);
    alignas(64) float query_scales[width] = {};
    for (int r = 0; r < n_rows; r++) {  // beyond them is anything, times 0
        int16_t * const to = tile.turning + r * n_inner;
        const auto * q = reinterpret_cast<const float *>(a.q + static_cast<size_t>(rows[r]) * a.q_row +
                                                         static_cast<size_t>(head) * a.q_head);
        to_int16<Isa>(q, a.head_dim, unit_of<Isa>(q, a.head_dim, largest_of_column, query_scales[r]), to);
        query_scales[r] *= a.scale * log2_e;
    }
    float * const scores = tile.scores;  // of 2^score, not e^score
    score<Isa>(a, tile, begin, end, query_scales);
    for (int r = 0; added && r < n_rows; r++) {
        for (int64_t cell = begin; cell < end; cell++) scores[cell * width + r] += log2_e * added[r * n_cells + cell];
    }
    Floats most[2] = {Isa::all(-1e30f), Isa::all(-1e30f)};
    for (int64_t cell = begin; cell < end; cell++) {
        float * const of_cell = scores + cell * width;
        if (cell < seen_from || cell >= seen_to) {  // some rows do not see it
            for (int r = 0; r < n_rows; r++) {
                if (cell < hidden[r] || cell >= visible[r]) of_cell[r] = -INFINITY;
            }
        }
        for (int half = 0; half < 2; half++) most[half] = Isa::max(most[half], Isa::load_floats(of_cell + half * Isa::lanes));
    }
    // Some cells at a time, whose scores and values stay in the first level cache; the sums wait in the result.
    constexpr int64_t cells_together = 128;
    Floats weights[2] = {Isa::zero_floats(), Isa::zero_floats()};  // sums
    alignas(64) float factors[width];
    for (float & factor : factors) factor = 1;
    int64_t from = begin, to = begin;
    do {  // once where nothing is seen, for its zeros
        from = to;
        to = smaller(from + cells_together, end);
        for (int64_t cell = from; cell < to; cell++) {
            for (int half = 0; half < 2; half++) {
                float * const at = scores + cell * width + half * Isa::lanes;
                const auto weight = two_to<Isa>(Isa::sub(Isa::load_floats(at), most[half]));
                weights[half] = Isa::add(weights[half], weight);
                Isa::store_floats(at, weight);
            }
        }
        if (to == end) {  // all weights are known
            for (int half = 0; half < 2; half++) Isa::store_floats(factors + half * Isa::lanes, weights[half]);
            for (int r = 0; r < n_rows; r++) factors[r] = factors[r] == 0 ? 0 : 1 / factors[r];
        }
        const Cells cells{from, to, from == begin};
        int64_t i = 0;
        for (; i + width <= a.value_dim; i += width) add_values<Isa, 2>(a, tile, head, rows, n_rows, cells, i, factors);
        if constexpr (width > attention_values) {
            if (i < a.value_dim) add_values<Isa, 1>(a, tile, head, rows, n_rows, cells, i, factors);
        }
    } while (to < end);
}

// ------------------------------------------------------------------------------ small operations

template <class Isa> typename Isa::Floats partial(const float * from, int64_t n) {
    if (n >= Isa::lanes) return Isa::load_floats(from);
    alignas(64) float part[Isa::lanes] = {};
    std::memcpy(part, from, static_cast<size_t>(n) * sizeof(float));
    return Isa::load_floats(part);
}

template <class Isa> void store_partial(float * to, typename Isa::Floats v, int64_t n) {
    if (n >= Isa::lanes) return Isa::store_floats(to, v);
    alignas(64) float part[Isa::lanes];
    Isa::store_floats(part, v);
    std::memcpy(to, part, static_cast<size_t>(n) * sizeof(float));
}

template <class Isa>
void norm(const float * x, float * out, int64_t n, float eps, bool centre, const float * weight, const float * bias) {
    auto mean = Isa::zero_floats(), squares = Isa::zero_floats();
    if (centre) {
        auto sums = Isa::zero_floats();
        for (int64_t i = 0; i < n; i += Isa::lanes) sums = Isa::add(sums, partial<Isa>(x + i, n - i));
        mean = Isa::all(Isa::sum(sums) / static_cast<float>(n));
    }
    for (int64_t i = 0; i < n; i += Isa::lanes) {
        auto v = Isa::sub(partial<Isa>(x + i, n - i), mean);
        if (n - i < Isa::lanes) {  // what is beyond the row is not a deviation
            alignas(64) float part[Isa::lanes] = {};
            store_partial<Isa>(part, v, n - i);
            v = Isa::load_floats(part);
        }
        squares = Isa::fma(v, v, squares);
    }
    const auto scale = Isa::all(1.0f / sqrtf(Isa::sum(squares) / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += Isa::lanes) {
        auto v = Isa::mul(Isa::sub(partial<Isa>(x + i, n - i), mean), scale);
        if (weight) v = Isa::mul(v, partial<Isa>(weight + i, n - i));
        if (bias) v = Isa::add(v, partial<Isa>(bias + i, n - i));
        store_partial<Isa>(out + i, v, n - i);
    }
}

template <class Isa> void gelu_row(const float * x, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i += Isa::lanes) store_partial<Isa>(out + i, gelu<Isa>(partial<Isa>(x + i, n - i)), n - i);
}

template <class Isa> void swiglu(const float * gate, const float * up, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i += Isa::lanes) {
        store_partial<Isa>(out + i, swiglu_of<Isa>(partial<Isa>(gate + i, n - i), partial<Isa>(up + i, n - i)), n - i);
    }
}

template <class Isa> void add(const float * a, const float * b, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i += Isa::lanes) {
        store_partial<Isa>(out + i, Isa::add(partial<Isa>(a + i, n - i), partial<Isa>(b + i, n - i)), n - i);
    }
}

template <class Isa> void multiply(const float * a, const float * b, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i += Isa::lanes) {
        store_partial<Isa>(out + i, Isa::mul(partial<Isa>(a + i, n - i), partial<Isa>(b + i, n - i)), n - i);
    }
}

template <class Isa> void to_half(const float * x, void * out, int64_t n) {
    auto * to = static_cast<char *>(out);
    int64_t i = 0;
    for (; i + Isa::lanes <= n; i += Isa::lanes) Isa::to_halves(to + 2 * i, Isa::load_floats(x + i));
    for (; i < n; i++) {
        const uint16_t half = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(to + 2 * i, &half, sizeof half);
    }
}

template <class Isa>
void rotate(const float * x, float * out, int64_t n, int64_t n_rotated, bool side_by_side, const float * cosines, const float * sines) {
    const int64_t half = n_rotated / 2, first = side_by_side ? 2 : 1, second = side_by_side ? 1 : half;
    int64_t i = 0;
    for (; !side_by_side && i + Isa::lanes <= half; i += Isa::lanes) {
        const auto a = Isa::load_floats(x + i), b = Isa::load_floats(x + half + i);
        const auto c = Isa::load_floats(cosines + i), s = Isa::load_floats(sines + i);
        Isa::store_floats(out + i, Isa::sub(Isa::mul(a, c), Isa::mul(b, s)));
        Isa::store_floats(out + half + i, Isa::add(Isa::mul(a, s), Isa::mul(b, c)));
    }
    for (; i < half; i++) {
        const float a = x[first * i], b = x[first * i + second];
        out[first * i] = a * cosines[i] - b * sines[i];
        out[first * i + second] = a * sines[i] + b * cosines[i];
    }
    if (out != x) std::memcpy(out + n_rotated, x + n_rotated, static_cast<size_t>(n - n_rotated) * sizeof(float));
}

template <class Isa> const Kernels * kernels() {
    static const Kernels table = {
        Isa::name,           strip_columns<Isa>,  strip_columns<Isa>, Isa::supported,
        block_of,            is_integer,          quantized_size<Isa>, quantize_rows<Isa>, product_scratch<Isa>,
        attention_scratch<Isa>, product<Isa>,     gather_cells<Isa>,  attend<Isa>,
        norm<Isa>,           gelu_row<Isa>,       swiglu<Isa>,        add<Isa>,
        multiply<Isa>,       to_half<Isa>,        rotate<Isa>,
    };
    return &table;
}

}  // namespace

const Kernels * KERNELS() { return kernels<ISA>(); }

}  // namespace gguf_embed
