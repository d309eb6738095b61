// Small kernels with faults planted in them: each must be caught by the shim, or the shim is
// broken.
#include "../cuda/kernels/block.cuh"
#include "bindings.h"

namespace liar::testing {

constexpr int kThreads = 64;

struct FaultParams {
  const float* in;
  float* out;
  int n;
};

// out[i] = in[(i + 1) % 64], through shared memory.
struct RotateShared {
  float x[kThreads];
};
void rotate(const FaultParams p) {
  auto& s = shared_memory<RotateShared>();
  s.x[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s.x[(threadIdx.x + 1) % kThreads];
}

// The same without the barrier.
void rotate_unguarded(const FaultParams p) {
  auto& s = shared_memory<RotateShared>();
  s.x[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = s.x[(threadIdx.x + 1) % kThreads];
}

void divergent_barrier(const FaultParams p) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  p.out[threadIdx.x] = 0;
}

void forgotten_threads(const FaultParams p) {
  if (int(threadIdx.x) >= p.n) return;
  __syncthreads();
  p.out[threadIdx.x] = 0;
}

void half_a_shuffle(const FaultParams p) {
  if (threadIdx.x % 2 == 0) p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}

void divergent_shuffles(const FaultParams p) {
  if (threadIdx.x % 2 == 0)
    p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
  else
    p.out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}

void masked_shuffle(const FaultParams p) {
  const unsigned mask = threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u;
  p.out[threadIdx.x] = __shfl_xor_sync(mask, p.in[threadIdx.x], 2);
}

// One element past the shared array, and past the input: for the address sanitizer and the NaNs
// around the test's arrays.
void shared_overrun(const FaultParams p) {
  auto& s = shared_memory<RotateShared>();
  s.x[threadIdx.x + p.n] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s.x[threadIdx.x + p.n];
}

void copy_one_too_many(const FaultParams p) {
  for (int i = threadIdx.x; i <= p.n; i += kThreads) p.out[0] += p.in[i];
}

struct AsyncShared {
  alignas(16) float x[kThreads * 4];
};
void async_rotate(const FaultParams p) {
  auto& s = shared_memory<AsyncShared>();
  copy_async<16>(&s.x[4 * threadIdx.x], p.in + 4 * threadIdx.x, 16);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  p.out[threadIdx.x] = s.x[(4 * threadIdx.x + 7) % (4 * kThreads)];
}

void misaligned_async(const FaultParams p) {
  auto& s = shared_memory<AsyncShared>();
  copy_async<16>(&s.x[4 * threadIdx.x], p.in + 1, 16);
  copy_commit();
  copy_wait<0>();
}

void atomic_sum(const FaultParams p) {
  atomicAdd(p.out, p.in[threadIdx.x]);
  if (threadIdx.x == 0 && blockIdx.x == 0) atomicAdd(p.out + 1, float(gridDim.x));
}

// Counts on the block before it having run.
void chained_blocks(const FaultParams p) {
  if (threadIdx.x == 0 && blockIdx.x > 0) p.out[blockIdx.x] = p.out[blockIdx.x - 1] + 1;
}

void block_total(const FaultParams p) {
  struct Shared {
    double scratch[kThreads / kWarp];
  };
  auto& s = shared_memory<Shared>();
  const double first = block_sum(p.in[threadIdx.x], s.scratch);
  const double second = block_sum(2.0 * p.in[threadIdx.x], s.scratch);
  p.out[threadIdx.x] = float(first + second);
}

// One warp multiplies X (16×16) by Y (16×8) with each instruction, straight from the layout table.
void fragments(const FaultParams p) {
  const float* x = p.in;
  const float* y = p.in + 256;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float c[4] = {};
  if (p.n == 0) {  // bf16: the upper half of a float's bits
    std::uint32_t a[4], b[2];
    const auto two = [](float low, float high) {
      return bits_of(low) >> 16 | (bits_of(high) & 0xffff0000u);
    };
    for (int r = 0; r < 4; ++r) {
      const float* at = x + (g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2);
      a[r] = two(at[0], at[1]);
    }
    for (int r = 0; r < 2; ++r) {
      const float* at = y + (2 * t + 8 * r) * 8 + g;
      b[r] = two(at[0], at[8]);
    }
    mma_bf16(c, a, b);
  } else if (p.n == 1) {
    for (int k = 0; k < 16; k += 8) {
      std::uint32_t a[4], b[2];
      for (int r = 0; r < 4; ++r) a[r] = bits_of(x[(g + 8 * (r % 2)) * 16 + k + t + 4 * (r / 2)]);
      for (int r = 0; r < 2; ++r) b[r] = bits_of(y[(k + t + 4 * r) * 8 + g]);
      mma_tf32(c, a, b);
    }
  } else {
    double d[2][2] = {};
    for (int k = 0; k < 16; k += 4)
      for (int m = 0; m < 2; ++m) mma_f64(d[m], x[(g + 8 * m) * 16 + k + t], y[(k + t) * 8 + g]);
    for (int r = 0; r < 4; ++r) c[r] = float(d[r / 2][r % 2]);
  }
  for (int r = 0; r < 4; ++r) p.out[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
}

void bind_faults(py::module_& m) {
  m.def(
      "run_fault",
      [](const std::string& name, py::array_t<float> in, py::array_t<float> out, int n,
         unsigned threads, unsigned blocks, std::size_t shared, unsigned rows) {
        const std::map<std::string, std::pair<void (*)(FaultParams), std::size_t>> kernels = {
            {"rotate", {rotate, sizeof(RotateShared)}},
            {"rotate_unguarded", {rotate_unguarded, sizeof(RotateShared)}},
            {"divergent_barrier", {divergent_barrier, 0}},
            {"forgotten_threads", {forgotten_threads, 0}},
            {"half_a_shuffle", {half_a_shuffle, 0}},
            {"divergent_shuffles", {divergent_shuffles, 0}},
            {"masked_shuffle", {masked_shuffle, 0}},
            {"shared_overrun", {shared_overrun, sizeof(RotateShared)}},
            {"copy_one_too_many", {copy_one_too_many, 0}},
            {"async_rotate", {async_rotate, sizeof(AsyncShared)}},
            {"misaligned_async", {misaligned_async, sizeof(AsyncShared)}},
            {"atomic_sum", {atomic_sum, 0}},
            {"chained_blocks", {chained_blocks, 0}},
            {"block_total", {block_total, kThreads / kWarp * sizeof(double)}},
            {"fragments", {fragments, 0}},
        };
        const auto [kernel, bytes] = kernels.at(name);
        Stream stream;
        launch(kernel, {blocks, rows, 1}, threads, std::max(bytes, shared), stream,
               FaultParams{in.data(), out.mutable_data(), n});
        require(name.c_str(), stream.error);
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("n") = 0,
      py::arg("threads") = kThreads, py::arg("blocks") = 1, py::arg("shared") = 0,
      py::arg("rows") = 1);
}

}  // namespace liar::testing
