// Antialiased bicubic resampling in two separable passes (included once per instruction set).
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace SIMD_NAMESPACE {

// Taps of one axis: output i is the sum over k < taps of weights[i * taps + k] * source[first[i] + k].
struct Axis {
    int* first;
    float* weights;
    int taps, low, high;  // every tap lies in low..high-1
};

static inline float bicubic(float x) {
    constexpr float a = -0.5f;
    x = std::fabs(x);
    float near = ((a + 2.0f) * x - (a + 3.0f)) * x * x + 1.0f;
    float far = ((a * x - 5.0f * a) * x + 8.0f * a) * x - 4.0f * a;
    return x < 1.0f ? near : x < 2.0f ? far : 0.0f;
}

static int taps_of(double length, int size) {
    double scale = std::max(length / size, 1.0);
    return (int)std::ceil(2.0 * scale) * 2 + 1;
}

// Pillow's coefficients: the filter is stretched by the scale when shrinking, cut off at the clip, and normalised.
static void fill_axis(Axis& axis, double start, double length, int low, int high, int size, bool flip) {
    double scale = length / size, stretch = std::max(scale, 1.0), support = 2.0 * stretch;
    float inverse = (float)(1.0 / stretch);
    axis.taps = std::min(axis.taps, high - low);
    axis.low = high;
    axis.high = low;
    for (int i = 0; i < size; i++) {
        double centre = start + (i + 0.5) * scale;
        int begin = std::max((int)std::floor(centre - support + 0.5), low);
        int end = std::min((int)std::floor(centre + support + 0.5), high);
        begin = std::min(begin, high - 1);
        end = std::max(end, begin + 1);
        axis.low = std::min(axis.low, begin);
        axis.high = std::max(axis.high, end);
        // all outputs have the same number of taps; those that do not exist weigh 0
        int shift = std::max(begin + axis.taps - high, 0);
        int slot = flip ? size - 1 - i : i;
        float* weights = axis.weights + (size_t)slot * axis.taps;
        float offset = (float)(begin - shift + 0.5 - centre), sum = 0.0f;
        axis.first[slot] = begin - shift;
        for (int k = 0; k < axis.taps; k++) {
            float w = k >= shift && k < shift + end - begin ? bicubic((k + offset) * inverse) : 0.0f;
            weights[k] = w;
            sum += w;
        }
        float norm = 1.0f / sum;
        for (int k = 0; k < axis.taps; k++) weights[k] *= norm;
    }
    axis.low = *std::min_element(axis.first, axis.first + size);
    axis.high = *std::max_element(axis.first, axis.first + size) + axis.taps;
}

// Output rows row .. row + kLanes - 1 of one plane; `out` holds for each column its kLanes rows.
static void resample_rows(const Plane& plane, const Axis& ax, const Axis& ay, int row, int size, float* columns,
                          float* out) {
    int width = ax.high - ax.low, padded = (width + kLanes - 1) / kLanes * kLanes;
    for (int x = 0; x < padded; x += kLanes) {
        Vec block[kLanes];
        for (int r = 0; r < kLanes; r++) {
            int y = std::min(row + r, size - 1);
            const float* w = ay.weights + (size_t)y * ay.taps;
            const uint8_t* source = plane.data + (size_t)ay.first[y] * plane.stride + ax.low + x;
            Vec sum = splat(0.0f);
            for (int k = 0; k < ay.taps; k++, source += plane.stride) sum = fma(load_u8(source), splat(w[k]), sum);
            block[r] = sum;
        }
        transpose(block);
        for (int r = 0; r < kLanes; r++) store(columns + (size_t)(x + r) * kLanes, block[r]);
    }
    for (int x = 0; x < size; x++) {
        const float* w = ax.weights + (size_t)x * ax.taps;
        const float* source = columns + (size_t)(ax.first[x] - ax.low) * kLanes;
        Vec sum = splat(0.0f);
        for (int k = 0; k < ax.taps; k++) sum = fma(load(source + (size_t)k * kLanes), splat(w[k]), sum);
        store(out + (size_t)x * kLanes, sum);
    }
}

static void write_rows(const float* column, int row, int size, uint8_t* out) {
    int rows = std::min(kLanes, size - row);
    for (int x = 0; x < size; x += kLanes) {
        Vec block[kLanes];
        for (int r = 0; r < kLanes; r++) block[r] = load(column + (size_t)std::min(x + r, size - 1) * kLanes);
        transpose(block);
        if (x + kLanes <= size) {
            for (int r = 0; r < rows; r++) store_u8(out + (size_t)(row + r) * size + x, block[r]);
        } else {
            for (int r = 0; r < rows; r++) {
                uint8_t tail[kLanes];
                store_u8(tail, block[r]);
                std::memcpy(out + (size_t)(row + r) * size + x, tail, size - x);
            }
        }
    }
}

static void resample(const Planes& image, const Cut& cut, Scratch& scratch, uint8_t* out) {
    int size = cut.size, kinds = image.count == 3 && image.plane[1].width != image.plane[0].width ? 2 : 1;
    if (image.count == 3 && image.plane[1].height != image.plane[0].height) kinds = 2;
    int max_taps = taps_of(std::max(cut.width, cut.height), size);
    scratch.first.resize((size_t)4 * size);
    scratch.weights.resize((size_t)4 * size * max_taps);
    Axis axes[2][2];
    int widest = 0;
    for (int kind = 0; kind < kinds; kind++) {
        const Plane& plane = image.plane[kind];
        // a chroma sample covers 2 x 2, 2 x 1, ... pixels; JPEG puts it in their middle
        double sx = image.shrink * (kind ? std::round((double)image.plane[0].width / plane.width) : 1.0);
        double sy = image.shrink * (kind ? std::round((double)image.plane[0].height / plane.height) : 1.0);
        for (int axis = 0; axis < 2; axis++) {
            double s = axis ? sy : sx;
            double start = (axis ? cut.y : cut.x) / s, length = (axis ? cut.height : cut.width) / s;
            int clip = axis ? cut.clip_y : cut.clip_x, clip_size = axis ? cut.clip_height : cut.clip_width;
            int low = (int)std::floor(clip / s);
            int high = std::min((int)std::ceil((clip + clip_size) / s), axis ? plane.height : plane.width);
            Axis& a = axes[kind][axis];
            a.first = scratch.first.data() + (size_t)(kind * 2 + axis) * size;
            a.weights = scratch.weights.data() + (size_t)(kind * 2 + axis) * size * max_taps;
            a.taps = std::min(taps_of(length, size), max_taps);
            fill_axis(a, start, length, low, high, size, cut.flip && axis == 0);
        }
        widest = std::max(widest, axes[kind][0].high - axes[kind][0].low);
    }
    scratch.columns.resize((size_t)(widest + 2 * kLanes) * kLanes);
    scratch.rows.resize((size_t)std::max(image.count, 3) * size * kLanes);
    float* y = scratch.rows.data();
    float *u = y + (size_t)size * kLanes, *v = u + (size_t)size * kLanes;
    size_t area = (size_t)size * size;
    for (int row = 0; row < size; row += kLanes) {
        for (int p = 0; p < image.count; p++) {
            Axis* axis = axes[p && kinds == 2];
            resample_rows(image.plane[p], axis[0], axis[1], row, size, scratch.columns.data(),
                          y + (size_t)p * size * kLanes);
        }
        if (image.ycc && cut.channels == 3) {
            for (size_t i = 0; i < (size_t)size * kLanes; i += kLanes) {
                Vec luma = load(y + i), blue = load(u + i) - splat(128.0f), red = load(v + i) - splat(128.0f);
                store(y + i, fma(red, splat(1.402f), luma));
                store(u + i, fma(blue, splat(-0.344136f), fma(red, splat(-0.714136f), luma)));
                store(v + i, fma(blue, splat(1.772f), luma));
            }
        }
        for (int c = 0; c < cut.channels; c++)
            write_rows(y + (image.count > 1 ? (size_t)c * size * kLanes : 0), row, size, out + c * area);
    }
}

}  // namespace SIMD_NAMESPACE
