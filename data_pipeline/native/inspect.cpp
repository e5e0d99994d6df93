// Is a JPEG fit to be stored as it is? Answers "yes" or "look closer"; the caller's slower decoder decides the latter.
#include <turbojpeg.h>

#include <cstring>
#include <memory>
#include <vector>

#include "scan.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Inspector {
    tjhandle handle = tjInitDecompress();
    std::vector<uint8_t> pixels;
    ~Inspector() {
        if (handle) tjDestroy(handle);
    }
};

// The orientation in an EXIF block (a small TIFF file); 1 where it has none, 0 where it cannot be read.
int exif_orientation(const uint8_t* tiff, size_t size) {
    if (size < 8) return 0;
    bool little = tiff[0] == 'I' && tiff[1] == 'I';
    if (!little && !(tiff[0] == 'M' && tiff[1] == 'M')) return 0;
    auto u16 = [&](size_t at) { return little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1]; };
    auto u32 = [&](size_t at) {
        uint32_t first = (uint32_t)u16(at), second = (uint32_t)u16(at + 2);
        return little ? first | second << 16 : first << 16 | second;
    };
    size_t directory = u32(4);
    if (u16(2) != 42 || directory < 8 || directory > size - 2) return 0;
    size_t entries = (size_t)u16(directory);
    if (entries > (size - directory - 2) / 12) return 0;
    for (size_t i = 0; i < entries; i++) {
        size_t entry = directory + 2 + 12 * i;
        if (u16(entry) == 0x0112) return u16(entry + 2) == 3 && u32(entry + 4) == 1 ? u16(entry + 8) : 0;
    }
    return 1;
}

// Whether all that stands before the first scan says "upright".
bool upright(const uint8_t* data, size_t size) {
    for (size_t at = 2; at + 4 <= size;) {
        if (data[at] != 0xff) return false;
        uint8_t marker = data[at + 1];
        if (marker == 0xff) {  // a fill byte
            at++;
            continue;
        }
        if (marker == 0xda) return true;
        if (marker == 0x01 || (marker >= 0xd0 && marker <= 0xd9)) return false;
        size_t length = (size_t)data[at + 2] << 8 | data[at + 3];
        if (length < 2 || at + 2 + length > size) return false;
        const uint8_t* body = data + at + 4;
        size_t rest = length - 2;
        if (marker == 0xe1 && rest >= 6 && !std::memcmp(body, "Exif\0", 5)) {
            if (exif_orientation(body + 6, rest - 6) != 1) return false;
        } else if (marker == 0xe1 && memmem(body, rest, "Orientation", 11)) {
            return false;  // XMP can say it too
        }
        at += 2 + length;
    }
    return false;
}

}  // namespace

// 1: an upright grey or YCbCr JPEG that decodes to its end without a warning, its size in *width and *height.
// 0: anything else. Every bit of its scans is read, but pixels are made only where the scans are unusual, and then at
// an eighth of the size.
EXPORT int mokd_is_plain_jpeg(const uint8_t* data, uint64_t size, int32_t* width, int32_t* height) {
    static thread_local Inspector inspector;
    int subsampling, space;
    if (!inspector.handle || !upright(data, size)) return 0;
    if (tjDecompressHeader3(inspector.handle, data, size, width, height, &subsampling, &space) != 0) return 0;
    if (subsampling < 0 || (space != TJCS_YCbCr && space != TJCS_GRAY)) return 0;
    if (is_whole_baseline_jpeg(data, size)) return 1;
    int small_width = (*width + 7) / 8, small_height = (*height + 7) / 8;
    int planes = space == TJCS_GRAY ? 1 : 3, strides[3];
    size_t starts[3], total = 0;
    for (int p = 0; p < planes; p++) {
        strides[p] = tjPlaneWidth(p, small_width, subsampling);
        starts[p] = total;
        total += (size_t)strides[p] * tjPlaneHeight(p, small_height, subsampling);
    }
    if (inspector.pixels.size() < total) inspector.pixels.resize(total);
    uint8_t* out[3];
    for (int p = 0; p < planes; p++) out[p] = inspector.pixels.data() + starts[p];
    return tjDecompressToYUVPlanes(inspector.handle, data, size, out, small_width, strides, small_height, 0) == 0;
}
