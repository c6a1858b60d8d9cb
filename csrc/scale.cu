// x *= factor, a number on the device: gradients formed before it was known.
//
// Reads and writes 2 or 4 bytes per element; nothing where the factor is 1, as it nearly always is.
#include "common.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // per thread

template <typename T>
__global__ void __launch_bounds__(kThreads) rlsd_scale_kernel(const ScaleParams p) {
  constexpr int kLanes = kPerVector<T>;
  const float factor = p.factor[0];
  if (factor == 1.0f) return;
  T* x = static_cast<T*>(p.x);
  const bool wide = is_aligned(x);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector = (int64_t(blockIdx.x) * kVectors + i) * kThreads + threadIdx.x;
    const int64_t j = vector * kLanes;
    float v[kLanes];
    if (j + kLanes <= p.n) {
      load(x + j, wide, v);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) v[k] *= factor;
      store(x + j, wide, v);
    } else {
      for (int64_t k = j; k < p.n; ++k) x[k] = from_float<T>(to_float(x[k]) * factor);
    }
  }
}

}  // namespace

const char* scale(const ScaleParams& p, void* stream) {
  return dtype_switch(p.x_dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    constexpr int64_t kPerBlock = int64_t(kThreads) * kVectors * kPerVector<T>;
    const int64_t blocks = (p.n + kPerBlock - 1) / kPerBlock;
    return launch(rlsd_scale_kernel<T>, blocks, kThreads, p, stream);
  });
}

}  // namespace rlsd
