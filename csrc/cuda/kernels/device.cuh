// What a kernel may use of the machine: element types, the handful of instructions that CUDA C++
// has no word for, and launching. Compiled by nvcc this is inline assembly; compiled by a host
// compiler it is the emulation in csrc/testing, so that every kernel runs without a GPU too.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../../testing/runtime_on_host.h"
#include "../../testing/tensor_core.h"
#endif

namespace liar::cuda {

// 16-bit floats as bits: the toolkit's own headers aren't there on a machine without CUDA.
struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

#ifdef __CUDACC__

#define LIAR_DEVICE __device__ __forceinline__
#define LIAR_BOTH __host__ __device__ __forceinline__

LIAR_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
LIAR_DEVICE float to_float(bf16 x) { return __uint_as_float(std::uint32_t(x.bits) << 16); }

LIAR_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

template <int kBytes>
LIAR_DEVICE void copy_async(void* to, const void* from, int valid) {
  // .cg goes past L1, which the strided tiles would only thrash; it exists for 16 bytes alone.
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
}

LIAR_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
LIAR_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

LIAR_DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

LIAR_DEVICE void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LIAR_DEVICE void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LIAR_DEVICE void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LIAR_DEVICE void mma_f64(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

// In assembly because compilers otherwise split the load when its elements are looked at one by
// one.
LIAR_DEVICE void load_16_bytes(std::uint32_t (&w)[4], const void* p) {
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
      : "l"(p));
}

LIAR_DEVICE std::uint32_t bits_of(float x) { return __float_as_uint(x); }
LIAR_DEVICE float float_of(std::uint32_t x) { return __uint_as_float(x); }

// Dynamic shared memory seen as one struct; a kernel declares no other.
template <class Shared>
LIAR_DEVICE Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char liar_shared[];
  return *reinterpret_cast<Shared*>(liar_shared);
}

#else

#define LIAR_DEVICE inline
#define LIAR_BOTH inline

LIAR_DEVICE float to_float(f16 x) { return testing::half_to_float(x.bits); }
LIAR_DEVICE float to_float(bf16 x) { return testing::bfloat_to_float(x.bits); }

LIAR_DEVICE void load_16_bytes(std::uint32_t (&w)[4], const void* p) { std::memcpy(w, p, 16); }

LIAR_DEVICE std::uint32_t bits_of(float x) {
  std::uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
LIAR_DEVICE float float_of(std::uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

template <class Shared>
Shared& shared_memory() {
  return *static_cast<Shared*>(testing::Block::current().shared());
}

#endif

LIAR_DEVICE float to_float(float x) { return x; }
LIAR_DEVICE double to_double(f16 x) { return to_float(x); }
LIAR_DEVICE double to_double(bf16 x) { return to_float(x); }
LIAR_DEVICE double to_double(float x) { return x; }
LIAR_DEVICE double to_double(double x) { return x; }

// The nearest tf32 (10 mantissa bits), ties away from zero; the low bits come out clear.
LIAR_DEVICE std::uint32_t to_tf32(float x) { return (bits_of(x) + 0x1000u) & 0xffffe000u; }

LIAR_BOTH std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
template <class T>
LIAR_BOTH T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
LIAR_BOTH T larger(T a, T b) {
  return a < b ? b : a;
}

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Where kernels go, how many blocks fill the machine, and the first error on the way.
struct Stream {
  cudaStream_t handle = nullptr;
  int processors = 1;
  cudaError_t error = cudaSuccess;
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, unsigned threads, std::size_t shared_bytes,
            Stream& stream, const Params& params) {
  if (stream.error != cudaSuccess || grid.x == 0 || grid.y == 0) return;
  // Above 48 KB a kernel must ask; asking twice costs less than remembering.
  if (shared_bytes > 48 << 10)
    stream.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes));
  if (stream.error != cudaSuccess) return;
#ifdef __CUDACC__
  kernel<<<grid, threads, shared_bytes, stream.handle>>>(params);
#else
  testing::launch(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, stream.handle,
                  [&] { kernel(params); });
#endif
  stream.error = cudaGetLastError();
}

// How many blocks of `kernel` fit one multiprocessor at a time.
template <class Params>
int blocks_per_processor(void (*kernel)(Params), unsigned threads, std::size_t shared_bytes,
                         Stream& stream) {
  if (stream.error != cudaSuccess) return 1;
  if (shared_bytes > 48 << 10)
    stream.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes));
  int blocks = 0;
  if (stream.error == cudaSuccess)
    stream.error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, kernel, static_cast<int>(threads), shared_bytes);
  return blocks > 0 ? blocks : 1;
}

}  // namespace liar::cuda
