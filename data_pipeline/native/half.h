// Floats to 16-bit floats, rounded to the nearest, ties to even (included once per instruction set).
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace SIMD_NAMESPACE {

static inline uint16_t bfloat16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// For finite numbers: normalised pixels are far from both ends of the range, and what is tiny may become denormal.
static inline uint16_t float16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // below the smallest normal number: let the addition round
        float y, half = 0.5f;
        std::memcpy(&y, &magnitude, 4);
        y += half;
        uint32_t sum, one;
        std::memcpy(&sum, &y, 4);
        std::memcpy(&one, &half, 4);
        return (uint16_t)(sign | (sum - one));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

static void to_bfloat16(const float* __restrict x, int n, uint16_t* __restrict out) {
    for (int i = 0; i < n; i++) out[i] = bfloat16_of(x[i]);
}

static void to_float16(const float* x, int n, uint16_t* out) {
    int i = 0;
#if SIMD_LEVEL == 512
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtps_ph(load(x + i), _MM_FROUND_TO_NEAREST_INT));
#elif SIMD_LEVEL == 2
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(load(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) out[i] = float16_of(x[i]);
}

}  // namespace SIMD_NAMESPACE
