// Vectors of 512 bits: AVX-512 with F, BW, VL and DQ, and the same with one instruction of VNNI.

#pragma once

// Vectors that GCC 12's own header leaves undefined are not ours to mend.
#if defined __GNUC__ && !defined __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "avx2.h"

namespace gguf_embed {
namespace {

struct Avx512 {
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int lanes = 16;     // of 32 bits
    static constexpr int rows = 12;      // of a register tile, two vectors wide: 27 or 28 of 32 registers
    static constexpr int integer_rows = rows;
    static constexpr int few_rows = 12;  // of a register tile that is one column wide
    static constexpr bool crosses = false;  // the ports that add are those that multiply
    static constexpr bool has_tiles = false;  // see Amx
    struct Parts {};
    static constexpr const char * name = "AVX-512";

    static bool supported() {
        return Avx2::supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }

    static void pin(Ints & x) { __asm__("" : "+v"(x)); }
    static void pin(Floats & x) { __asm__("" : "+v"(x)); }

    static Ints load(const void * p) { return _mm512_loadu_si512(p); }
    static void store(void * p, Ints x) { _mm512_storeu_si512(p, x); }
    static Floats load_floats(const float * p) { return _mm512_loadu_ps(p); }
    static void store_floats(float * p, Floats x) { _mm512_storeu_ps(p, x); }
    static Ints zero() { return _mm512_setzero_si512(); }
    static Floats zero_floats() { return _mm512_setzero_ps(); }
    static Floats all(float x) { return _mm512_set1_ps(x); }
    static Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
    static Ints all_bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static Ints pair(const int16_t * p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return _mm512_set1_epi32(bits);
    }
    static void dot(Ints & sum, Ints weights, Ints pairs) {
        const Ints products = _mm512_madd_epi16(weights, pairs);
        __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
    }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats root(Floats a) { return _mm512_sqrt_ps(a); }
    static Floats magnitude(Floats a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
    // p, with the lowest bits of another number added to its exponent
    static Floats exponent_raised(Floats p, Floats by) {
        return as_floats(_mm512_add_epi32(as_ints(p), _mm512_slli_epi32(as_ints(by), 23)));
    }
    static Floats from_halves(const void * p) { return _mm512_cvtph_ps(Avx2::load(p)); }
    // The half at `at` of each pointer's memory.
    static Floats from_halves_of(const char * const * p, int64_t at) {
        return joined(Avx2::from_halves_of(p, at), Avx2::from_halves_of(p + 8, at));
    }
    static void to_halves(void * p, Floats x) { Avx2::store(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static Floats from_brain(const void * p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(Avx2::load(p)), 16));
    }
    static Ints twice(Ints x) { return _mm512_or_si512(_mm512_slli_epi32(x, 16), _mm512_and_si512(x, _mm512_set1_epi32(0xffff))); }
    // The int16 of 32 numbers are a vector, in their own order.
    static constexpr int group = 32;
    static constexpr int place_of(int number) { return number; }
    using Bytes = Avx2;
    static constexpr int group_vectors = 1;
    static Ints bytes_up(__m256i bytes, int) { return _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8); }
    static void store_group(int16_t * p, const Ints (&numbers)[group / lanes]) {
        for (int i = 0; i < 2; i++) Avx2::store(p + 16 * i, _mm512_cvtsepi32_epi16(numbers[i]));
    }
    // The sum of the 32-bit numbers of each of sixteen vectors.
    static Ints sums_of(const Ints (&v)[lanes]) {
        Ints four[4];  // a lane's sums of four vectors
        for (int i = 0; i < 4; i++) {
            const Ints * of = v + 4 * i;
            const Ints a = _mm512_add_epi32(low32(of[0], of[1]), high32(of[0], of[1]));
            const Ints b = _mm512_add_epi32(low32(of[2], of[3]), high32(of[2], of[3]));
            four[i] = _mm512_add_epi32(low64(a, b), high64(a, b));
        }
        const auto added = [](Ints a, Ints b) {
            return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
        };
        return added(added(four[0], four[1]), added(four[2], four[3]));
    }
    static void prefetch(const char * p) { _mm_prefetch(p, _MM_HINT_T0); }

