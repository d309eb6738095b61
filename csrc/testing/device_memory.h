// The memory of one simulated GPU: pages of the host that are closed unless a kernel or a copy
// runs. Reading or writing them from host code is a segmentation fault. Fresh memory holds NaNs (-1
// as an integer), and what lies past the end of an allocation is looked at when that is released.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

namespace liar::testing {

class DeviceMemory {
 public:
  static constexpr std::size_t kBytes = std::size_t(8) << 30, kAlign = 512, kPage = 4096;

  // Keeps some of the memory open, and other threads out, for its lifetime.
  class Open {
   public:
    Open(DeviceMemory& memory, const void* data, std::size_t bytes) : lock_(memory.mutex_) {
      const auto address = reinterpret_cast<std::uintptr_t>(data), first = address / kPage * kPage;
      pages_ = reinterpret_cast<void*>(first);
      bytes_ = (address + bytes + kPage - 1) / kPage * kPage - first;
      mprotect(pages_, bytes_, PROT_READ | PROT_WRITE);
    }
    explicit Open(DeviceMemory& memory) : Open(memory, memory.base_, memory.used_) {}
    ~Open() { mprotect(pages_, bytes_, PROT_NONE); }

   private:
    std::unique_lock<std::mutex> lock_;
    void* pages_;
    std::size_t bytes_;
  };

  DeviceMemory() {
    void* at = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(at);
  }

  void* allocate(std::size_t bytes) {
    const std::size_t room = (bytes / kAlign + 2) * kAlign;  // a gap of one to two alignments
    unsigned char* at = take(bytes, room);
    const Open open(*this, at, room);
    std::memset(at, 0xff, bytes);
    for (std::size_t i = bytes; i < room; ++i) at[i] = kGap[i % sizeof(kGap)];
    return at;
  }

  void release(void* memory) {
    auto* at = static_cast<unsigned char*>(memory);
    const Extent extent = extent_of(at);
    const Open open(*this, at, extent.room);
    for (std::size_t i = extent.bytes; i < extent.room; ++i) {
      if (at[i] == kGap[i % sizeof(kGap)]) continue;
      std::fprintf(stderr, "simulated GPU: a write past the end of %zu bytes\n", extent.bytes);
      std::abort();
    }
    live_.erase(at);
    free_[extent.room].push_back(at);
  }

 private:
  struct Extent {
    std::size_t bytes, room;
  };

  // Signals as a double, and its first half as a float; no NaN does in both halves as well.
  static constexpr unsigned char kGap[8] = {0xff, 0xff, 0xbf, 0xff, 0xff, 0xff, 0xf7, 0xff};

  unsigned char* take(std::size_t bytes, std::size_t room) {
    const std::lock_guard lock(mutex_);
    auto& free = free_[room];
    unsigned char* at = base_ + used_;
    if (free.empty()) {
      if (used_ + room > kBytes) throw std::runtime_error("simulated GPU: out of memory");
      used_ += room;
    } else {
      at = free.back();
      free.pop_back();
    }
    live_[at] = {bytes, room};
    return at;
  }

  Extent extent_of(unsigned char* at) {
    const std::lock_guard lock(mutex_);
    return live_.at(at);
  }

  std::mutex mutex_;
  unsigned char* base_ = nullptr;
  std::size_t used_ = 0;
  std::map<std::size_t, std::vector<unsigned char*>> free_;
  std::map<unsigned char*, Extent> live_;
};

}  // namespace liar::testing
