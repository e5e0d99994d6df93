// CRC-32: by carry-less multiplication where the processor has it (Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ", Intel 2009), else by tables, eight bytes at a time.
#include "checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int s = 1; s < 8; s++) t[s][i] = t[0][t[s - 1][i] & 255] ^ (t[s - 1][i] >> 8);
    return t;
}

uint32_t by_tables(uint32_t c, const uint8_t* data, size_t size) {
    static const auto t = make_tables();
    for (; size >= 8; size -= 8, data += 8) {
        uint32_t low, high;
        std::memcpy(&low, data, 4);
        std::memcpy(&high, data + 4, 4);
        low ^= c;
        c = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][high & 255] ^
            t[2][high >> 8 & 255] ^ t[1][high >> 16 & 255] ^ t[0][high >> 24];
    }
    for (; size; size--, data++) c = t[0][(c ^ *data) & 255] ^ (c >> 8);
    return c;
}

#if defined(__x86_64__)

// x^n modulo the polynomial, bits reflected and shifted by one as the multiplication of reflected numbers wants it.
uint64_t power_of_x(int n) {
    uint32_t r = 1u << 31;
    for (int i = 0; i < n; i++) r = r & 1 ? 0xedb88320u ^ (r >> 1) : r >> 1;
    return (uint64_t)r << 1;
}

__attribute__((target("pclmul,sse4.1"))) __m128i fold(__m128i state, __m128i factors, __m128i data) {
    __m128i low = _mm_clmulepi64_si128(state, factors, 0x00), high = _mm_clmulepi64_si128(state, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

// At least 64 bytes, a multiple of 16. Folds to 16 bytes that have the same remainder; the tables do the rest.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t c, const uint8_t* data, size_t size) {
    static const uint64_t k[4] = {power_of_x(512 + 32), power_of_x(512 - 32), power_of_x(128 + 32), power_of_x(128 - 32)};
    auto at = [&](size_t i) { return _mm_loadu_si128((const __m128i*)data + i); };
    __m128i far = _mm_set_epi64x((long long)k[1], (long long)k[0]), near = _mm_set_epi64x((long long)k[3], (long long)k[2]);
    __m128i a = _mm_xor_si128(at(0), _mm_cvtsi32_si128((int)c)), b = at(1), d = at(2), e = at(3);
    size_t blocks = size / 16, i = 4;
    for (; i + 4 <= blocks; i += 4) {
        a = fold(a, far, at(i));
        b = fold(b, far, at(i + 1));
        d = fold(d, far, at(i + 2));
        e = fold(e, far, at(i + 3));
    }
    a = fold(fold(fold(a, near, b), near, d), near, e);
    for (; i < blocks; i++) a = fold(a, near, at(i));
    uint8_t rest[16];
    _mm_storeu_si128((__m128i*)rest, a);
    return by_tables(0, rest, 16);
}

#endif

}  // namespace

uint32_t crc32_of(const uint8_t* data, size_t size) {
    uint32_t c = ~0u;
#if defined(__x86_64__)
    static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (folds && size >= 64) {
        size_t part = size / 16 * 16;
        c = by_folding(c, data, part);
        data += part;
        size -= part;
    }
#endif
    return ~by_tables(c, data, size);
}
