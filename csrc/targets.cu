// What touches some tokens per row: z_y = h . W[y] in fp32, and E[i, y_ik] := value_ik.
//
// Reads 2 H elements per row and writes 4 bytes; an id that this head (or shard) does not hold gives
// 0, respectively writes nothing, and is never used as an address.
#include "common.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 128;

template <typename Hidden, typename Weight>
__global__ void __launch_bounds__(kThreads)
    rlsd_target_logits_kernel(const TargetLogitsParams p) {
  constexpr int kLanes = kPerVector<Weight>;
  const int64_t row = blockIdx.x, target = p.ids[row];
  float sum = 0;
  if (target >= 0 && target < p.vocab) {
    const Hidden* h = static_cast<const Hidden*>(p.h) + row * p.stride_h;
    const Weight* w = static_cast<const Weight*>(p.weight) + target * p.stride_w;
    const bool wide = is_aligned(h) && is_aligned(w);
    const int end = wide ? p.hidden / kLanes * kLanes : 0;
    for (int j = int(threadIdx.x) * kLanes; j < end; j += kThreads * kLanes) {
      float a[kLanes], b[kLanes], part = 0;
      load(h + j, true, a);
      load(w + j, true, b);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) part = fmaf(a[k], b[k], part);
      sum += part;
    }
    for (int j = end + int(threadIdx.x); j < p.hidden; j += kThreads) {
      sum = fmaf(to_float(h[j]), to_float(w[j]), sum);
    }
  }
  sum = block_reduce<kThreads>(sum, Add());
  if (threadIdx.x == 0) p.out[row] = sum;
}

template <typename E>
__global__ void __launch_bounds__(kThreads) rlsd_fix_targets_kernel(const FixTargetsParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.per_row) return;
  const int64_t row = i / p.per_row, target = p.ids[i];
  if (target < 0 || target >= p.vocab) return;
  static_cast<E*>(p.e)[row * p.stride_e + target] = from_float<E>(p.values[i]);
}

}  // namespace

const char* target_logits(const TargetLogitsParams& p, void* stream) {
  return dtype_switch(p.weight_dtype, [&](auto weight) {
    using Weight = typename decltype(weight)::type;
    return bool_switch(p.h_dtype == p.weight_dtype, [&](auto same) {
      using Hidden = std::conditional_t<same, Weight, float>;
      return launch(rlsd_target_logits_kernel<Hidden, Weight>, p.rows, kThreads, p, stream);
    });
  });
}

const char* fix_targets(const FixTargetsParams& p, void* stream) {
  return dtype_switch(p.e_dtype, [&](auto e) {
    using E = typename decltype(e)::type;
    const int64_t blocks = (p.rows * p.per_row + kThreads - 1) / kThreads;
    return launch(rlsd_fix_targets_kernel<E>, blocks, kThreads, p, stream);
  });
}

}  // namespace rlsd
