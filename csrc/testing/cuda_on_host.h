// CUDA's execution model on one OS thread: blocks one after the other, threads as fibers.
//
//   launch ──▶ for each block ──▶ scheduler ──▶ fiber 0 … fiber n-1
//                                    ▲              │ runs until it must wait for others
//                                    └──────────────┘ (barrier, warp collective) or ends
//
// What it shows that a plain loop over threads can't: a missing barrier gives a wrong result under
// one of the orders, and so does a block that counts on another; threads that wait at different
// places, or for ever, are named with file and line. Shared memory lies in an allocation of exactly
// its size, filled with NaNs, so that an overrun or an uninitialised read is seen. What it can't
// show: races between blocks that run at the same time, and anything about time.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace liar::testing {

struct Site {
  const char* file;
  int line;
  bool operator<(const Site& o) const {
    const int order = std::strcmp(file, o.file);
    return order < 0 || (order == 0 && line < o.line);
  }
  bool operator==(const Site& o) const { return line == o.line && !std::strcmp(file, o.file); }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// How the next launches run, and which faults they carry.
struct Settings {
  // 0: blocks and threads in ascending order, 1: descending, more: shuffled with this seed.
  unsigned order = 0;
  // cp.async copies as late as the rules allow (at the wait that needs it), or at once.
  bool late_copies = true;
  // Synchronisation that is left out, by its text() below: a planted fault.
  std::set<std::string> removed;
  // A lane reads its neighbour's accumulator: a planted fault in the fragment layout.
  bool swapped_fragments = false;
  // A shuffle reads the lane after the one it asked for: a planted fault in an index.
  bool shifted_shuffles = false;
  // Every synchronisation site that ran, so that a test can remove each in turn.
  std::set<std::string> seen;
};

inline Settings& settings() {
  static Settings value;
  return value;
}

inline bool removed(const char* what, Site site) {
  const std::string name = std::string(what) + " " + site.text();
  settings().seen.insert(name);
  return settings().removed.count(name) > 0;
}

// Looked up once per site and launch: a set of strings is too slow for every thread's every
// barrier.
class RemovedSites {
 public:
  bool operator()(const char* what, Site site) {
    auto [entry, fresh] = known_.try_emplace({what, site.file, site.line}, false);
    if (fresh) entry->second = removed(what, site);
    return entry->second;
  }
  void forget() { known_.clear(); }

