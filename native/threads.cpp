#include "threads.h"

#include <chrono>

namespace minicpm {

namespace {

// Longer than the time between two steps of a generation, so that workers stay awake through one; short beside a
// scheduler's time slice, so that an idle engine costs nothing.
constexpr std::chrono::microseconds kSpin{1000};
constexpr int kPollsPerClock = 64;
constexpr int kPollsBeforeYield = 4096;
constexpr int kMaxTasks = 1 << 22;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
    if (getpid() != owner_) {
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    stop_.store(true);
    wake_.fetch_add(1);
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::claim(uint32_t& index) {
    const uint64_t seen = tickets_.load(std::memory_order_acquire);
    if (claimed_of(seen) >= count_of(seen)) return false;
    const uint64_t word = tickets_.fetch_add(1, std::memory_order_acq_rel);
    index = claimed_of(word);
    return index < count_of(word);
}

void ThreadPool::run_job(int count, Call call, const void* context) {
    // A job's number of tasks and its overshoot have to fit the ticket word.
    for (; count > kMaxTasks; count -= kMaxTasks) {
        struct Shifted {
            Call call;
            const void* context;
            int offset;
        } shifted{call, context, count - kMaxTasks};
        run_slice(
            kMaxTasks,
            [](const void* c, int i) {
                const auto* s = static_cast<const Shifted*>(c);
                s->call(s->context, s->offset + i);
            },
            &shifted);
    }
    run_slice(count, call, context);
}

void ThreadPool::run_slice(int count, Call call, const void* context) {
    call_ = call;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    // seq_cst here and at the sleepers' counter: either this thread sees a sleeper or the sleeper sees the job.
    tickets_.store(ticket(++job_ & 0xFFFF, static_cast<uint64_t>(count)));
    if (sleepers_.load() > 0) {
        wake_.fetch_add(1);
        wake_.notify_all();
    }
    uint32_t index = 0;
    uint32_t finished = 0;
    while (claim(index)) {
        call(context, static_cast<int>(index));
        ++finished;
    }
    done_.fetch_add(finished, std::memory_order_acq_rel);
    for (int polls = 0; done_.load(std::memory_order_acquire) != static_cast<uint32_t>(count); ++polls) {
        if (polls < kPollsBeforeYield) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

void ThreadPool::work() {
    using Clock = std::chrono::steady_clock;
    while (!stop_.load(std::memory_order_relaxed)) {
        const Clock::time_point start = Clock::now();
        uint32_t index = 0;
        bool found = false;
        for (int polls = 1; !found; ++polls) {
            found = claim(index);
            if (found) break;
            relax();
            if (polls % kPollsPerClock == 0 && Clock::now() - start > kSpin) break;
        }
        if (found) {
            call_(context_, static_cast<int>(index));
            done_.fetch_add(1, std::memory_order_acq_rel);
            continue;
        }
        const uint32_t wake = wake_.load();
        sleepers_.fetch_add(1);
        const uint64_t seen = tickets_.load();
        if (claimed_of(seen) >= count_of(seen) && !stop_.load()) wake_.wait(wake);
        sleepers_.fetch_sub(1);
    }
}

}  // namespace minicpm
