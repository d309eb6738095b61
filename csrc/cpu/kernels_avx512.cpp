// AVX-512 micro-kernels (F, BW, DQ, VL).
#include "panel_solve_impl.h"
#include "simd_avx512.h"

namespace liar {

const PanelKernel kAvx512F32 = single_kernel<SimdF32>();
const PanelKernel kAvx512F64 = one_type_kernel<SimdF64, Rows<SimdF64, double>, solve<SimdF64>>();

}  // namespace liar
