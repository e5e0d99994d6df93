// Reads a baseline JPEG to its end without making pixels of it, which is faster than the fastest decoding.
#pragma once

#include <cstddef>
#include <cstdint>

// Whether the JPEG is baseline, in one scan, and whole: every code is valid, every block of every row is there, and
// nothing is left over before the end marker. False also for all that it does not know.
bool is_whole_baseline_jpeg(const uint8_t* data, size_t size);
