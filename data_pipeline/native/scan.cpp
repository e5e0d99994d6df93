#include "scan.h"

#include <cstring>
#include <vector>

namespace {

constexpr int kPeek = 11;         // bits that one look takes in
constexpr int kEndOfBlock = 128;  // further than any runs of zeros in one look lead

// What codes do: bits to skip (their own and those of the numbers that follow), coefficients to go forward.
struct Step {
    uint8_t bits, forward;
};

// The first code in the bits that are looked at (bits = 0: it is longer than they are), and all that lie in them whole.
struct Look {
    Step first, all;
};

struct Huffman {
    bool defined = false;
    Look looks[1 << kPeek];
    int32_t largest[17];        // of each length, -1: none
    int32_t offset[17];
    Step symbols[256];
    int count;

    // From the counts by length and the symbols of a DHT segment. False where they make no code.
    // A table is kept from image to image: most use the same ones.
    bool define(const uint8_t* segment, size_t size, bool dc) {
        if (made_of_size == size && !std::memcmp(made_of, segment, size)) return defined = true;
        made_of_size = 0;
        const uint8_t *counts = segment, *values = segment + 16;
        std::memset(looks, 0, sizeof looks);
        uint8_t lengths[1 << kPeek] = {};
        int32_t code = 0;
        count = 0;
        for (int length = 1; length <= 16; length++) {
            offset[length] = count - code;
            for (int i = 0; i < counts[length - 1]; i++, code++, count++) {
                int value = values[count], bits = dc ? value : value & 15, run = dc ? 0 : value >> 4;
                if (code >= 1 << length || (dc && value > 11)) return false;
                if (!dc && bits == 0 && run != 0 && run != 15) return false;
                bool end = !dc && value == 0;
                Step step{(uint8_t)(length + bits), (uint8_t)(end ? kEndOfBlock : run + 1)};
                symbols[count] = step;
                if (length <= kPeek)
                    for (int k = 0; k < 1 << (kPeek - length); k++) {
                        int look = (code << (kPeek - length)) + k;
                        looks[look].first = step;
                        lengths[look] = length;
                    }
            }
            largest[length] = counts[length - 1] ? code - 1 : -1;
            code <<= 1;
        }
        if (!dc) join(lengths);
        std::memcpy(made_of, segment, size);
        made_of_size = size;
        return defined = true;
    }

private:
    uint8_t made_of[16 + 256];
    size_t made_of_size = 0;

