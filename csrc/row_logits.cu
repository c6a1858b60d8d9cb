// What a row's logits say beside its softmax: their sum, and where the first of the largest is.
//
// Reads 4V bytes per row. z is formed as in exp_rows.cu, which need not know of this pass.
#include "common.cuh"
#include "rlsd_math.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;

struct Min {
  __device__ __forceinline__ int operator()(int a, int b) const { return a < b ? a : b; }
};

template <bool kCapped>
__global__ void __launch_bounds__(kThreads) rlsd_row_logits_kernel(const RowLogitsParams p) {
  const int64_t row = blockIdx.x;
  const float* x = p.x + row * p.stride_x;
  const float* bias = p.epilogue.bias;
  const bool wide_bias = is_aligned(bias + head_of(x, p.vocab));
  const float pre = p.epilogue.pre, post = p.epilogue.post;
  float sum = 0, top = -INFINITY;
  int place = 0;  // a thread's elements come in ascending order
  stream_row<kThreads, kPerVector<float>>(x, p.vocab, [&](int j, const auto& raw) {
    constexpr int kN = int(sizeof(raw) / sizeof(float));
    float b[kN] = {}, part = 0;
    if (bias != nullptr) load(bias + j, wide_bias, b);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      float slope;
      const float z = epilogue<kCapped>(raw[k] + b[k], pre, post, &slope);
      part += z;
      if (z > top) top = z, place = j + k;
    }
    sum += part;
  });
  sum = block_reduce<kThreads>(sum, Add());
  __shared__ float largest;
  const float mine = top;
  top = block_reduce<kThreads>(top, Max());
  if (threadIdx.x == 0) largest = top;
  __syncthreads();
  place = block_reduce<kThreads>(mine == largest ? place : p.vocab, Min());
  if (threadIdx.x == 0) p.sum[row] = sum, p.top_ids[row] = place;
}

}  // namespace

const char* row_logits(const RowLogitsParams& p, void* stream) {
  return bool_switch(p.capped, [&](auto capped) {
    return launch(rlsd_row_logits_kernel<capped>, p.rows, kThreads, p, stream);
  });
}

}  // namespace rlsd
