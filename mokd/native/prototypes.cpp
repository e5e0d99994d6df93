// The fused prototype loss on blocks of logits that lie prototype by prototype: `[k, V, B]`, every prototype's logits of
// all rows beside one another. So reductions over prototypes need no shuffles, and the products that make the logits
// and take their gradients run at the speed of large ones.
//
// A block is cut into tiles of prototypes; every tile is one thread's and stays in its core's cache between the passes
// over it. What is summed up within a tile is single precision. Results do not depend on the number of threads.
//
// Compiled with OpenMP but not linked to a runtime of it: at load time it finds the one that torch has brought, so that
// both use the same threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

// What a loop over rows writes, it does not read as another row.
#if defined(__GNUC__) && !defined(__clang__)
#define LANES _Pragma("GCC ivdep")
#else
#define LANES
#endif

// What rows are compared with: probabilities `[k, views, B]`. See `mokd.losses.kernels.targets.Cut`.
struct Term {
    const float* p;
    int64_t views;
    int32_t paired;
    int32_t first_view;
    float factor;
};

namespace {

// exp of x <= 0, to 2 units in the last place; NaN stays NaN, what would be below 1e-37 does not get smaller.
inline __attribute__((always_inline)) float exp_of(float x) {
    x = x < -86.0f ? -86.0f : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    const float n = (x * 1.44269504f + round) - round;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

// The sum over views of `[views, B]`, for every image. 16 images at a time stay in registers.
inline __attribute__((always_inline)) void sum_of_views(const float* p, int64_t views, int64_t batch, float* sum) {
    int64_t b = 0;
    for (; b + 16 <= batch; b += 16) {
        float lane[16];
        for (int j = 0; j < 16; j++) lane[j] = p[b + j];
        for (int64_t v = 1; v < views; v++)
            for (int j = 0; j < 16; j++) lane[j] += p[v * batch + b + j];
        for (int j = 0; j < 16; j++) sum[b + j] = lane[j];
    }
    for (; b < batch; b++) {
        sum[b] = p[b];
        for (int64_t v = 1; v < views; v++) sum[b] += p[v * batch + b];
    }
}

FOR_EVERY_PROCESSOR
void observe_tile(const float* in, float* x, int64_t count, int64_t views, int64_t batch, float scale,
                  const float* scales, const float* offset, const Term* terms, int64_t n_terms, int64_t start, float* largest, float* total,
                  double* dots, float* scratch) {
    const int64_t rows = views * batch;
    float *all = scratch, *targets = all + batch, *dot = targets + batch;  // [B], [B], [n_terms, R]
    LANES
    for (int64_t r = 0; r < rows; r++) largest[r] = -__builtin_inff(), total[r] = 0.0f;
    for (int64_t i = 0; i < n_terms * rows; i++) dot[i] = 0.0f;
    for (int64_t k = 0; k < count; k++) {
        const float* from = in + k * rows;
        float* z = x + k * rows;
        const float shift = offset ? offset[k] : 0.0f, times = scales ? scale * scales[k] : scale;
        LANES
        for (int64_t r = 0; r < rows; r++) {
            const float value = (from[r] - shift) * times;
            z[r] = value;
            largest[r] = value > largest[r] ? value : largest[r];
        }
        if (n_terms) sum_of_views(z, views, batch, all);
        for (int64_t i = 0; i < n_terms; i++) {
            const Term& t = terms[i];
            const float* p = t.p + (start + k) * t.views * batch;
            float* d = dot + i * rows;
            if (t.paired) {
                // every view meets the sum of all targets, less its own
                sum_of_views(p, t.views, batch, targets);
                LANES
                for (int64_t b = 0; b < batch; b++) d[b] += all[b] * targets[b];
                const int64_t own = std::min(t.views, views) * batch;
                LANES
                for (int64_t r = 0; r < own; r++) d[r] -= z[r] * p[r];
            } else {
                const float* met = z + t.first_view * batch;
                LANES
                for (int64_t r = 0; r < t.views * batch; r++) d[r] += met[r] * p[r];
            }
        }
    }
    for (int64_t k = 0; k < count; k++) {
        float* z = x + k * rows;
        LANES
        for (int64_t r = 0; r < rows; r++) {
            z[r] = exp_of(z[r] - largest[r]);
            total[r] += z[r];
        }
    }
    for (int64_t i = 0; i < n_terms; i++) {
        double sum = 0.0;
        LANES
        for (int64_t r = 0; r < rows; r++) sum += dot[i * rows + r];
        dots[i] = sum;
    }
}

FOR_EVERY_PROCESSOR
void gradient_tile(float* x, int64_t count, int64_t views, int64_t batch, const float* factor, const float* largest,
                   const float* scales, const Term* terms, int64_t n_terms, int64_t start, float* scratch) {
    const int64_t rows = views * batch;
    float *targets = scratch, *sum = targets + rows;  // [R], [B]
    for (int64_t k = 0; k < count; k++) {
        float* g = x + k * rows;
        const float times = scales ? scales[k] : 1.0f;
        if (largest)
            LANES
            for (int64_t r = 0; r < rows; r++) g[r] = exp_of(g[r] * times - largest[r]);
        int64_t teachers = 0;
        for (int64_t i = 0; i < n_terms; i++) {
            const Term& t = terms[i];
            if (!t.paired) continue;
            const float* p = t.p + (start + k) * t.views * batch;
            LANES
            for (int64_t r = 0; r < t.views * batch; r++) targets[r] = (teachers ? targets[r] : 0.0f) + t.factor * p[r];
            teachers = t.views;
        }
        if (teachers) {
            sum_of_views(targets, teachers, batch, sum);
            for (int64_t v = 0; v < views; v++)
                LANES
                for (int64_t b = 0; b < batch; b++) {
                    const int64_t r = v * batch + b;
                    g[r] = g[r] * factor[r] - sum[b];
                }
            const int64_t own = std::min(teachers, views) * batch;
            LANES
            for (int64_t r = 0; r < own; r++) g[r] += targets[r];
        } else {
            LANES
            for (int64_t r = 0; r < rows; r++) g[r] *= factor[r];
        }
        for (int64_t i = 0; i < n_terms; i++) {
            const Term& t = terms[i];
            if (t.paired) continue;
            const float* p = t.p + (start + k) * t.views * batch;
            float* met = g + t.first_view * batch;
            LANES
            for (int64_t r = 0; r < t.views * batch; r++) met[r] -= t.factor * p[r];
        }
        if (scales)
            LANES
            for (int64_t r = 0; r < rows; r++) g[r] *= times;
    }
}

FOR_EVERY_PROCESSOR
void through_norm_tile(float* towards, const float* direction, const float* norm, const float* gain, float* out_gain,
                       int64_t count, int64_t width, float unit, bool scaled) {
    for (int64_t k = 0; k < count; k++) {
        float* g = towards + k * width;
        const float* v = direction + k * width;
        float lane[16] = {0.0f};
        int64_t c = 0;
        for (; c + 16 <= width; c += 16)
            for (int j = 0; j < 16; j++) lane[j] += g[c + j] * v[c + j];
        float radial = 0.0f;
        for (; c < width; c++) radial += g[c] * v[c];
        for (int j = 0; j < 16; j++) radial += lane[j];
        const float along = radial / (norm[k] * norm[k]), length = scaled ? unit : gain[k] / norm[k] * unit;
        if (out_gain) out_gain[k] = radial / (scaled ? gain[k] : norm[k]) * unit;
        LANES
        for (c = 0; c < width; c++) g[c] = (g[c] - along * v[c]) * length;
    }
}

}  // namespace

// x `[count, V, B]` becomes exp((in - offset) * scale * scales - largest) by tile; largest, total `[tiles, V, B]`, dots
// `[tiles, n_terms]`. in may be x; scales, offset `[count]` or null.
EXPORT void mokd_observe(const float* in, float* x, int64_t count, int64_t views, int64_t batch, float scale,
                         const float* scales, const float* offset, const Term* terms, int64_t n_terms, int64_t tile, float* largest,
                         float* total, double* dots) {
    const int64_t rows = views * batch, tiles = (count + tile - 1) / tile;
#pragma omp parallel
    {
        std::vector<float> scratch(2 * batch + n_terms * rows);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t start = i * tile;
            observe_tile(in + start * rows, x + start * rows, std::min(tile, count - start), views, batch, scale,
                         scales ? scales + start : nullptr, offset ? offset + start : nullptr, terms, n_terms, start, largest + i * rows, total + i * rows,
                         dots + i * n_terms, scratch.data());
        }
    }
}

