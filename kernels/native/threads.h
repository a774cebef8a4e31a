// Threads of one call: a pool would not survive a fork, and these take microseconds to start.
#pragma once
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// Calls `work` on `count` threads at a time, this one among them. Returns 0, or 1 if one found no memory.
template <typename Work> static int on_threads(long count, const Work &work) {
    std::atomic<int> failed{0};
    const auto guarded = [&] {
        try {
            work();
        } catch (const std::bad_alloc &) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    try {
        others.reserve(count);
        for (long i = 1; i < count; i++) others.emplace_back(guarded);
    } catch (const std::system_error &) {
        // The limit of the user's processes: those that there are do the work.
    } catch (const std::bad_alloc &) {
        // Likewise.
    }
    guarded();
    for (std::thread &other : others) other.join();
    return failed;
}
