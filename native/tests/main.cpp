// Runs the native tests: `native_tests [--quick] [PREFIX …]`, all of them without a prefix. `native_tests --fault NAME`
// does wrong on purpose.
#include <chrono>
#include <cstdio>

#include "check.h"
#include "kernels/kernel.h"

namespace minicpm::tests {

namespace {
bool quick = false;
}

bool is_quick() { return quick; }

std::vector<Test>& tests() {
    static std::vector<Test> list;
    return list;
}

std::vector<Test>& faults() {
    static std::vector<Test> list;
    return list;
}

namespace {

bool is_wanted(const Test& test, int count, char** prefixes) {
    bool has_prefix = false;
    for (int i = 1; i < count; ++i) {
        const std::string prefix = prefixes[i];
        if (prefix == "--quick") continue;
        if (std::string(test.name).starts_with(prefix)) return true;
        has_prefix = true;
    }
    return !has_prefix;
}

bool passes(const Test& test) {
    const auto start = std::chrono::steady_clock::now();
    std::string failure;
    try {
        test.run();
    } catch (const std::exception& error) {
        failure = error.what();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s %.2f s%s%s\n", failure.empty() ? "passed" : "FAILED", test.name, seconds.count(),
                failure.empty() ? "" : ": ", failure.c_str());
    std::fflush(stdout);
    return failure.empty();
}

int run_fault(const std::string& name) {
    for (const Test& fault : faults()) {
        if (name != fault.name) continue;
        fault.run();
        std::printf("%s went unnoticed\n", fault.name);
        return 0;
    }
    std::printf("there is no fault called %s\n", name.c_str());
    return 2;
}

int run(int count, char** arguments) {
    if (count == 3 && std::string(arguments[1]) == "--fault") return run_fault(arguments[2]);
    for (int i = 1; i < count; ++i) quick = quick || std::string(arguments[i]) == "--quick";
    std::printf("kernels:");
    for (const Kernels* const* k = available_kernels(); *k; ++k) std::printf(" %s", (*k)->name);
    std::printf("\n");
    int num_run = 0, num_failed = 0;
    for (const Test& test : tests()) {
        if (!is_wanted(test, count, arguments)) continue;
        ++num_run;
        num_failed += !passes(test);
    }
    std::printf("%d run, %d failed\n", num_run, num_failed);
    return num_run == 0 || num_failed > 0;
}

}  // namespace

}  // namespace minicpm::tests

int main(int count, char** arguments) { return minicpm::tests::run(count, arguments); }