 private:
  struct Key {
    const char* what;
    const char* file;
    int line;
    bool operator<(const Key& o) const {
      return std::tie(what, file, line) < std::tie(o.what, o.file, o.line);
    }
  };
  std::map<Key, bool> known_;
};

// One place where lanes of a warp meet, each with a message of at most kBytes.
struct WarpSlot {
  static constexpr int kBytes = 64;
  struct Group {
    unsigned mask = 0, arrived = 0;
    Site site{"", 0};
  };
  std::array<Group, 8> groups;
  alignas(16) unsigned char in[32][kBytes];
  alignas(16) unsigned char out[32][kBytes];
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  enum { kReady, kWaiting, kDone } state = kReady;
  Site site{"", 0};
  const char* what = "";
  std::vector<std::vector<Copy>> copies{1};  // cp.async groups; the last one is still open
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
    const unsigned count = block.x * block.y * block.z;
    if (count == 0 || count > 1024 || count % 32 != 0)
      throw std::runtime_error("launch: threads per block must be a multiple of 32 up to 1024");
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    threads_.resize(count);
    skip.forget();
    for (unsigned b : shuffled(grid.x * grid.y * grid.z))
      run_block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}, block, shared_bytes);
  }

  void* shared() { return shared_; }
  Thread& thread() { return threads_[running_]; }
  unsigned lane() const { return running_ % 32; }
  WarpSlot& warp() { return warps_[running_ / 32]; }
  RemovedSites skip;

  // Waits until the whole block has arrived.
  void barrier(Site site) {
    if (barrier_arrived_ == 0) barrier_site_ = site;
    if (!(barrier_site_ == site))
      fail("divergent barrier: thread " + name(running_) + " at " + site.text() +
           " while others wait at " + barrier_site_.text());
    if (++barrier_arrived_ == threads_.size()) {
      barrier_arrived_ = 0;
      for (auto& t : threads_)
        if (t.state == Thread::kWaiting && !std::strcmp(t.what, "__syncthreads"))
          t.state = Thread::kReady;
      return;
    }
    wait("__syncthreads", site);
  }

  // Lanes of `mask` meet; the last one computes every lane's answer with `meet(in, out)`.
  template <class In, class Out, class Meet>
  Out collective(const char* what, unsigned mask, Site site, const In& message, Meet meet) {
    static_assert(sizeof(In) <= WarpSlot::kBytes && sizeof(Out) <= WarpSlot::kBytes);
    WarpSlot& slot = warp();
    const unsigned bit = 1u << lane();
    if (!(mask & bit))
      fail(std::string(what) + ": thread " + name(running_) + " is not in its own mask at " +
           site.text());
    WarpSlot::Group* group = nullptr;
    for (auto& g : slot.groups)
      if (g.arrived && (g.mask & mask)) {
        if (g.mask != mask || !(g.site == site))
          fail(std::string("divergent ") + what + ": thread " + name(running_) + " at " +
               site.text() + " while lanes of its warp wait at " + g.site.text());
        group = &g;
      }
    if (!group) {
      for (auto& g : slot.groups)
        if (!g.arrived) group = &g;
      group->mask = mask;
      group->site = site;
    }
    std::memcpy(slot.in[lane()], &message, sizeof(In));
    group->arrived |= bit;
    if (group->arrived == mask) {
      std::array<In, 32> in;
      std::array<Out, 32> out{};
      for (int l = 0; l < 32; ++l) std::memcpy(&in[l], slot.in[l], sizeof(In));
      meet(in, out);
      for (int l = 0; l < 32; ++l)
        if (mask >> l & 1) std::memcpy(slot.out[l], &out[l], sizeof(Out));
      group->arrived = 0;
      const unsigned first = running_ / 32 * 32;
      for (int l = 0; l < 32; ++l)
        if (mask >> l & 1) threads_[first + l].state = Thread::kReady;
    } else {
      wait(what, site);
    }
    Out answer;
    std::memcpy(&answer, slot.out[lane()], sizeof(Out));
    return answer;
  }

  [[noreturn]] void fail(std::string message) {
    error_ = std::move(message);
    thread().state = Thread::kDone;
    thread().fiber.switch_to(scheduler_, true);
    std::abort();
  }

 private:
  // Indices below `count` in the order of the settings.
  static std::vector<unsigned> shuffled(unsigned count) {
    const unsigned seed = settings().order;
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (seed == 1) std::reverse(order.begin(), order.end());
    if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    return order;
  }

  std::string name(unsigned t) const {
    const dim3 i = threads_[t].index;
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  }

  void wait(const char* what, Site site) {
    const unsigned me = running_;
    threads_[me].state = Thread::kWaiting;
    threads_[me].site = site;
    threads_[me].what = what;
    threads_[me].fiber.switch_to(scheduler_);
  }

  static void enter() {
    Block& b = current();
    b.thread().fiber.entered(b.scheduler_);
    (*b.body_)();
    b.thread().state = Thread::kDone;
    b.thread().fiber.switch_to(b.scheduler_, true);
    std::abort();
  }

  void run_block(dim3 index, dim3 block, std::size_t shared_bytes) {
    // Exactly the bytes that were asked for, so that the address sanitizer sees one too many.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<std::size_t>(shared_bytes, 1)))
      throw std::bad_alloc();
    std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
    std::memset(memory, 0xff, shared_bytes);
    shared_ = memory;
    blockIdx = index;
    warps_.assign(threads_.size() / 32, WarpSlot{});
    barrier_arrived_ = 0;
    error_.clear();
    const auto warp_order = shuffled(unsigned(warps_.size())), lane_order = shuffled(32);
    for (unsigned t = 0; t < threads_.size(); ++t) {
      threads_[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      threads_[t].state = Thread::kReady;
      threads_[t].copies.assign(1, {});
      threads_[t].fiber.prepare(&Block::enter);
    }
    // A warp runs for as long as it can before the next one moves at all: warps drift as far apart
    // as the barriers let them.
    for (bool alive = true; alive;) {
      bool moved = false;
      for (unsigned w : warp_order)
        while (run_lanes(w, lane_order)) moved = true;
      alive = std::any_of(threads_.begin(), threads_.end(),
                          [](const Thread& t) { return t.state != Thread::kDone; });
      if (alive && !moved) throw std::runtime_error(deadlock());
    }
  }

  bool run_lanes(unsigned w, const std::vector<unsigned>& order) {
    bool moved = false;
    for (unsigned lane : order) {
      const unsigned t = 32 * w + lane;
      if (threads_[t].state != Thread::kReady) continue;
      running_ = t;
      threadIdx = threads_[t].index;
      moved = true;
      scheduler_.switch_to(threads_[t].fiber);
      if (!error_.empty()) throw std::runtime_error(error_);
    }
    return moved;
  }

  std::string deadlock() const {
    std::map<std::string, int> where;
    int done = 0;
    for (auto& t : threads_)
      t.state == Thread::kDone ? ++done : ++where[std::string(t.what) + " at " + t.site.text()];
    std::string text = "deadlock in block (" + std::to_string(blockIdx.x) + "," +
                       std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + "):";
    for (auto& [site, count] : where)
      text += " " + std::to_string(count) + " threads wait in " + site + ",";
    return text + " " + std::to_string(done) + " have ended";
  }

  Fiber scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<WarpSlot> warps_;
  unsigned running_ = 0;
  void* shared_ = nullptr;
  std::size_t barrier_arrived_ = 0;
  Site barrier_site_{"", 0};
  std::string error_;
};

