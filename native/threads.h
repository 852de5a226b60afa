// A pool of threads that runs numbered tasks. Workers spin briefly for the next job, then sleep.
//
// A job is finished when all its tasks are, not when all workers have looked at it: a worker that the operating system
// has taken off its core delays nothing unless it holds a task. Tasks are claimed one by one from an atomic counter, so
// that a slow core takes fewer. In a forked child, where the workers do not exist, the caller runs every task itself.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace minicpm {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls task(i) for i in [0, count), in any order, on any of the threads; returns when all have returned.
    // One caller at a time. Tasks must not throw.
    template <class Task>
    void run(int count, const Task& task) {
        if (count <= 0) return;
        if (count == 1 || workers_.empty()) {
            for (int i = 0; i < count; ++i) task(i);
            return;
        }
        run_job(count, [](const void* context, int i) { (*static_cast<const Task*>(context))(i); }, &task);
    }

  private:
    using Call = void (*)(const void*, int);

    // The ticket word: job number (16 bits), tasks of the job (24), tasks claimed (24). One fetch_add claims a task and
    // tells which job it belongs to; the job's fields cannot change before that task is done.
    static constexpr uint64_t ticket(uint64_t job, uint64_t count) { return job << 48 | count << 24; }
    static uint32_t count_of(uint64_t word) { return word >> 24 & 0xFFFFFF; }
    static uint32_t claimed_of(uint64_t word) { return word & 0xFFFFFF; }

    void run_job(int count, Call call, const void* context);
    void run_slice(int count, Call call, const void* context);
    bool claim(uint32_t& index);
    void work();

    std::vector<std::thread> workers_;
    pid_t owner_ = getpid();
    Call call_ = nullptr;
    const void* context_ = nullptr;
    uint64_t job_ = 0;
    alignas(64) std::atomic<uint64_t> tickets_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace minicpm
