// Vectors of 256 bits: AVX2, and the same with one instruction of AVX-VNNI.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace gguf_embed {
namespace {

struct Avx2 {
    using Ints = __m256i;
    using Floats = __m256;
    static constexpr int lanes = 8;         // of 32 bits
    static constexpr int rows = 6;          // of a register tile, two vectors wide
    static constexpr int integer_rows = 4;  // of one of integers, likewise
    // Zen has four ports that add and two that multiply: as many additions as multiplications leave a
    // quarter of them idle, three additions to one multiplication do not.
    static constexpr bool crosses = true;
    static constexpr int few_rows = 12;     // of a register tile that is one column wide
    static constexpr bool has_tiles = false;  // see Amx
    struct Parts {};
    static constexpr const char * name = "AVX2";

    // That the operating system keeps the registers is part of the compiler's answer; clang 14 has none
    // for every bit.
    static bool supported() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    }

    // Keeps a number in its register: GCC would load a weight anew for each use.
    static void pin(Ints & x) { __asm__("" : "+x"(x)); }
    static void pin(Floats & x) { __asm__("" : "+x"(x)); }

    static Ints load(const void * p) { return _mm256_loadu_si256(static_cast<const Ints *>(p)); }
    static void store(void * p, Ints x) { _mm256_storeu_si256(static_cast<Ints *>(p), x); }
    static Floats load_floats(const float * p) { return _mm256_loadu_ps(p); }
    static void store_floats(float * p, Floats x) { _mm256_storeu_ps(p, x); }
    static Ints zero() { return _mm256_setzero_si256(); }
    static Floats zero_floats() { return _mm256_setzero_ps(); }
    static Floats all(float x) { return _mm256_set1_ps(x); }
    static Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
    static Ints all_bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
    static Ints pair(const int16_t * p) {
        int32_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return _mm256_set1_epi32(bits);
    }
    // sum += the products of int16 pairs. GCC would add the sums in another order and move them
    // from register to register.
    static void dot(Ints & sum, Ints weights, Ints pairs) {
        const Ints products = _mm256_madd_epi16(weights, pairs);
        __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    }
    static Ints plus32(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Ints minus32(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    static Ints second_halves(Ints a) { return _mm256_srli_epi64(a, 32); }  // of each 64 bits, then zeros
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats root(Floats a) { return _mm256_sqrt_ps(a); }
    static Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
    // p, with the lowest bits of another number added to its exponent
    static Floats exponent_raised(Floats p, Floats by) {
        return as_floats(plus32(as_ints(p), _mm256_slli_epi32(as_ints(by), 23)));
    }
    static Floats from_halves(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
    static Floats from_bytes(const int8_t * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
    }
    // The half at `at` of each pointer's memory.
    static Floats from_halves_of(const char * const * p, int64_t at) {
        const auto half = [&](int i) {
            uint16_t bits;
            std::memcpy(&bits, p[i] + at, sizeof bits);
            return static_cast<short>(bits);
        };
        __m128i halves = _mm_cvtsi32_si128(static_cast<uint16_t>(half(0)));
        halves = _mm_insert_epi16(halves, half(1), 1);
        halves = _mm_insert_epi16(halves, half(2), 2);
        halves = _mm_insert_epi16(halves, half(3), 3);
        halves = _mm_insert_epi16(halves, half(4), 4);
        halves = _mm_insert_epi16(halves, half(5), 5);
        halves = _mm_insert_epi16(halves, half(6), 6);
        halves = _mm_insert_epi16(halves, half(7), 7);
        return _mm256_cvtph_ps(halves);
    }
    static void to_halves(void * p, Floats x) {
        _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    static Floats from_brain(const void * p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    // Both halves of each 32 bits get the number.
    static Ints twice(Ints x) { return _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_and_si256(x, _mm256_set1_epi32(0xffff))); }
    // The int16 of 32 numbers lie in the order in which `low_bytes_up` and `high_bytes_up` make
    // them of 32 bytes: 0-7, 16-23, 8-15, 24-31. A sum does not mind.
    static constexpr int group = 32;
    static constexpr int place_of(int number) {
        return (number & ~24) | (number & 8) << 1 | (number & 16) >> 1;
    }
    // 32 bytes of a column, and vectors of a group of int16, whose high bytes they become.
    using Bytes = Avx2;
    static constexpr int group_vectors = group / (2 * lanes);
    static Ints bytes_up(Ints bytes, int number) { return number == 0 ? low_bytes_up(bytes) : high_bytes_up(bytes); }
    static void store_group(int16_t * p, const Ints (&numbers)[group / lanes]) {
        for (int i = 0; i < 2; i++) {
            store(p + 16 * i, _mm256_permute4x64_epi64(_mm256_packs_epi32(numbers[i], numbers[i + 2]), 0xd8));
        }
    }
    // The sum of the 32-bit numbers of each of eight vectors.
    static Ints sums_of(const Ints (&v)[lanes]) {
        const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    }
    static void prefetch(const char * p) { _mm_prefetch(p, _MM_HINT_T0); }

    // Lane by lane, as every instruction below.
    static Ints low16(Ints a, Ints b) { return _mm256_unpacklo_epi16(a, b); }
    static Ints high16(Ints a, Ints b) { return _mm256_unpackhi_epi16(a, b); }
    static Ints low32(Ints a, Ints b) { return _mm256_unpacklo_epi32(a, b); }
    static Ints high32(Ints a, Ints b) { return _mm256_unpackhi_epi32(a, b); }
    static Ints low64(Ints a, Ints b) { return _mm256_unpacklo_epi64(a, b); }
    static Ints high64(Ints a, Ints b) { return _mm256_unpackhi_epi64(a, b); }
    static Ints low_bytes_up(Ints a) { return _mm256_unpacklo_epi8(_mm256_setzero_si256(), a); }
    static Ints high_bytes_up(Ints a) { return _mm256_unpackhi_epi8(_mm256_setzero_si256(), a); }
    static Ints scaled(Ints a, Ints factor) { return _mm256_mulhrs_epi16(a, factor); }
    static Ints plus16(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
    static Ints minus16(Ints a, Ints b) { return _mm256_sub_epi16(a, b); }
    static Ints minus8(Ints a, Ints b) { return _mm256_sub_epi8(a, b); }
    static Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
    static Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
    static Ints equal8(Ints a, Ints b) { return _mm256_cmpeq_epi8(a, b); }
    template <int bits> static Ints down16(Ints a) { return _mm256_srli_epi16(a, bits); }
    template <int bits> static Ints up16(Ints a) { return _mm256_slli_epi16(a, bits); }
    static Ints looked_up(Ints table, Ints index) { return _mm256_shuffle_epi8(table, index); }
    static Ints table(const int8_t * t) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t)));
    }
    // 16 bytes of the columns 0, 4, ... in a lane each.
    static Ints lanes_of(const char * const * p) {
        const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p[0])));
        return _mm256_inserti128_si256(first, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p[4])), 1);
    }
    static Ints lanes_of_bits(const uint32_t * p) {  // 32 bits of each column, everywhere in its lane
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(static_cast<int>(p[0]))),
                                       _mm_set1_epi32(static_cast<int>(p[4])), 1);
    }
    // The same bits in the lower half, others in the upper one.
    static Ints halves(int32_t low, int32_t high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(low)), _mm_set1_epi32(high), 1);
    }
    // 32 numbers of four bits: the low ones of 16 bytes, then the high ones.
    static Ints nibbles_of(const char * p) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15));
    }
    // All bits of a byte where the bit of its number is set.
    static Ints bytes_of_bits(uint32_t bits) {
        const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), which);
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    }
    static float sum(Floats x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static float largest(Floats x) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }
    // a, but 0 where x is not between the limits
    static Floats where_between(Floats a, Floats x, Floats low, Floats high) {
        const Floats above = _mm256_cmp_ps(x, low, _CMP_GT_OQ);
        return _mm256_and_ps(_mm256_and_ps(above, _mm256_cmp_ps(x, high, _CMP_LT_OQ)), a);
    }
    static Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
    static Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
    static void transpose(Floats (&v)[lanes]) {
        Floats t[lanes], u[lanes];
        _Pragma("GCC unroll 8") for (int i = 0; i < lanes; i += 2) {
            t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
        }
        _Pragma("GCC unroll 8") for (int i = 0; i < lanes; i += 4) {
            u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
            u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
            v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
        }
    }
    // Eight numbers of a column, times its unit; eight such vectors turned, so that each holds a number
    // of every column.
    template <class Unit, class Numbers> static Floats eight_of(Unit unit, Numbers numbers, int c) {
        return mul(all(unit(c)), from_bytes(numbers(c)));
    }
    static void turn_eight(Floats (&v)[8]) { transpose(v); }
};

#ifdef __AVXVNNI__
struct AvxVnni : Avx2 {
    static constexpr int integer_rows = rows;
    static constexpr bool crosses = false;  // one instruction multiplies and adds
    static constexpr const char * name = "AVX-VNNI";

    static bool supported() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return Avx2::supported() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    }

    static void dot(Ints & sum, Ints weights, Ints pairs) {
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(pairs));
    }
};
#endif

}  // namespace
}  // namespace gguf_embed
