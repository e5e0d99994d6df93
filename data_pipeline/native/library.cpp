// The C interface that data_pipeline/core/native_library.py calls: batches of samples, shared out over threads.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>

#include "checksum.h"
#include "decode.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

void Scratch::release_if_larger(size_t bytes) {
    for (auto* v : {&columns, &rows, &weights, &filtered})
        if (v->capacity() * sizeof(float) > bytes) std::vector<float>().swap(*v);
}

const Kernels& kernels() {
#if defined(__x86_64__)
    static const Kernels& best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                                     ? simd_avx512::table
                                 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? simd_avx2::table
                                                                                                  : simd_generic::table;
    return best;
#else
    return simd_generic::table;
#endif
}

namespace {

// Buffers above this size are given back after the image that needed them.
constexpr size_t kKeepBytes = 64u << 20;

constexpr double kSpare = 2.0;

struct Worker {
    Decoder decoder;
    Scratch scratch;
    std::vector<uint8_t> bytes;
};

struct Engine {
    const Kernels* kernels;
    std::vector<std::unique_ptr<Worker>> workers;
    Pool pool;
    Engine(int threads, const Kernels* k) : kernels(k), pool(threads) {
        for (int i = 0; i < threads; i++) workers.push_back(std::make_unique<Worker>());
    }
};

// The largest of 1, 2, 4, 8 by which the decoder may shrink an image for these cuts: what is left must have at least
// kSpare pixels for every pixel of an output, so that the resampling that follows still decides what is kept.
int shrink_for(const double* geometry, const int32_t* cut_sizes, int cuts) {
    double least = 8 * kSpare;
    for (int v = 0; v < cuts; v++) least = std::min(least, std::min(geometry[v * 8 + 2], geometry[v * 8 + 3]) / cut_sizes[v]);
    int shrink = 1;
    while (shrink < 8 && 2 * shrink * kSpare <= least) shrink *= 2;
    return shrink;
}

Status read_sample(int fd, uint64_t offset, uint64_t size, bool check, std::vector<uint8_t>& bytes) {
    size_t wanted = size + (check ? 4 : 0);
    if (bytes.size() < wanted) bytes.resize(wanted);
    for (size_t done = 0; done < wanted;) {
        ssize_t n = pread(fd, bytes.data() + done, wanted - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return kReadError;
        if (n == 0) return kCutOff;
        done += n;
    }
    if (check) {
        uint32_t stored;
        std::memcpy(&stored, bytes.data() + size, 4);
        if (stored != crc32_of(bytes.data(), size)) return kBadChecksum;
    }
    return kOk;
}

}  // namespace

// Raised when a call changes: Python refuses a library that was built before.
EXPORT int mokd_interface() { return 2; }

EXPORT void* mokd_engine_create(int threads, const char* wanted_kernels) {
    const Kernels* chosen = &kernels();
#if defined(__x86_64__)
    for (const Kernels* k : {&simd_generic::table, &simd_avx2::table})
        if (wanted_kernels && !std::strcmp(wanted_kernels, k->name)) chosen = k;
#endif
    try {
        return new Engine(std::max(threads, 1), chosen);
    } catch (const std::exception&) {
        return nullptr;
    }
}

EXPORT void mokd_engine_destroy(void* engine) { delete (Engine*)engine; }

// Reads, decodes once and cuts `cuts` views of each of n samples: sample i goes to out + i * out_stride, view after
// view. geometry: [n, cuts, 8] float64 (x, y, width, height, clip x, y, width, height); flips: [n, cuts].
EXPORT void mokd_cut(void* handle, int fd, int64_t n, const uint64_t* offsets, const uint64_t* sizes,
                     const int32_t* widths, const int32_t* heights, const uint8_t* jpeg, int channels, int check, int cuts,
                     const double* geometry, const uint8_t* flips, const int32_t* cut_sizes, uint8_t* out,
                     int64_t out_stride, int32_t* status) {
    Engine& engine = *(Engine*)handle;
    engine.pool.run(n, [&](int64_t i, int thread) {
        Worker& worker = *engine.workers[thread];
        try {
            Planes planes;
            Status result = read_sample(fd, offsets[i], sizes[i], check, worker.bytes);
            Source source{worker.bytes.data(), sizes[i], widths[i], heights[i], channels, jpeg[i] != 0};
            if (result == kOk)
                result = worker.decoder.decode(source, shrink_for(geometry + i * cuts * 8, cut_sizes, cuts), planes);
            uint8_t* target = out + i * out_stride;
            for (int v = 0; v < cuts && result == kOk; v++) {
                const double* g = geometry + (i * cuts + v) * 8;
                Cut cut{g[0], g[1], g[2], g[3], (int)g[4], (int)g[5], (int)g[6], (int)g[7], flips[i * cuts + v] != 0, cut_sizes[v], channels};
                if (cut.clip_x < 0 || cut.clip_y < 0 || cut.clip_width < 1 || cut.clip_height < 1 ||
                    cut.clip_x + cut.clip_width > widths[i] || cut.clip_y + cut.clip_height > heights[i] ||
                    !(cut.width > 0) || !(cut.height > 0))
                    result = kBadBox;
                else
                    engine.kernels->resample(planes, cut, worker.scratch, target);
                target += (size_t)channels * cut_sizes[v] * cut_sizes[v];
            }
            status[i] = result;
        } catch (const std::bad_alloc&) {
            status[i] = kNoMemory;
        }
        worker.decoder.release_if_larger(kKeepBytes);
        worker.scratch.release_if_larger(kKeepBytes);
        if (worker.bytes.capacity() > kKeepBytes) std::vector<uint8_t>().swap(worker.bytes);
    });
}

// Photometrics of n x views views, as laid out by mokd_cut: view v of sample i goes to outs[v] + i * channels * size^2 numbers
// of `type` (see kernels.h).
EXPORT void mokd_photometrics(void* handle, int64_t n, int views, const uint8_t* in, int64_t in_stride, const int32_t* sizes,
                              const Photometric* parameters, float threshold, int channels, const float* mean, const float* std,
                              int type, uint8_t* const* outs) {
    Engine& engine = *(Engine*)handle;
    Finish finish{threshold, {}, {}, channels, (Type)type};
    for (int c = 0; c < channels; c++) {
        finish.scale[c] = 1.0f / (255.0f * std[c]);
        finish.shift[c] = -mean[c] / std[c];
    }
    engine.pool.run(n * views, [&](int64_t task, int thread) {
        int64_t i = task / views;
        int v = (int)(task % views);
        int64_t start = 0, numbers = (int64_t)channels * sizes[v] * sizes[v];
        for (int before = 0; before < v; before++) start += (int64_t)channels * sizes[before] * sizes[before];
        engine.kernels->photometrics(in + i * in_stride + start, sizes[v], parameters[task], finish,
                                     engine.workers[thread]->scratch, outs[v] + i * numbers * finish.bytes());
    });
}
