// Colour jitter, grey, blur, solarise and normalisation of one view (included once per instruction set).
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace SIMD_NAMESPACE {

constexpr int kReach = 16;  // no blur looks further, in pixels

static inline float clamp255(float x) { return std::min(std::max(x, 0.0f), 255.0f); }
static inline float grey_of(float r, float g, float b) { return 0.299f * r + 0.587f * g + 0.114f * b; }

// Every channel becomes base + factor * (channel - base), cut to 0..255.
static void blend(float* __restrict x, int n, float base, float factor) {
    for (int i = 0; i < n; i++) x[i] = clamp255(base + factor * (x[i] - base));
}

static float mean_grey(const float* __restrict r, const float* __restrict g, const float* __restrict b, int n) {
    constexpr int kWays = 64;
    float sums[kWays] = {};
    int i = 0;
    for (; i + kWays <= n; i += kWays)
        for (int j = 0; j < kWays; j++) sums[j] += grey_of(r[i + j], g[i + j], b[i + j]);
    double sum = 0.0;
    for (; i < n; i++) sum += grey_of(r[i], g[i], b[i]);
    for (float part : sums) sum += part;
    return (float)(sum / n);
}

static void saturate(float* __restrict r, float* __restrict g, float* __restrict b, int n, float factor) {
    for (int i = 0; i < n; i++) {
        float grey = grey_of(r[i], g[i], b[i]);
        r[i] = clamp255(grey + factor * (r[i] - grey));
        g[i] = clamp255(grey + factor * (g[i] - grey));
        b[i] = clamp255(grey + factor * (b[i] - grey));
    }
}

// Channel n of a colour of hue h (in sixths of the circle), value and chroma given.
static inline float hsv_channel(float n, float h, float value, float chroma) {
    float k = n + h;
    k = k >= 6.0f ? k - 6.0f : k;
    float t = std::min(std::min(k, 4.0f - k), 1.0f);
    return value - chroma * std::max(t, 0.0f);
}

static void shift_hue(float* __restrict r, float* __restrict g, float* __restrict b, int n, float turn) {
    for (int i = 0; i < n; i++) {
        float red = r[i], green = g[i], blue = b[i];
        float value = std::max(std::max(red, green), blue), low = std::min(std::min(red, green), blue);
        float chroma = value - low, inverse = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
        float from_red = (green - blue) * inverse;
        float from_green = 2.0f + (blue - red) * inverse, from_blue = 4.0f + (red - green) * inverse;
        float h = value == red ? from_red : value == green ? from_green : from_blue;
        h += 6.0f * turn + 6.0f;
        h = h >= 12.0f ? h - 12.0f : h;
        h = h >= 6.0f ? h - 6.0f : h;
        r[i] = hsv_channel(5.0f, h, value, chroma);
        g[i] = hsv_channel(3.0f, h, value, chroma);
        b[i] = hsv_channel(1.0f, h, value, chroma);
    }
}

// Both passes of a symmetric separable filter on one plane; pixels beyond an edge repeat it.
static void blur(float* __restrict x, int size, const float* kernel, int taps, float* __restrict buffer) {
    int n = size * size;
    for (int row = 0; row < size; row++) {
        float* out = buffer + row * size;
        for (int i = 0; i < size; i++) out[i] = kernel[0] * x[row * size + i];
        for (int t = 1; t < taps; t++) {
            const float* above = x + std::max(row - t, 0) * size;
            const float* below = x + std::min(row + t, size - 1) * size;
            float w = kernel[t];
            for (int i = 0; i < size; i++) out[i] += w * (above[i] + below[i]);
        }
    }
    float* line = buffer + n + kReach;
    for (int row = 0; row < size; row++) {
        for (int i = -kReach; i < 0; i++) line[i] = buffer[row * size];
        for (int i = 0; i < size; i++) line[i] = buffer[row * size + i];
        for (int i = size; i < size + kReach; i++) line[i] = buffer[row * size + size - 1];
        float* out = x + row * size;
        for (int i = 0; i < size; i++) out[i] = kernel[0] * line[i];
        for (int t = 1; t < taps; t++) {
            float w = kernel[t];
            for (int i = 0; i < size; i++) out[i] += w * (line[i - t] + line[i + t]);
        }
    }
}

static void photometrics(const uint8_t* in, int size, const Photometric& p, float threshold, const float* mean,
                         const float* std, Scratch& scratch, float* out) {
    int n = size * size;
    float *r = out, *g = out + n, *b = out + 2 * n;
    for (int i = 0; i < 3 * n; i++) out[i] = (float)in[i];
    for (int step = 0; p.jitter && step < 4; step++) {
        float factor = p.factor[p.order[step]];
        switch (p.order[step]) {
            case 0: blend(out, 3 * n, 0.0f, factor); break;
            case 1: blend(out, 3 * n, mean_grey(r, g, b, n), factor); break;
            case 2: saturate(r, g, b, n, factor); break;
            case 3: shift_hue(r, g, b, n, factor); break;
        }
    }
    if (p.grey) {
        for (int i = 0; i < n; i++) r[i] = grey_of(r[i], g[i], b[i]);
        std::memcpy(g, r, n * sizeof(float));
        std::memcpy(b, r, n * sizeof(float));
    }
    if (p.taps > 1) {
        scratch.filtered.resize((size_t)n + size + 2 * kReach);
        for (int c = 0; c < 3; c++) blur(out + c * n, size, p.kernel, p.taps, scratch.filtered.data());
    }
    for (int c = 0; c < 3; c++) {
        float scale = 1.0f / (255.0f * std[c]), shift = -mean[c] / std[c];
        float* x = out + c * n;
        if (p.solarize)
            for (int i = 0; i < n; i++) x[i] = x[i] >= threshold ? 255.0f - x[i] : x[i];
        for (int i = 0; i < n; i++) x[i] = x[i] * scale + shift;
    }
}

const Kernels table = {
#if SIMD_LEVEL == 512
    "avx512",
#elif SIMD_LEVEL == 2
    "avx2",
#else
    "generic",
#endif
    resample, photometrics};

}  // namespace SIMD_NAMESPACE
