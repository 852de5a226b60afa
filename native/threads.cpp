#include "threads.h"

#include <algorithm>

namespace minicpm {

namespace {

// Longer than the time between two steps of a generation, so that workers stay awake through one; short beside a
// scheduler's time slice, so that an idle engine costs nothing.
constexpr std::chrono::microseconds kSpin{1000};
constexpr int kPollsPerClock = 64;
constexpr int kPollsBeforeYield = 4096;
constexpr int kMaxTasks = 1 << 22;

// A wait of this much beyond two tasks' time is no unevenness of work.
constexpr std::chrono::microseconds kStall{200};
// What a worker may owe. A wait for it counts this many times; the time that passes between waits is taken off. So
// a worker is left out when it costs more than a third of the time, and not when others need its core now and then.
constexpr std::chrono::milliseconds kMostOwed{8};
constexpr int kWaitWeight = 2;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), shares_(new Share[num_threads]), progress_(new Worker[num_threads]) {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
    if (getpid() != owner_) {
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    stop_.store(true);
    wake_.fetch_add(1);
    wake_.notify_all();
    for (int i = 1; i < num_threads_; ++i) call_back(progress_[i]);
    for (std::thread& worker : workers_) worker.join();
}

uint32_t ThreadPool::run_tasks(int own_share) {
    uint32_t finished = 0;
    for (int i = 0; i < num_threads_; ++i) {
        const int share = (own_share + i) % num_threads_;
        std::atomic<uint64_t>& word = shares_[share].word;
        // Looking first keeps a spinning thread from writing.
        while (!is_claimed(word.load(std::memory_order_acquire))) {
            const uint64_t claim = word.fetch_add(1, std::memory_order_acq_rel);
            if (is_claimed(claim)) break;
            if (!finished) progress_[own_share].is_running.store(true, std::memory_order_relaxed);
            call_(context_, first_task(share) + static_cast<int>(claim & 0xFFFFFF));
            ++finished;
            // Whoever was left out may come back in the midst of a long job.
            if (own_share == 0 && num_left_out()) take_back(Clock::now());
        }
    }
    return finished;
}

void ThreadPool::wait_for(uint32_t others, Clock::time_point started, uint32_t finished) {
    Clock::time_point due{};
    for (int polls = 1; done_.load(std::memory_order_acquire) != others; ++polls) {
        if (polls < kPollsBeforeYield) {
            relax();
        } else {
            std::this_thread::yield();
        }
        if (polls % kPollsPerClock) continue;
        const Clock::time_point now = Clock::now();
        if (due == Clock::time_point{}) {
            due = now + kStall + 2 * (now - started) / (finished ? finished : 1);
        } else if (now > due) {
            charge_running(due, now);
        }
    }
}

void ThreadPool::charge_running(Clock::time_point due, Clock::time_point now) {
    for (int i = 1; i < num_threads_; ++i) {
        Worker& worker = progress_[i];
        if (!worker.is_running.load(std::memory_order_relaxed) || worker.is_left_out.load(std::memory_order_relaxed))
            continue;
        if (worker.charged_at < due) {
            worker.owed = std::max(worker.owed - (due - worker.charged_at), Clock::duration::zero());
            worker.charged_at = due;
        }
        worker.owed += kWaitWeight * (now - worker.charged_at);
        worker.charged_at = now;
        if (worker.owed >= kMostOwed) leave_out(worker, now);
    }
}

void ThreadPool::leave_out(Worker& worker, Clock::time_point now) {
    const bool is_relapse = now < worker.back_at + 2 * worker.pause;
    worker.pause = is_relapse ? std::min<Clock::duration>(2 * worker.pause, kLongestPause) : kFirstPause;
    worker.back_at = now + worker.pause;
    // Once back, it is on probation.
    worker.owed = kMostOwed / 2;
    worker.charged_at = worker.back_at;
    worker.is_left_out.store(true, std::memory_order_relaxed);
    num_left_out_.fetch_add(1, std::memory_order_relaxed);
}

void ThreadPool::take_back(Clock::time_point now) {
    for (int i = 1; i < num_threads_; ++i) {
        Worker& worker = progress_[i];
        if (!worker.is_left_out.load(std::memory_order_relaxed) || now < worker.back_at) continue;
        call_back(worker);
        num_left_out_.fetch_sub(1, std::memory_order_relaxed);
    }
}

void ThreadPool::call_back(Worker& worker) {
    worker.is_left_out.store(false, std::memory_order_relaxed);
    worker.is_left_out.notify_one();
}

bool ThreadPool::has_work() const {
    for (int i = 0; i < num_threads_; ++i) {
        if (!is_claimed(shares_[i].word.load())) return true;
    }
    return false;
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
    const Clock::time_point started = Clock::now();
    if (num_left_out()) take_back(started);
    call_ = call;
    context_ = context;
    count_ = count;
    done_.store(0, std::memory_order_relaxed);
    ++job_;
    // seq_cst here and at the sleepers' counter: either this thread sees a sleeper or the sleeper sees the job.
    for (int i = num_threads_ - 1; i >= 0; --i) {
        shares_[i].word.store(share_word(job_ & 0xFFFF, static_cast<uint64_t>(first_task(i + 1) - first_task(i))));
    }
    if (sleepers_.load() > 0) {
        wake_.fetch_add(1);
        wake_.notify_all();
    }
    const uint32_t finished = run_tasks(0);
    wait_for(static_cast<uint32_t>(count) - finished, started, finished);
}

void ThreadPool::work(int own_share) {
    Worker& self = progress_[own_share];
    Clock::time_point last = Clock::now();
    for (int polls = 1; !stop_.load(std::memory_order_relaxed); ++polls) {
        // To wait for what has come already is no plain load: it counts the waiters first.
        if (self.is_left_out.load(std::memory_order_relaxed)) self.is_left_out.wait(true, std::memory_order_relaxed);
        if (const uint32_t finished = run_tasks(own_share)) {
            self.is_running.store(false, std::memory_order_relaxed);
            done_.fetch_add(finished, std::memory_order_release);
            polls = -kPollsPerClock;
            continue;
        }
        relax();
        if (polls == 0) last = Clock::now();
        if (polls <= 0 || polls % kPollsPerClock || Clock::now() - last < kSpin) continue;
        const uint32_t wake = wake_.load();
        sleepers_.fetch_add(1);
        if (!has_work() && !stop_.load()) wake_.wait(wake);
        sleepers_.fetch_sub(1);
        polls = 0;
        last = Clock::now();
    }
}

}  // namespace minicpm
