// c := max_j z_j for the rows whose sum a bad guess spoiled; the others return at once.
//
// Reads 4V bytes per such row. max is monotone under a positive scale, but z itself is what
// exp_rows.cu subtracts c from, so z is formed in the same way here.
#include "common.cuh"
#include "rlsd_math.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;

template <bool kCapped>
__global__ void __launch_bounds__(kThreads) rlsd_row_max_kernel(const RowMaxParams p) {
  const int64_t row = blockIdx.x;
  if (trusted(p.total[row])) return;
  const float* x = p.x + row * p.stride_x;
  const float* bias = p.epilogue.bias;
  const bool wide_bias = is_aligned(bias + head_of(x, p.vocab));
  const float pre = p.epilogue.pre, post = p.epilogue.post;
  float top = -INFINITY;
  stream_row<kThreads, kPerVector<float>>(x, p.vocab, [&](int j, const auto& raw) {
    constexpr int kN = int(sizeof(raw) / sizeof(float));
    float b[kN] = {};
    if (bias != nullptr) load(bias + j, wide_bias, b);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      float slope;
      top = Max()(top, epilogue<kCapped>(raw[k] + b[k], pre, post, &slope));
    }
  });
  top = block_reduce<kThreads>(top, Max());
  if (threadIdx.x == 0) p.c[row] = top;
}

}  // namespace

const char* row_max(const RowMaxParams& p, void* stream) {
  return bool_switch(p.capped, [&](auto capped) {
    return launch(rlsd_row_max_kernel<capped>, p.rows, kThreads, p, stream);
  });
}

}  // namespace rlsd
