#include "decode.h"

#include <algorithm>
#include <cmath>

Decoder::Decoder() : handle_(tjInitDecompress()) {}

Decoder::~Decoder() {
    if (handle_) tjDestroy(handle_);
}

void Decoder::release_if_larger(size_t bytes) {
    if (memory_.capacity() > bytes) std::vector<uint8_t>().swap(memory_);
    if (interleaved_.capacity() > bytes) std::vector<uint8_t>().swap(interleaved_);
}

uint8_t* Decoder::plane_memory(Planes& planes, const int* widths, const int* heights) {
    size_t total = kPadding;
    for (int p = 0; p < planes.count; p++) {
        planes.plane[p].stride = (widths[p] + 31) / 32 * 32;
        planes.plane[p].width = widths[p];
        planes.plane[p].height = heights[p];
        total += (size_t)planes.plane[p].stride * heights[p];
    }
    if (memory_.size() < total) memory_.resize(total);
    uint8_t* next = memory_.data();
    for (int p = 0; p < planes.count; p++) {
        planes.plane[p].data = next;
        next += (size_t)planes.plane[p].stride * heights[p];
    }
    return memory_.data();
}

void Decoder::split(const uint8_t* pixels, int width, int height, int channels, Planes& planes) {
    int widths[kMaxChannels], heights[kMaxChannels];
    std::fill(widths, widths + channels, width);
    std::fill(heights, heights + channels, height);
    planes.count = channels;
    planes.ycc = false;
    plane_memory(planes, widths, heights);
    for (int y = 0; y < height; y++) {
        const uint8_t* in = pixels + (size_t)y * width * channels;
        uint8_t* out[kMaxChannels];
        for (int p = 0; p < channels; p++) out[p] = const_cast<uint8_t*>(planes.plane[p].data) + (size_t)y * planes.plane[p].stride;
        if (channels == 3) {
            for (int x = 0; x < width; x++)
                for (int p = 0; p < 3; p++) out[p][x] = in[3 * x + p];
        } else {
            for (int x = 0; x < width; x++)
                for (int p = 0; p < channels; p++) out[p][x] = in[(size_t)channels * x + p];
        }
    }
}

Status Decoder::decode_jpeg(const Source& source, Planes& planes) {
    int width, height, subsampling, space;
    if (!handle_) return kNoMemory;
    if (tjDecompressHeader3(handle_, source.data, source.size, &width, &height, &subsampling, &space) != 0) return kBadHeader;
    if (width != source.width || height != source.height) return kBadSize;
    width = planes.width;
    height = planes.height;
    int failed;
    if (space == TJCS_YCbCr || space == TJCS_GRAY) {
        if (subsampling < 0) return kBadHeader;
        planes.count = space == TJCS_GRAY ? 1 : 3;
        planes.ycc = planes.count == 3;
        int widths[3], heights[3], strides[3];
        unsigned char* data[3];
        for (int p = 0; p < planes.count; p++) {
            widths[p] = tjPlaneWidth(p, width, subsampling);
            heights[p] = tjPlaneHeight(p, height, subsampling);
        }
        plane_memory(planes, widths, heights);
        for (int p = 0; p < planes.count; p++) {
            data[p] = const_cast<uint8_t*>(planes.plane[p].data);
            strides[p] = planes.plane[p].stride;
        }
        failed = tjDecompressToYUVPlanes(handle_, source.data, source.size, data, width, strides, height, 0);
    } else if (space == TJCS_RGB) {
        interleaved_.resize((size_t)width * height * 3);
        failed = tjDecompress2(handle_, source.data, source.size, interleaved_.data(), width, 0, height, TJPF_RGB, 0);
        split(interleaved_.data(), width, height, 3, planes);
    } else {
        return kBadHeader;
    }
    // a warning leaves a whole picture behind; the checksum has already told damage from oddity
    if (failed && tjGetErrorCode(handle_) != TJERR_WARNING) return kBadData;
    return kOk;
}

Status Decoder::decode(const Source& source, int shrink, Planes& planes) {
    planes.shrink = source.jpeg ? shrink : 1;
    planes.width = (source.width + planes.shrink - 1) / planes.shrink;
    planes.height = (source.height + planes.shrink - 1) / planes.shrink;
    if (source.jpeg) return source.channels == 1 || source.channels == 3 ? decode_jpeg(source, planes) : kBadHeader;
    if (source.size != (size_t)source.width * source.height * source.channels) return kBadSize;
    split(source.data, source.width, source.height, source.channels, planes);
    return kOk;
}
