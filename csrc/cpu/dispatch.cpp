// Chooses the micro-kernels for this CPU, once.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "panel_kernel.h"

namespace liar {
namespace {

// Best first.
const KernelSet kSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512F32, &kAvx512F64, &kAvx512Bf16},
    {"avx512", &kAvx512F32, &kAvx512F64, nullptr},
    {"avx2", &kAvx2F32, &kAvx2F64, nullptr},
#endif
    {"portable", &kPortableF32, &kPortableF64, nullptr}};

bool supported(const KernelSet& set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (set.bf16 != nullptr) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (set.f32 == &kAvx512F32) return avx512;
  if (set.f32 == &kAvx2F32) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return set.f32 == &kPortableF32;
}

const KernelSet& choose() {
  const char* wanted = std::getenv("LIAR_CPU_KERNEL");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  std::string names;
  for (const KernelSet& set : kSets) {
    if (!supported(set)) continue;
    if (wanted == nullptr || std::strcmp(wanted, set.name) == 0) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error(std::string("LIAR_CPU_KERNEL: must be one of ") + names +
                           " on this CPU, got " + wanted + "; unset it to take the best");
}

}  // namespace

const KernelSet& kernels() {
  static const KernelSet& chosen = choose();
  return chosen;
}

}  // namespace liar