    // Lane by lane, as every instruction below.
    static Ints low16(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
    static Ints high16(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }
    static Ints low32(Ints a, Ints b) { return _mm512_unpacklo_epi32(a, b); }
    static Ints high32(Ints a, Ints b) { return _mm512_unpackhi_epi32(a, b); }
    static Ints low64(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
    static Ints high64(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }
    static Ints low_bytes_up(Ints a) { return _mm512_unpacklo_epi8(_mm512_setzero_si512(), a); }
    static Ints high_bytes_up(Ints a) { return _mm512_unpackhi_epi8(_mm512_setzero_si512(), a); }
    static Ints scaled(Ints a, Ints factor) { return _mm512_mulhrs_epi16(a, factor); }
    static Ints minus16(Ints a, Ints b) { return _mm512_sub_epi16(a, b); }
    static Ints minus8(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
    static Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
    static Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
    static Ints equal8(Ints a, Ints b) { return _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(a, b)); }
    template <int bits> static Ints down16(Ints a) { return _mm512_srli_epi16(a, bits); }
    template <int bits> static Ints up16(Ints a) { return _mm512_slli_epi16(a, bits); }
    static Ints looked_up(Ints table, Ints index) { return _mm512_shuffle_epi8(table, index); }
    static Ints table(const int8_t * t) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t)));
    }
    // 16 bytes of the columns 0, 4, ... in a lane each.
    static Ints lanes_of(const char * const * p) { return joined(Avx2::lanes_of(p), Avx2::lanes_of(p + 8)); }
    // 32 bits of each column, everywhere in its lane
    static Ints lanes_of_bits(const uint32_t * p) { return joined(Avx2::lanes_of_bits(p), Avx2::lanes_of_bits(p + 8)); }
    // The same bits in the lower half, others in the upper one.
    static Ints halves(int32_t low, int32_t high) { return joined(_mm256_set1_epi32(low), _mm256_set1_epi32(high)); }
    static float sum(Floats x) { return Avx2::sum(Avx2::add(low_half(x), high_half(x))); }
    static float largest(Floats x) { return Avx2::largest(Avx2::max(low_half(x), high_half(x))); }
    // a, but 0 where x is not between the limits
    static Floats where_between(Floats a, Floats x, Floats low, Floats high) {
        const __mmask16 above = _mm512_cmp_ps_mask(x, low, _CMP_GT_OQ);
        return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, x, high, _CMP_LT_OQ), a);
    }
    static Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
    static Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
    static void transpose(Floats (&v)[lanes]) {
        Floats t[lanes], u[lanes];
        _Pragma("GCC unroll 16") for (int i = 0; i < lanes; i += 2) {
            t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < lanes; i += 4) shuffled(t + i, u + i);
        // Lane l of u[4 * i + j] is of number 4 * l + j and of vectors 4 * i to 4 * i + 3.
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
            const Floats a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
            const Floats c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
            v[j] = _mm512_shuffle_f32x4(a, b, 0x88);
            v[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
            v[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
            v[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
        }
    }
    // Eight numbers of two columns, times their units; eight such vectors turned, so that each holds a
    // number of every column. The columns are those that then lie in their order.
    template <class Unit, class Numbers> static Floats eight_of(Unit unit, Numbers numbers, int c) {
        const int first = c % 4 + c / 4 * 8, second = first + 4;
        return joined(Avx2::mul(Avx2::all(unit(first)), Avx2::from_bytes(numbers(first))),
                      Avx2::mul(Avx2::all(unit(second)), Avx2::from_bytes(numbers(second))));
    }
    static void turn_eight(Floats (&v)[8]) {
        Floats t[8], u[8];
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i += 2) {
            t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
        }
        _Pragma("GCC unroll 2") for (int i = 0; i < 8; i += 4) shuffled(t + i, u + i);
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
            v[j] = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
            v[4 + j] = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        }
    }

  private:
    static Ints joined(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
    static Floats joined(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
    static __m256 low_half(Floats x) { return _mm512_castps512_ps256(x); }
    static __m256 high_half(Floats x) { return _mm512_extractf32x8_ps(x, 1); }
    // The second step of turning four vectors, lane by lane.
    static void shuffled(const Floats * t, Floats * u) {
        u[0] = _mm512_shuffle_ps(t[0], t[2], 0x44);
        u[1] = _mm512_shuffle_ps(t[0], t[2], 0xee);
        u[2] = _mm512_shuffle_ps(t[1], t[3], 0x44);
        u[3] = _mm512_shuffle_ps(t[1], t[3], 0xee);
    }
};

#ifdef __AVX512VNNI__
struct Avx512Vnni : Avx512 {
    static constexpr const char * name = "AVX-512 VNNI";

    static bool supported() { return Avx512::supported() && __builtin_cpu_supports("avx512vnni"); }

    static void dot(Ints & sum, Ints weights, Ints pairs) {
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(pairs));
    }
};
#endif

}  // namespace
}  // namespace gguf_embed
