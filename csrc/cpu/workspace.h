// Memory for one call, aligned to cache lines and not initialised.
#pragma once

#include <cstdint>

namespace liar {

/// A thread keeps a few blocks that it has used: fresh memory costs a page fault per 4 KiB, which
/// for small products is as much time as the work itself.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(Workspace&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  Workspace& operator=(Workspace&&) = delete;

  char* data() const { return data_; }
  double* doubles() const { return reinterpret_cast<double*>(data_); }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace liar
