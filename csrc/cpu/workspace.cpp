#include "workspace.h"

#include <cstdlib>
#include <new>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace liar {
namespace {

constexpr int64_t kLine = 64, kHugePage = 2 << 20;
constexpr int64_t kKeptBytes = 128 << 20;  // of all blocks; what is more goes back to the system

struct Block {
  char* data = nullptr;
  int64_t bytes = 0;
};

/// The blocks that a thread keeps.
struct Shelf {
  Block blocks[12];
  int64_t bytes() const {
    int64_t sum = 0;
    for (const Block& block : blocks) sum += block.bytes;
    return sum;
  }
  ~Shelf() {
    for (Block& block : blocks) std::free(block.data);
  }
};

thread_local Shelf shelf;

Block allocate(int64_t bytes) {
  const int64_t unit = bytes >= 2 * kHugePage ? kHugePage : kLine;
  const int64_t rounded = (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded));
  if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (unit == kHugePage) madvise(data, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
  return {static_cast<char*>(data), rounded};
}

}  // namespace

Workspace::Workspace(int64_t bytes) {
  if (bytes <= 0) return;
  Block* best = nullptr;  // the smallest that is large enough
  for (Block& block : shelf.blocks) {
    if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
  }
  Block found = best != nullptr ? std::exchange(*best, Block{}) : allocate(bytes);
  data_ = found.data;
  bytes_ = found.bytes;
}

Workspace::~Workspace() {
  Block block{data_, bytes_};
  if (shelf.bytes() + bytes_ <= kKeptBytes) {
    for (Block& place : shelf.blocks) {  // the largest stay
      if (place.bytes < block.bytes) std::swap(place, block);
    }
  }
  std::free(block.data);
}

}  // namespace liar
