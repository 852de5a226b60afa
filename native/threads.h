// A pool of threads that runs numbered tasks. Workers spin briefly for the next job, then sleep.
//
// A job is finished when all its tasks are, not when all workers have looked at it: a worker that the operating system
// has taken off its core delays nothing unless it holds a task. Every thread starts with a run of neighbouring tasks,
// so that it reads memory in order; one that is done takes from the others, so that a slow core does less. A worker
// that keeps jobs waiting for much longer than a task takes, and for a large part of the time, has lost its core to
// another process: it is left out for a while, since it would come back only after a time slice, as long as a whole
// token. In a forked child, where the workers do not exist, the caller runs every task itself.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace minicpm {

class ThreadPool {
  public:
    // How long a worker is left out: doubled when it stalls again soon after it came back.
    static constexpr std::chrono::milliseconds kFirstPause{16}, kLongestPause{256};

    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const { return num_threads_; }
    // Workers that get no tasks for now. A job that begins while none is left out may count on all of them.
    int num_left_out() const { return num_left_out_.load(std::memory_order_relaxed); }

    // Calls task(i) for i in [0, count), in any order, on any of the threads; returns when all have returned.
    // One caller at a time. Tasks must not throw.
    template <class Task>
    void run(int count, const Task& task) {
        if (count <= 0) return;
        if (count == 1 || num_threads_ == 1) {
            for (int i = 0; i < count; ++i) task(i);
            return;
        }
        run_job(count, [](const void* context, int i) { (*static_cast<const Task*>(context))(i); }, &task);
    }

  private:
    using Call = void (*)(const void*, int);

    // One thread's share of a job as a word: job number (16 bits), tasks (24), tasks claimed (24). One fetch_add claims
    // a task; the fields of the job it belongs to cannot change before that task is done.
    struct alignas(64) Share {
        std::atomic<uint64_t> word{0};
    };
    using Clock = std::chrono::steady_clock;
    struct alignas(64) Worker {
        std::atomic<bool> is_running{false};   // holds a task
        std::atomic<bool> is_left_out{false};  // claims none, and sleeps
        // For the caller of `run` only.
        Clock::time_point back_at{};
        Clock::duration pause{};
        Clock::time_point charged_at{};
        Clock::duration owed{};  // at `charged_at`
    };
    static constexpr uint64_t share_word(uint64_t job, uint64_t count) { return job << 48 | count << 24; }
    static bool is_claimed(uint64_t word) { return (word & 0xFFFFFF) >= (word >> 24 & 0xFFFFFF); }

    void run_job(int count, Call call, const void* context);
    void run_slice(int count, Call call, const void* context);
    int first_task(int share) const { return static_cast<int>(int64_t{count_} * share / num_threads()); }
    // Runs tasks of this thread's share, then of the others', and returns how many.
    uint32_t run_tasks(int own_share);
    void wait_for(uint32_t others, Clock::time_point started, uint32_t finished);
    // Adds the wait from `due` on to what the workers that hold tasks owe, and leaves out those that owe too much.
    void charge_running(Clock::time_point due, Clock::time_point now);
    void leave_out(Worker& worker, Clock::time_point now);
    void take_back(Clock::time_point now);
    static void call_back(Worker& worker);
    bool has_work() const;
    void work(int own_share);

    const int num_threads_;
    const std::unique_ptr<Share[]> shares_;     // one per thread
    const std::unique_ptr<Worker[]> progress_;  // one per thread; the caller's is not used
    std::atomic<int> num_left_out_{0};          // written by the caller of `run` only
    const pid_t owner_ = getpid();
    Call call_ = nullptr;
    const void* context_ = nullptr;
    int count_ = 0;
    uint64_t job_ = 0;
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;  // last, so that they start when all else is there
};

}  // namespace minicpm
