// Tiles of AMX: AVX-512 with VNNI, and products of many rows by the tiles' bytes.
//
// A number of 16 bits is two bytes, so a product of two numbers is four products of bytes. Their sums are whole
// numbers, and of them together comes the same sum that AVX-512 VNNI has, to the bit.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace gguf_embed {
namespace {

struct Amx : Avx512Vnni {
    static constexpr const char * name = "AMX";
    static constexpr bool has_tiles = true;
    static constexpr int tile_rows = 16, tile_columns = lanes;  // of a tile of results
    static constexpr int tile_inner = 64;                       // of one step

    // Linux keeps a tile's registers only for a process that has asked.
    static bool supported() {
        constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
        constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a = 0, b = 0, c = 0, d = 0;
        return Avx512Vnni::supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) &&
               syscall(SYS_arch_prctl, request, tile_data) == 0;
    }

    // Eight tiles of 16 rows of 64 bytes, as long as this lives. What the thread had before comes back: ggml
    // asks for its own once and for all.
    class Tiles {
      public:
        Tiles() {
            Shape ours;
            __asm__ volatile("sttilecfg %0" : "=m"(before_));
            __asm__ volatile("ldtilecfg %0" : : "m"(ours));
        }
        ~Tiles() { __asm__ volatile("ldtilecfg %0" : : "m"(before_)); }
        Tiles(const Tiles &) = delete;
        Tiles & operator=(const Tiles &) = delete;

      private:
        struct Shape {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        Shape before_;
    };

    // Of a tile of results the four sums of each row and column, named by the byte of the row and that of the column.
    struct Parts {
        alignas(64) int32_t low_low[tile_rows][lanes], low_high[tile_rows][lanes];
        alignas(64) int32_t high_low[tile_rows][lanes], high_high[tile_rows][lanes];
    };

    // The low and the high bytes of 64 numbers.
    static void split(const int16_t * numbers, Floats & low, Floats & high) {
        const Ints order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
        const Ints first = looked_up(load(numbers), order), second = looked_up(load(numbers + 32), order);
        low = as_floats(_mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), second));
        high = as_floats(_mm512_permutex2var_epi64(first, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), second));
    }

    static Ints upper_bytes() { return _mm512_set1_epi16(static_cast<int16_t>(0xff00)); }

    // Numbers 0 and 2 of four of each column, and numbers 1 and 3, as low bytes of all four and then high ones.
    static void store_bytes(Ints even, Ints odd, int16_t * to) {
        store(to, either(_mm512_andnot_si512(upper_bytes(), even), up16<8>(odd)));
        store(to + 2 * tile_columns, either(down16<8>(even), both(odd, upper_bytes())));
    }

    // Multiplies 16 rows with 16 columns, into tiles. `rows`: [step][low, high][row][64 bytes]; `columns`: as they
    // lie in a strip.
    static void multiply_bytes(const int16_t * rows, const int16_t * columns, int64_t n_steps) {
        constexpr int64_t stride = 2 * tile_columns * 4;
        __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" : : : "memory");
        const auto * row = reinterpret_cast<const char *>(rows);
        const auto * low = reinterpret_cast<const char *>(columns);
        for (int64_t i = 0; i < n_steps; i++, row += 2 * tile_rows * tile_inner, low += tile_inner / 4 * stride) {
            __asm__ volatile(
                "tileloadd (%0,%2,1), %%tmm4\n"
                "tileloadd (%1,%3,1), %%tmm6\n"
                "tdpbuud %%tmm6, %%tmm4, %%tmm0\n"
                "tileloadd (%4,%3,1), %%tmm7\n"
                "tdpbusd %%tmm7, %%tmm4, %%tmm1\n"
                "tileloadd 1024(%0,%2,1), %%tmm5\n"
                "tdpbsud %%tmm6, %%tmm5, %%tmm2\n"
                "tdpbssd %%tmm7, %%tmm5, %%tmm3"
                : : "r"(row), "r"(low), "r"(int64_t{tile_inner}), "r"(stride), "r"(low + stride / 2) : "memory");
        }
    }

    static void store_parts(Parts & parts) {
        __asm__ volatile(
            "tilestored %%tmm0, (%0,%4,1)\n"
            "tilestored %%tmm1, (%1,%4,1)\n"
            "tilestored %%tmm2, (%2,%4,1)\n"
            "tilestored %%tmm3, (%3,%4,1)"
            : : "r"(parts.low_low), "r"(parts.low_high), "r"(parts.high_low), "r"(parts.high_high), "r"(int64_t{64}) : "memory");
    }

    static Ints whole(const Parts & parts, int row) {
        const Ints mixed = _mm512_add_epi32(load(parts.low_high[row]), load(parts.high_low[row]));
        const Ints upper = _mm512_add_epi32(_mm512_slli_epi32(load(parts.high_high[row]), 8), mixed);
        return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), load(parts.low_low[row]));
    }
};

}  // namespace
}  // namespace gguf_embed
