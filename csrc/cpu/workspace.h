// Memory for one call, aligned to cache lines and not initialised.
#pragma once

#include <cstdint>
#include <utility>

namespace liar {

/// Blocks go to a shelf that all threads share and come from there again: fresh memory costs a page
/// fault per 4 KiB, which for small products is as much time as the work itself. Throws
/// std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t bytes = 0);
  ~Workspace();
  Workspace(Workspace&& other) noexcept { swap(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    swap(other);
    return *this;
  }

  static Workspace of_doubles(int64_t count) {
    return Workspace(count * static_cast<int64_t>(sizeof(double)));
  }

  char* data() const { return data_; }
  double* doubles() const { return reinterpret_cast<double*>(data_); }
  bool empty() const { return data_ == nullptr; }

 private:
  void swap(Workspace& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

constexpr int64_t kShelfBytes = 256 << 20;  // while a call runs
constexpr int64_t kIdleBytes = 32 << 20;    // between calls: what many small ones use again

/// Lives as long as a call of an operator, after which the shelf keeps kIdleBytes at most.
class WorkspaceCall {
 public:
  WorkspaceCall() = default;
  WorkspaceCall(const WorkspaceCall&) = delete;
  WorkspaceCall& operator=(const WorkspaceCall&) = delete;
  ~WorkspaceCall();
};

/// Bytes on the shelf now.
int64_t shelf_bytes();

}  // namespace liar