// x `[count, V, B]` becomes x * factor less all targets, times `scales` `[count]` where given; with `largest`,
// exp(x * scales - largest) takes the place of x.
EXPORT void mokd_gradient(float* x, int64_t count, int64_t views, int64_t batch, const float* factor,
                          const float* largest, const float* scales, const Term* terms, int64_t n_terms,
                          int64_t tile) {
    const int64_t rows = views * batch, tiles = (count + tile - 1) / tile;
    int64_t teachers = views;
    for (int64_t i = 0; i < n_terms; i++) teachers = std::max(teachers, terms[i].views);
#pragma omp parallel
    {
        std::vector<float> scratch((teachers + 1) * batch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t start = i * tile;
            gradient_tile(x + start * rows, std::min(tile, count - start), views, batch, factor + i * rows,
                          largest ? largest + i * rows : nullptr, scales ? scales + start : nullptr, terms, n_terms, start, scratch.data());
        }
    }
}

// Gradients towards weights w = g v / |v| `[count, C]` become those towards v; out_gain `[count]` or null: towards g.
// scaled: they have been multiplied by g / |v| already.
EXPORT void mokd_through_norm(float* towards, const float* direction, const float* norm, const float* gain,
                              float* out_gain, int64_t count, int64_t width, float unit, int32_t scaled) {
    const int64_t tile = 256, tiles = (count + tile - 1) / tile;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t start = i * tile;
        through_norm_tile(towards + start * width, direction + start * width, norm + start, gain + start,
                          out_gain ? out_gain + start : nullptr, std::min(tile, count - start), width, unit, scaled);
    }
}
