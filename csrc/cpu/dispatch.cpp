// Chooses the micro-kernels for this CPU, once: the best that it supports and that are right on it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "self_check.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace liar {
namespace {

struct Candidate {
  KernelSet set;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

/// Whether there are tiles, and Linux lets this process use them: it has to be asked, because their
/// 8 KiB make every context larger.
bool has_amx_bf16() {
#if defined(LIAR_EMULATE_AMX)
  return has_avx512();
#elif defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 &&
         (d & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {{"amx_bf16", &kAvx512F32, &kAvx512F64, &kAmxBf16}, has_amx_bf16},
    {{"avx512_bf16", &kAvx512F32, &kAvx512F64, &kAvx512Bf16}, has_avx512_bf16},
    {{"avx512", &kAvx512F32, &kAvx512F64, nullptr}, has_avx512},
    {{"avx2", &kAvx2F32, &kAvx2F64, nullptr}, has_avx2},
#elif defined(__aarch64__)
    {{"neon", &kNeonF32, &kNeonF64, nullptr}, [] { return true; }},
#endif
    {{"portable", &kPortableF32, &kPortableF64, nullptr}, [] { return true; }}};

const KernelSet& choose() {
  const char* wanted = std::getenv("LIAR_CPU_KERNEL");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Candidate& each : kCandidates) {
    if (!each.supported()) continue;
    if (any ? is_right(each.set) : std::strcmp(wanted, each.set.name) == 0) return each.set;
    if (any) {
      std::fprintf(stderr,
                   "liar_ext: the CPU kernels %s are wrong on this machine and left out. Please "
                   "report this with the output of `liar doctor --json`, see CONTRIBUTING.md\n",
                   each.set.name);
    }
  }
  if (any) throw std::runtime_error("no CPU kernel is right on this machine; set LIAR_REFERENCE=1");
  throw std::runtime_error("LIAR_CPU_KERNEL: must be one of " + kernel_names() +
                           " on this CPU, got " + wanted + "; unset it to take the best");
}

}  // namespace

std::string kernel_names() {
  std::string names;
  for (const Candidate& each : kCandidates) {
    if (each.supported()) names += (names.empty() ? "" : ", ") + std::string(each.set.name);
  }
  return names;
}

const KernelSet& kernels() {
  static const KernelSet& chosen = choose();
  return chosen;
}

}  // namespace liar
