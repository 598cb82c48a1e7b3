// Work that torch's own OpenMP threads share: they are awake, and those of another pool would wait for their cores.

#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
// Of the OpenMP that torch has loaded; null where torch is built in another way.
extern "C" void GOMP_parallel(void (*work)(void*), void* given, unsigned threads, unsigned flags) __attribute__((weak));
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

namespace moba {

// Numbers 0 .. count - 1, each handed out once.
class Queue {
 public:
  explicit Queue(int64_t count) : count_(count) {}
  // Whether there was one more.
  bool next(int64_t& number) { return (number = taken_.fetch_add(1)) < count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> taken_{0};
};

// Calls work() on up to so many threads at once, one of them the caller's, and returns when all are done. Raises
// bad_alloc where one of them did.
template <class Work>
void together(int64_t threads, const Work& work) {
  std::atomic<bool> failed{false};
  const auto one = [&] {  // nothing may be thrown through OpenMP, or out of a thread
    try {
      work();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  typedef decltype(one) One;
  if (threads < 2) {
    one();
  } else if (GOMP_parallel != nullptr) {
    GOMP_parallel([](void* given) { (*static_cast<One*>(given))(); }, const_cast<void*>(static_cast<const void*>(&one)),
                  static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; i++) others.emplace_back(one);
    one();
    for (std::thread& each : others) each.join();
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace moba