    void join(const uint8_t* lengths) {
        for (int look = 0; look < 1 << kPeek; look++) {
            Step all{};
            while (all.bits < kPeek && all.forward < kEndOfBlock) {
                int next = look << all.bits & ((1 << kPeek) - 1);
                if (!lengths[next] || all.bits + lengths[next] > kPeek) break;
                all.bits += looks[next].first.bits;
                all.forward += looks[next].first.forward;
            }
            looks[look].all = all;
        }
    }
};

// The bits of an interval between markers, without the zeros that are stuffed after each ff byte.
class Bits {
public:
    explicit Bits(std::vector<uint8_t>& bytes) : bytes_(bytes) {}
    // Takes in all up to the next marker, and returns where that stands; `end` where there is none.
    const uint8_t* open(const uint8_t* from, const uint8_t* end) {
        if (bytes_.size() < (size_t)(end - from) + kBeyond) bytes_.resize(end - from + kBeyond);
        uint8_t* to = bytes_.data();
        while (from < end) {
            const uint8_t* ff = (const uint8_t*)std::memchr(from, 0xff, end - from);
            size_t plain = (ff ? ff : end) - from;
            std::memcpy(to, from, plain);
            to += plain;
            from += plain;
            if (!ff || end - ff < 2 || ff[1] != 0) break;
            *to++ = 0xff;
            from += 2;
        }
        std::memset(to, 0, kBeyond);
        at_ = bytes_.data();
        end_ = to;
        bits_ = 0;
        count_ = 0;
        return from;
    }
    // At least 56 bits in hand.
    void fill() {
        uint64_t next;
        std::memcpy(&next, at_, 8);
        bits_ |= __builtin_bswap64(next) >> count_;
        at_ += (63 - count_) >> 3;
        count_ |= 56;
    }
    uint32_t peek(int n) const { return (uint32_t)(bits_ >> (64 - n)); }
    void skip(int n) {
        bits_ <<= n;
        count_ -= n;
    }
    // Bits of the interval that have not been used; negative where it was too short.
    int64_t left() const { return (end_ - at_) * 8 + count_; }

private:
    // What a block and a refill can read past the end, if asked for `left` after each block.
    static constexpr size_t kBeyond = 64 * 4 + 16;
    std::vector<uint8_t>& bytes_;
    const uint8_t *at_ = nullptr, *end_ = nullptr;
    uint64_t bits_ = 0;
    int count_ = 0;
};

bool next_step(Bits& bits, const Huffman& codes, Step& step) {
    bits.fill();
    step = codes.looks[bits.peek(kPeek)].first;
    if (step.bits) {
        bits.skip(step.bits);
        return true;
    }
    for (int length = kPeek + 1; length <= 16; length++) {
        int32_t code = (int32_t)bits.peek(length);
        if (code <= codes.largest[length]) {
            int index = code + codes.offset[length];
            if (index < 0 || index >= codes.count) return false;
            step = codes.symbols[index];
            bits.skip(step.bits);
            return true;
        }
    }
    return false;
}

// All codes that one look takes in, if they belong to the block of which k coefficients are known.
inline bool several_steps(Bits& bits, const Huffman& codes, int& k) {
    Step step = codes.looks[bits.peek(kPeek)].all;
    if (!step.bits || k + (step.forward & (kEndOfBlock - 1)) >= 64) return false;
    bits.skip(step.bits);
    k += step.forward;
    return true;
}

bool read_block(Bits& bits, const Huffman& dc, const Huffman& ac) {
    Step step;
    if (!next_step(bits, dc, step)) return false;
    int k = 1;
    while (k < 64) {
        bits.fill();
        if (several_steps(bits, ac, k)) {
            if (k < 64) several_steps(bits, ac, k);  // what was filled is enough for two looks
        } else {
            if (!next_step(bits, ac, step)) return false;
            k += step.forward;
        }
    }
    return (k == 64 || k >= kEndOfBlock) && bits.left() >= 0;
}

struct Component {
    int id, across, down, table;
    const Huffman *dc, *ac;
};

struct Frame {
    int width = 0, height = 0, count = 0, interval = 0;
    Component components[3];
    Huffman dc[4], ac[4];
    bool quantised[4] = {};

