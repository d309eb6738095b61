#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace liar {
namespace {

constexpr int64_t kLine = 64, kHugePage = 2 << 20;

struct Block {
  char* data = nullptr;
  int64_t bytes = 0;
};

struct NoMemory : std::bad_alloc {
  const char* what() const noexcept override {
    return "liar_ext: out of memory for the workspace of an operator; free some, or use fewer "
           "threads (torch.set_num_threads)";
  }
};

void release(void* data) {
#ifdef _WIN32
  _aligned_free(data);
#else
  std::free(data);
#endif
}

Block allocate(int64_t bytes) {
  const int64_t unit = bytes >= 2 * kHugePage ? kHugePage : kLine;
  const int64_t rounded = (bytes + unit - 1) / unit * unit;
#ifdef _WIN32
  void* data = _aligned_malloc(static_cast<size_t>(rounded), static_cast<size_t>(unit));
#else
  void* data = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded));
#endif
  if (data == nullptr) throw NoMemory();
#ifdef __linux__
  if (unit == kHugePage) madvise(data, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
  return {static_cast<char*>(data), rounded};
}

/// The blocks that nobody uses. A thread that would have to wait for another does without: then a
/// process that forks while a lock is held can't hang its child either.
class Shelf {
 public:
  /// The smallest block that is large enough, or none.
  Block take(int64_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    Block* best = nullptr;
    if (!lock) return {};
    for (Block& block : blocks_) {
      if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
    }
    if (best == nullptr) return {};
    bytes_ -= best->bytes;
    return std::exchange(*best, Block{});
  }

  /// Keeps the block, or in its place a smaller one goes back to the system.
  void put(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock && bytes_ + block.bytes <= kShelfBytes) {
      Block* least = &blocks_[0];
      for (Block& place : blocks_) {
        if (place.bytes < least->bytes) least = &place;
      }
      if (least->bytes < block.bytes) {
        bytes_ += block.bytes - least->bytes;
        std::swap(*least, block);
      }
    }
    release(block.data);
  }

  /// Gives the largest blocks back to the system until `most` bytes are left.
  void trim(int64_t most) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    while (lock && bytes_ > most) {
      Block* largest = &blocks_[0];
      for (Block& block : blocks_) {
        if (block.bytes > largest->bytes) largest = &block;
      }
      bytes_ -= largest->bytes;
      release(std::exchange(*largest, Block{}).data);
    }
  }

  int64_t bytes() {
    const std::unique_lock<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  std::mutex mutex_;
  Block blocks_[64];
  int64_t bytes_ = 0;
};

/// Never destroyed: threads may outlive what the end of the process destroys.
Shelf& shelf() {
  static Shelf& shared = *new Shelf;
  return shared;
}

}  // namespace

Workspace::Workspace(int64_t bytes) {
  if (bytes <= 0) return;
  Block found = shelf().take(bytes);
  if (found.data == nullptr) found = allocate(bytes);
  data_ = found.data;
  bytes_ = found.bytes;
}

Workspace::~Workspace() {
  if (data_ != nullptr) shelf().put({data_, bytes_});
}

WorkspaceCall::~WorkspaceCall() { shelf().trim(kIdleBytes); }

int64_t shelf_bytes() { return shelf().bytes(); }

}  // namespace liar
