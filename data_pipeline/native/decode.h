// One image of a beton to planes in memory. Every failure has a code; nothing half decoded is ever handed on.
#pragma once

#include <turbojpeg.h>

#include "kernels.h"

// Keep in step with the messages in data_pipeline/core/native_library.py.
enum Status : int32_t {
    kOk = 0,
    kReadError = 1,     // the operating system reported an error
    kCutOff = 2,        // the file ends before the sample does
    kBadChecksum = 3,   // the bytes are not those that were written
    kBadHeader = 4,     // not a JPEG, or of a kind that betons do not hold
    kBadSize = 5,       // its size is not what the beton says
    kBadData = 6,       // the decoder gave up
    kBadBox = 7,        // a crop outside the image
    kNoMemory = 8,
};

struct Source {
    const uint8_t* data;
    size_t size;
    int width, height;
    int channels;
    bool jpeg;  // otherwise raw pixels, row by row
};

// Owns a decoder and the memory it decodes into; one per thread.
class Decoder {
public:
    Decoder();
    ~Decoder();
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    // Fills `planes`, valid until the next call. shrink: 1, 2, 4 or 8; a JPEG is decoded at that part of its size,
    // rounded up, for a fraction of the work (its high frequencies are dropped). Raw images are never shrunk.
    Status decode(const Source& source, int shrink, Planes& planes);
    void release_if_larger(size_t bytes);

private:
    Status decode_jpeg(const Source& source, Planes& planes);
    void split(const uint8_t* pixels, int width, int height, int channels, Planes& planes);
    uint8_t* plane_memory(Planes& planes, const int* widths, const int* heights);

    tjhandle handle_;
    std::vector<uint8_t> memory_, interleaved_;
};
