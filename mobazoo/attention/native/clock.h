// Where the time of a pass goes, for those who ask.

#pragma once

#include <chrono>

namespace moba {

enum Stage { OWN, SORT, LAY, GATHER, KERNEL, MERGE, REST, STAGES };

// Adds the seconds between two calls of `to` to the first one's stage; without a place for them it does nothing.
class Clock {
 public:
  explicit Clock(double* spent) : spent_(spent) {}

  // From here on a stage's time is its own, or all stages' is one.
  void only(Stage stage) { only_ = stage; }

  void to(Stage stage) {
    if (spent_ == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    if (running_) spent_[stage_] += std::chrono::duration<double>(now - since_).count();
    stage_ = only_ == STAGES ? stage : only_;
    since_ = now;
    running_ = true;
  }

 private:
  double* const spent_;
  std::chrono::steady_clock::time_point since_;
  Stage stage_ = REST, only_ = STAGES;
  bool running_ = false;
};

}  // namespace moba