// Default arguments are evaluated where the call stands: that is how a barrier knows its line.
#define LIAR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

}  // namespace liar::testing

inline void __syncthreads(LIAR_SITE) {
  auto& block = liar::testing::Block::current();
  if (!block.skip("__syncthreads", {file, line})) block.barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, LIAR_SITE) {
  auto& block = liar::testing::Block::current();
  if (block.skip("__syncwarp", {file, line})) return;
  block.collective<int, int>("__syncwarp", mask, {file, line}, 0, [](auto&, auto&) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, LIAR_SITE) {
  return liar::testing::Block::current().collective<T, T>(
      "__shfl_xor_sync", mask, {file, line}, value, [=](auto& in, auto& out) {
        // A lane outside the mask has no defined value; here it is visibly wrong.
        for (int l = 0; l < 32; ++l)
          if (mask >> (l ^ lane_mask) & 1)
            out[l] = in[l ^ lane_mask];
          else
            std::memset(&out[l], 0xff, sizeof(T));
      });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, LIAR_SITE) {
  struct Message {
    T value;
    int source;
  };
  return liar::testing::Block::current().collective<Message, T>(
      "__shfl_sync", mask, {file, line}, {value, source}, [=](auto& in, auto& out) {
        for (int l = 0; l < 32; ++l)
          out[l] = in[(in[l].source + liar::testing::settings().shifted_shuffles) & 31].value;
      });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, LIAR_SITE) {
  return liar::testing::Block::current().collective<T, T>(
      "__shfl_up_sync", mask, {file, line}, value, [=](auto& in, auto& out) {
        for (int l = 0; l < 32; ++l) out[l] = in[l < delta ? l : l - delta];
      });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LIAR_SITE) {
  return liar::testing::Block::current().collective<int, unsigned>(
      "__ballot_sync", mask, {file, line}, predicate, [=](auto& in, auto& out) {
        unsigned bits = 0;
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) bits |= unsigned(in[l] != 0) << l;
        out.fill(bits);
      });
}

inline int __any_sync(unsigned mask, int predicate, LIAR_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