    void reset() {
        width = height = count = interval = 0;
        for (int slot = 0; slot < 4; slot++) dc[slot].defined = ac[slot].defined = quantised[slot] = false;
    }
    bool tables(const uint8_t* body, size_t size) {
        while (size >= 17) {
            int total = 0, slot = body[0] & 15;
            for (int i = 1; i <= 16; i++) total += body[i];
            if (slot > 3 || body[0] >> 4 > 1 || total > 256 || size < 17u + total) return false;
            bool is_dc = body[0] >> 4 == 0;
            if (!(is_dc ? dc : ac)[slot].define(body + 1, 16 + total, is_dc)) return false;
            body += 17 + total;
            size -= 17 + total;
        }
        return size == 0;
    }
    bool quantisation(const uint8_t* body, size_t size) {
        while (size) {
            size_t length = body[0] >> 4 ? 129 : 65;
            if ((body[0] & 15) > 3 || size < length) return false;
            quantised[body[0] & 15] = true;
            body += length;
            size -= length;
        }
        return true;
    }
    bool start(const uint8_t* body, size_t size) {
        if (count || size < 6 || body[0] != 8) return false;
        height = body[1] << 8 | body[2];
        width = body[3] << 8 | body[4];
        count = body[5];
        if (!width || !height || (count != 1 && count != 3) || size != 6u + 3 * count) return false;
        for (int c = 0; c < count; c++) {
            const uint8_t* b = body + 6 + 3 * c;
            components[c] = {b[0], b[1] >> 4, b[1] & 15, b[2], nullptr, nullptr};
            if (components[c].across < 1 || components[c].across > 4 || components[c].down < 1 ||
                components[c].down > 4 || components[c].table > 3)
                return false;
        }
        return true;
    }
    bool scan_header(const uint8_t* body, size_t size) {
        if (!count || size != 4u + 2 * count || body[0] != count) return false;
        for (int c = 0; c < count; c++) {
            int id = body[1 + 2 * c], slots = body[2 + 2 * c];
            Component& component = components[c];
            if (id != component.id || (slots >> 4) > 3 || (slots & 15) > 3 || !quantised[component.table]) return false;
            component.dc = &dc[slots >> 4];
            component.ac = &ac[slots & 15];
            if (!component.dc->defined || !component.ac->defined) return false;
        }
        const uint8_t* rest = body + 1 + 2 * count;
        return rest[0] == 0 && rest[1] == 63 && rest[2] == 0;
    }
    bool scan(const uint8_t* from, const uint8_t* end) const {
        int widest = 1, tallest = 1;
        for (int c = 0; count == 3 && c < 3; c++) {
            widest = components[c].across > widest ? components[c].across : widest;
            tallest = components[c].down > tallest ? components[c].down : tallest;
        }
        int64_t units = (int64_t)((width + 8 * widest - 1) / (8 * widest)) * ((height + 8 * tallest - 1) / (8 * tallest));
        static thread_local std::vector<uint8_t> bytes;
        Bits bits(bytes);
        const uint8_t* marker = bits.open(from, end);
        auto ends_with = [&](uint8_t code) {  // only the padding of its last byte may be left of an interval
            return bits.left() < 8 && end - marker >= 2 && marker[0] == 0xff && marker[1] == code;
        };
        int restarts = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            if (interval && unit && unit % interval == 0) {
                if (!ends_with(0xd0 + restarts++ % 8)) return false;
                marker = bits.open(marker + 2, end);
            }
            for (int c = 0; c < count; c++) {
                int blocks = count == 1 ? 1 : components[c].across * components[c].down;
                for (int b = 0; b < blocks; b++)
                    if (!read_block(bits, *components[c].dc, *components[c].ac)) return false;
            }
        }
        return ends_with(0xd9);
    }
};

}  // namespace

bool is_whole_baseline_jpeg(const uint8_t* data, size_t size) {
    if (size < 4 || data[0] != 0xff || data[1] != 0xd8) return false;
    static thread_local Frame frame;
    frame.reset();
    for (size_t at = 2; at + 4 <= size;) {
        if (data[at] != 0xff) return false;
        size_t length = (size_t)data[at + 2] << 8 | data[at + 3];
        if (length < 2 || at + 2 + length > size) return false;
        const uint8_t* body = data + at + 4;
        size_t rest = length - 2;
        uint8_t marker = data[at + 1];
        at += 2 + length;
        if (marker == 0xda) return frame.scan_header(body, rest) && frame.scan(data + at, data + size);
        bool fine = marker >= 0xe0 || marker == 0xfe;  // what applications have to say
        if (marker == 0xc4) fine = frame.tables(body, rest);
        if (marker == 0xdb) fine = frame.quantisation(body, rest);
        if (marker == 0xc0) fine = frame.start(body, rest);
        if (marker == 0xdd) {
            fine = rest == 2;
            frame.interval = fine ? body[0] << 8 | body[1] : 0;
        }
        if (!fine) return false;
    }
    return false;
}
