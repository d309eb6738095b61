// Cuts one allocation into aligned arrays. With no memory behind it, it only counts: the same code
// that lays a workspace out also says how large it must be.
#pragma once

#include "device.cuh"

namespace liar::cuda {

class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += divide_up(count * static_cast<std::int64_t>(sizeof(T)), kAlign) * kAlign;
    return p;
  }

  std::int64_t bytes() const { return used_; }

 private:
  static constexpr std::int64_t kAlign = 256;  // what device allocators give
  char* base_;
  std::int64_t used_ = 0;
};

}  // namespace liar::cuda
