// Memory for one call, aligned to cache lines and not initialised.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace liar {

class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= 0) return;
    const auto rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    data_ = static_cast<char*>(std::aligned_alloc(64, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

}  // namespace liar
