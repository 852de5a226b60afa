// How fast this machine reads memory: the bound of decoding.
#pragma once

#include <cstddef>

namespace minicpm {

// Bytes per second of `num_threads` threads that read `bytes` of huge pages `rounds` times; the best round counts.
double read_bandwidth(size_t bytes, int num_threads, int rounds);

}  // namespace minicpm
