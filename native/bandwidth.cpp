#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <initializer_list>

#include "memory.h"
#include "threads.h"

namespace minicpm {

namespace {

// A task's part: small enough that all threads end at the same time.
constexpr size_t kPiece = size_t{4} << 20;
constexpr size_t kAhead = 2048;

// Two streams keep more lines on their way than one; four and more gain nothing.
uint64_t sum_piece(const uint8_t* piece) {
    constexpr size_t kHalf = kPiece / 2;
    uint64_t sums[8] = {};
    for (size_t at = 0; at < kHalf; at += 64) {
        for (const uint8_t* line : {piece + at, piece + kHalf + at}) {
            __builtin_prefetch(line + kAhead);
            uint64_t words[8];
            std::memcpy(words, line, 64);
            for (int i = 0; i < 8; ++i) sums[i] += words[i];
        }
    }
    uint64_t total = 0;
    for (const uint64_t sum : sums) total += sum;
    return total;
}

}  // namespace

double read_bandwidth(size_t bytes, int num_threads, int rounds) {
    const Region region(round_up(bytes, kPiece));
    ThreadPool pool(num_threads);
    const int pieces = static_cast<int>(region.bytes() / kPiece);
    pool.run(pieces, [&](int i) { std::memset(region.data() + i * kPiece, i + 1, kPiece); });
    std::atomic<uint64_t> sink{0};
    double best = 0.0;
    for (int round = 0; round < rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        pool.run(pieces, [&](int i) { sink.fetch_add(sum_piece(region.data() + i * kPiece)); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, static_cast<double>(region.bytes()) / seconds.count());
    }
    return best;
}

}  // namespace minicpm
