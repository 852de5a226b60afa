// The thread pool: every task once, whatever the number of threads and however long they slept.
#include "threads.h"

#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "bandwidth.h"
#include "check.h"
#include "memory.h"

namespace minicpm::tests {

namespace {

// Plain integers, written by whoever gets the task and read by the caller: ThreadSanitizer sees whether the pool orders
// the one before the other.
void check_job(ThreadPool& pool, int count, std::vector<int>& times, int round) {
    times.assign(count, round);
    pool.run(count, [&](int i) { times[i] += i + 1; });
    for (int i = 0; i < count; ++i) CHECK(times[i] == round + i + 1, "task " + std::to_string(i));
}

}  // namespace

TEST(pool_runs_every_task_once) {
    for (const int num_threads : {1, 2, 3, 8}) {
        ThreadPool pool(num_threads);
        CHECK(pool.num_threads() == num_threads, "");
        std::vector<int> times;
        const int rounds = is_quick() ? 200 : 2000;
        for (int round = 0; round < rounds; ++round) check_job(pool, round % 67, times, round);
        check_job(pool, 5000, times, 1);
    }
}

TEST(pool_wakes_sleepers) {
    ThreadPool pool(3);
    std::vector<int> times;
    for (int round = 0; round < 20; ++round) {
        // Around the time that a worker spins, so that some rounds meet it awake, some asleep and some in between.
        std::this_thread::sleep_for(std::chrono::microseconds(850 + 20 * round));
        check_job(pool, 40, times, round);
    }
}

namespace {

// Runs small jobs until every worker takes part again: on a machine with other work, some may have been left out.
void gather(ThreadPool& pool) {
    while (pool.num_left_out() > 0) pool.run(pool.num_threads(), [](int) {});
}

// Every thread in a task of its own at the same time. Returns only when all have come.
void meet(ThreadPool& pool, int round) {
    gather(pool);
    const int count = pool.num_threads();
    // Relaxed, so that nothing but the pool orders the workers' writes before the caller's reads.
    std::atomic<int> num_arrived{0};
    std::vector<int> arrived(count);
    pool.run(count, [&](int i) {
        num_arrived.fetch_add(1, std::memory_order_relaxed);
        while (num_arrived.load(std::memory_order_relaxed) < count) std::this_thread::yield();
        arrived[i] = round + 1;
    });
    for (const int value : arrived) CHECK(value == round + 1, "round " + std::to_string(round));
}

// Runs jobs in which a worker's task ends only when the pool has given that worker up, until that has happened: the
// caller may be quick enough to take all tasks itself.
void stall(ThreadPool& pool) {
    const std::thread::id caller = std::this_thread::get_id();
    while (pool.num_left_out() == 0) {
        std::vector<int> times(8);
        pool.run(8, [&](int i) {
            ++times[i];
            while (std::this_thread::get_id() != caller && pool.num_left_out() == 0) std::this_thread::yield();
        });
        for (const int value : times) CHECK(value == 1, "");
    }
}

}  // namespace

// If a worker does not come, this test does not end.
TEST(pool_runs_tasks_at_the_same_time) {
    ThreadPool pool(3);
    for (int round = 0; round < 10; ++round) {
        if (round % 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // until the workers sleep
        meet(pool, round);
    }
}

TEST(pool_leaves_out_workers_that_keep_it_waiting_and_takes_them_back) {
    using Clock = std::chrono::steady_clock;
    for (int round = 0; round < 5; ++round) {
        ThreadPool pool(3);
        meet(pool, round);
        const Clock::time_point start = Clock::now();
        stall(pool);
        const int num_left = pool.num_threads() - pool.num_left_out();
        std::vector<std::thread::id> ran(16);
        pool.run(16, [&](int i) { ran[i] = std::this_thread::get_id(); });
        std::sort(ran.begin(), ran.end());
        const auto num_ran = std::unique(ran.begin(), ran.end()) - ran.begin();
        // Where all of this took longer than a pause, they may have come back.
        const bool is_in_pause = Clock::now() - start < ThreadPool::kFirstPause;
        CHECK(!is_in_pause || num_ran <= num_left, std::to_string(num_ran) + " threads ran tasks");
        meet(pool, round);
    }
}

TEST(pool_ends_while_workers_are_left_out) {
    for (int round = 0; round < 5; ++round) {
        ThreadPool pool(3);
        stall(pool);
        if (round % 2) std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
}

TEST(pool_orders_one_job_after_another) {
    ThreadPool pool(4);
    std::vector<int> values(64);
    const int rounds = is_quick() ? 300 : 3000;
    // Each task reads what another task wrote in the job before.
    for (int round = 0; round < rounds; ++round) {
        std::vector<int> next(64);
        pool.run(64, [&](int i) { next[i] = values[(i + 17) % 64] + 1; });
        values = next;
    }
    for (const int value : values) CHECK(value == rounds, std::to_string(value));
}

TEST(pool_takes_more_tasks_than_its_ticket_counts) {
    if (is_quick()) return;
    ThreadPool pool(2);
    const int count = (1 << 22) + 1234;
    std::vector<uint8_t> times(count);
    pool.run(count, [&](int i) { ++times[i]; });
    for (int i = 0; i < count; ++i) CHECK(times[i] == 1, "task " + std::to_string(i));
}

TEST(pool_ends_at_any_moment) {
    for (int round = 0; round < (is_quick() ? 20 : 100); ++round) {
        ThreadPool pool(4);
        std::vector<int> times;
        if (round % 2) check_job(pool, round, times, round);
        if (round % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(1500));
    }
}

// ThreadSanitizer gives up in a process that forks with threads.
#ifndef __SANITIZE_THREAD__
TEST(pool_works_in_a_forked_child) {
    ThreadPool pool(3);
    std::vector<int> times;
    check_job(pool, 10, times, 0);
    const pid_t child = fork();
    CHECK(child >= 0, "no fork");
    if (child == 0) {
        // The workers do not exist here; the caller is left with every task.
        std::vector<int> own(100);
        pool.run(100, [&](int i) { own[i] = i; });
        int sum = 0;
        for (const int value : own) sum += value;
        _exit(sum == 4950 ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with " + std::to_string(status));
    check_job(pool, 10, times, 1);
}
#endif

TEST(memory_is_zeroed_aligned_and_apart) {
    Arena arena;
    std::vector<std::pair<uint8_t*, size_t>> pieces;
    for (const size_t bytes : {size_t{1}, size_t{64}, size_t{100}, size_t{3} << 20, size_t{70} << 20, size_t{5}}) {
        uint8_t* piece = arena.take(bytes);
        CHECK(reinterpret_cast<uintptr_t>(piece) % 64 == 0, std::to_string(bytes));
        for (size_t i = 0; i < bytes; i += 4096) CHECK(piece[i] == 0, std::to_string(bytes));
        std::memset(piece, 1 + static_cast<int>(pieces.size()), bytes);
        pieces.emplace_back(piece, bytes);
    }
    for (size_t n = 0; n < pieces.size(); ++n) {
        const auto [piece, bytes] = pieces[n];
        CHECK(piece[0] == n + 1 && piece[bytes - 1] == n + 1, std::to_string(bytes));
    }
    Buffer<float> buffer;
    for (const size_t count : {size_t{1}, size_t{5000}, size_t{1000}, size_t{2} << 20}) {
        float* data = buffer.reserve(count);
        data[0] = data[count - 1] = 1.0f;
        CHECK(buffer.bytes() >= count * sizeof(float), std::to_string(count));
    }
}

TEST(bandwidth_is_measured) {
    for (const int num_threads : {1, 2, 3}) {
        CHECK(read_bandwidth(size_t{1} << 20, num_threads, 2) > 0.0, std::to_string(num_threads));
    }
}

}  // namespace minicpm::tests
