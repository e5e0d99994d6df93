// What the kernels do, independent of the instruction set; `kernels()` picks the best set the processor has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// Keep in step with data_pipeline/config.py.
constexpr int kMaxChannels = 64;

// One 8-bit plane. Rows may be read up to kPadding bytes beyond their end.
constexpr int kPadding = 64;

struct Plane {
    const uint8_t* data;
    int stride, width, height;
};

// An image as the decoder leaves it: 1 plane (grey), 3 planes (YCbCr, chroma maybe smaller; or RGB), or any other number.
struct Planes {
    Plane plane[kMaxChannels];
    int count;
    bool ycc;
    int width, height;  // of the first plane, without padding
    int shrink;         // the image was decoded at 1 / shrink of its size
};

// A rectangle to cut, in pixels of the image at its full size: where it lies (fractions allowed), and from which
// pixels (`clip`) the filter may take its taps.
struct Cut {
    double x, y, width, height;
    int clip_x, clip_y, clip_width, clip_height;
    bool flip;
    int size;      // side of the square output
    int channels;  // of the output; a grey image fills three
};

// The colour changes of one view, in the order they are applied.
struct Photometric {
    int32_t order[4];  // 0 brightness, 1 contrast, 2 saturation, 3 hue
    float factor[4];
    int32_t jitter, grey, solarize;
    float kernel[16];  // blur: centre tap, then the taps at distance 1..15; taps = 0: none
    int32_t taps;
};

// Keep in step with data_pipeline/core/native_library.py.
enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What all views have in common: solarisation from `threshold` on, scale and shift by channel, the type of the result.
struct Finish {
    float threshold, scale[kMaxChannels], shift[kMaxChannels];
    int channels;
    Type type;
    int bytes() const { return type == kFloat32 ? 4 : 2; }
};

// Buffers of one thread, kept between images so that nothing is allocated per sample.
struct Scratch {
    std::vector<float> columns, rows, weights, filtered;
    std::vector<int> first;
    void release_if_larger(size_t bytes);
};

struct Kernels {
    const char* name;
    // Antialiased bicubic resample of `cut` to channels x size x size bytes, planar.
    void (*resample)(const Planes&, const Cut&, Scratch&, uint8_t* out);
    // channels x size x size bytes to as many numbers: colour changes, then x * scale + shift in the type of the result.
    void (*photometrics)(const uint8_t* in, int size, const Photometric&, const Finish&, Scratch&, uint8_t* out);
};

const Kernels& kernels();

namespace simd_generic { extern const Kernels table; }
#if defined(__x86_64__)
namespace simd_avx2 { extern const Kernels table; }
namespace simd_avx512 { extern const Kernels table; }
#endif
