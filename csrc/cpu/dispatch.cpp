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
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const KernelSet& set : kSets) {
    if (supported(set) && (any || std::strcmp(wanted, set.name) == 0)) return set;
  }
  throw std::runtime_error("LIAR_CPU_KERNEL: must be one of " + kernel_names() +
                           " on this CPU, got " + wanted + "; unset it to take the best");
}

}  // namespace

std::string kernel_names() {
  std::string names;
  for (const KernelSet& set : kSets) {
    if (supported(set)) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  return names;
}

const KernelSet& kernels() {
  static const KernelSet& chosen = choose();
  return chosen;
}

}  // namespace liar
