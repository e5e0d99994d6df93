// Colour jitter, grey, blur, solarise and normalisation of one view (included once per instruction set).
//
// A view is worked off row by row, so that everything between its bytes and its result stays in the first-level cache:
// colours of a row, its blur along x, the blur along y over a ring of such rows, the rest. Only the contrast needs a
// pass of its own before, for the mean brightness of what the earlier operations make of the view.
#pragma once

#include <algorithm>
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "simd.h"

namespace SIMD_NAMESPACE {

constexpr int kReach = 16;            // no blur looks further, in pixels
constexpr int kRing = 2 * kReach;     // rows that a blur along y may need at a time

static inline float clamp255(float x) { return std::min(std::max(x, 0.0f), 255.0f); }
static inline float grey_of(float r, float g, float b) { return 0.299f * r + 0.587f * g + 0.114f * b; }

// One row of a view: its channels, n floats each, `stride` floats apart.
struct Row {
    float* first;
    size_t stride;
    int n, channels;
    float* channel(int c) const { return first + c * stride; }
};

// Every channel becomes base + factor * (channel - base), cut to 0..255.
static void blend(float* __restrict x, int n, float base, float factor) {
    float rest = base - factor * base;
    for (int i = 0; i < n; i++) x[i] = clamp255(rest + factor * x[i]);
}

static void saturate(const Row& row, float factor) {
    float *__restrict r = row.channel(0), *__restrict g = row.channel(1), *__restrict b = row.channel(2);
    for (int i = 0; i < row.n; i++) {
        float rest = (1.0f - factor) * grey_of(r[i], g[i], b[i]);
        r[i] = clamp255(rest + factor * r[i]);
        g[i] = clamp255(rest + factor * g[i]);
        b[i] = clamp255(rest + factor * b[i]);
    }
}

// Channel n of a colour of hue h (in sixths of the circle), value and chroma given.
static inline float hsv_channel(float n, float h, float value, float chroma) {
    float k = n + h;
    k = k >= 6.0f ? k - 6.0f : k;
    float t = std::min(std::min(k, 4.0f - k), 1.0f);
    return value - chroma * std::max(t, 0.0f);
}

static void shift_hue(const Row& row, float turn) {
    float *__restrict r = row.channel(0), *__restrict g = row.channel(1), *__restrict b = row.channel(2);
    for (int i = 0; i < row.n; i++) {
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

// The jitter operations begin .. end - 1 in the order of the view; `base` is what the contrast works towards.
// Saturation and hue are of three channels alone.
static void jitter(const Row& row, const Photometric& p, int begin, int end, float base) {
    for (int step = begin; step < end; step++) {
        float factor = p.factor[p.order[step]];
        switch (p.order[step]) {
            case 0:
            case 1:
                for (int c = 0; c < row.channels; c++) blend(row.channel(c), row.n, p.order[step] == 0 ? 0.0f : base, factor);
                break;
            case 2:
                if (row.channels == 3) saturate(row, factor);
                break;
            case 3:
                if (row.channels == 3) shift_hue(row, factor);
                break;
        }
    }
}

static void load_row(const uint8_t* in, int y, int size, const Row& row) {
    for (int c = 0; c < row.channels; c++) {
        const uint8_t* __restrict from = in + ((size_t)c * size + y) * size;
        float* __restrict to = row.channel(c);
        for (int i = 0; i < size; i++) to[i] = (float)from[i];
    }
}

// The sum of the grey levels of a row: luma of three channels, the mean of any other number.
static float grey_sum(const Row& row) {
    if (row.channels != 3) {
        double sum = 0.0;
        for (int c = 0; c < row.channels; c++)
            for (int i = 0; i < row.n; i++) sum += row.channel(c)[i];
        return (float)(sum / row.channels);
    }
    constexpr int kWays = 32;
    const float *__restrict r = row.channel(0), *__restrict g = row.channel(1), *__restrict b = row.channel(2);
    float sums[kWays] = {}, sum = 0.0f;
    int i = 0;
    for (; i + kWays <= row.n; i += kWays)
        for (int j = 0; j < kWays; j++) sums[j] += grey_of(r[i + j], g[i + j], b[i + j]);
    for (; i < row.n; i++) sum += grey_of(r[i], g[i], b[i]);
    for (float part : sums) sum += part;
    return sum;
}

static uint32_t byte_sum(const uint8_t* __restrict x, int n) {
    uint32_t sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum;
}

// The mean grey level of the view when its contrast is changed, which is after `before` other operations.
static float contrast_base(const uint8_t* in, int size, const Photometric& p, int before, const Row& row) {
    int n = size * size;
    if (before == 0) {
        constexpr double luma[3] = {0.299, 0.587, 0.114};
        double sum = 0.0;
        for (int c = 0; c < row.channels; c++) {
            double bytes = 0.0;
            for (int y = 0; y < size; y++) bytes += byte_sum(in + (size_t)c * n + (size_t)y * size, size);
            sum += bytes * (row.channels == 3 ? luma[c] : 1.0 / row.channels);
        }
        return (float)(sum / n);
    }
    double sum = 0.0;
    for (int y = 0; y < size; y++) {
        load_row(in, y, size, row);
        jitter(row, p, 0, before, 0.0f);
        sum += grey_sum(row);
    }
    return (float)(sum / n);
}

// A symmetric filter along x; pixels beyond an edge repeat it. `line` has room for kReach pixels on both sides.
static void blur_row(const float* __restrict x, int size, int padded, const Photometric& p, float* line, float* out) {
    std::fill(line - kReach, line, x[0]);
    std::memcpy(line, x, size * sizeof(float));
    std::fill(line + size, line + padded + kReach, x[size - 1]);
    for (int i = 0; i < padded; i += kLanes) {
        Vec sum = load(line + i) * splat(p.kernel[0]);
        for (int t = 1; t < p.taps; t++) sum = fma(load(line + i - t) + load(line + i + t), splat(p.kernel[t]), sum);
        store(out + i, sum);
    }
}

// The same along y: row y from a ring of rows `stride` floats apart.
static void blur_column(const float* ring, size_t stride, int y, int size, int padded, const Photometric& p, float* out) {
    const float *above[kReach], *below[kReach];
    for (int t = 0; t < p.taps; t++) {
        above[t] = ring + (size_t)(std::max(y - t, 0) % kRing) * stride;
        below[t] = ring + (size_t)(std::min(y + t, size - 1) % kRing) * stride;
    }
    for (int i = 0; i < padded; i += kLanes) {
        Vec sum = load(above[0] + i) * splat(p.kernel[0]);
        for (int t = 1; t < p.taps; t++) sum = fma(load(above[t] + i) + load(below[t] + i), splat(p.kernel[t]), sum);
        store(out + i, sum);
    }
}

// Solarises, normalises and writes row y of the result.
static void finish_row(const Row& row, int y, int size, bool solarize, const Finish& finish, uint8_t* out) {
    for (int c = 0; c < row.channels; c++) {
        float* __restrict x = row.channel(c);
        float scale = finish.scale[c], shift = finish.shift[c], threshold = finish.threshold;
        if (solarize)
            for (int i = 0; i < size; i++) x[i] = x[i] >= threshold ? 255.0f - x[i] : x[i];
        size_t at = ((size_t)c * size + y) * size;
        if (finish.type == kFloat32) {
            float* __restrict to = (float*)out + at;
            for (int i = 0; i < size; i++) to[i] = x[i] * scale + shift;
        } else {
            for (int i = 0; i < size; i++) x[i] = x[i] * scale + shift;
            uint16_t* to = (uint16_t*)out + at;
            if (finish.type == kBFloat16)
                to_bfloat16(x, size, to);
            else
                to_float16(x, size, to);
        }
    }
}

static void photometrics(const uint8_t* in, int size, const Photometric& p, const Finish& finish, Scratch& scratch,
                         uint8_t* out) {
    int padded = (size + 15) / 16 * 16;
    size_t line_floats = padded + 2 * kReach, stride = (size_t)finish.channels * padded;  // of the ring: a whole row
    scratch.filtered.resize(stride + line_floats + (p.taps > 1 ? kRing * stride : 0));
    float *colours = scratch.filtered.data(), *line = colours + stride + kReach;
    float* ring = colours + stride + line_floats;
    Row row{colours, (size_t)padded, size, finish.channels};
    bool grey = p.grey && row.channels == 3;

    int steps = p.jitter ? 4 : 0, before = (int)(std::find(p.order, p.order + steps, 1) - p.order);
    float base = before < steps ? contrast_base(in, size, p, before, row) : 0.0f;
    auto change_colours = [&](int y) {
        load_row(in, y, size, row);
        jitter(row, p, 0, steps, base);
        if (grey) {
            float *r = row.channel(0), *g = row.channel(1), *b = row.channel(2);
            for (int i = 0; i < size; i++) r[i] = grey_of(r[i], g[i], b[i]);
            std::memcpy(g, r, size * sizeof(float));
            std::memcpy(b, r, size * sizeof(float));
        }
    };
    if (p.taps <= 1) {
        for (int y = 0; y < size; y++) {
            change_colours(y);
            finish_row(row, y, size, p.solarize, finish, out);
        }
        return;
    }
    int reach = p.taps - 1, channels = grey ? 1 : row.channels;
    for (int y = 0; y < size + reach; y++) {
        if (y < size) {
            change_colours(y);
            float* to = ring + (size_t)(y % kRing) * stride;
            for (int c = 0; c < channels; c++) blur_row(row.channel(c), size, padded, p, line, to + (size_t)c * padded);
        }
        if (y < reach) continue;
        for (int c = 0; c < channels; c++)
            blur_column(ring + (size_t)c * padded, stride, y - reach, size, padded, p, row.channel(c));
        for (int c = channels; c < row.channels; c++) std::memcpy(row.channel(c), row.first, size * sizeof(float));
        finish_row(row, y - reach, size, p.solarize, finish, out);
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
