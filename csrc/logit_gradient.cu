// The strict row stage: dlogits = scale (g (p - onehot(y)) + g_H p (log p + H) + even) dcap.
//
// p = exp(z - lse) from finished logits in fp32: 4V bytes read and 2V or 4V written per row, in
// place if the caller wants. A row whose coefficients are 0 gives exact zeros whatever z holds.
#include "common.cuh"
#include "rlsd_math.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;

template <typename Out, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kThreads)
    rlsd_logit_gradient_kernel(const LogitGradientParams p) {
  const int64_t row = blockIdx.x;
  const float* z = p.z + row * p.stride_z;
  Out* out = static_cast<Out*>(p.out) + row * p.stride_out;
  const int64_t target = p.ids[row];
  const float lse = p.lse[row], g = p.g[row];
  const float g_entropy = kEntropy ? p.g_entropy[row] : 0, entropy = kEntropy ? p.entropy[row] : 0;
  const float even = p.even == nullptr ? 0 : p.even[row];
  const bool dead = g == 0 && g_entropy == 0 && even == 0;
  const bool wide = is_aligned(out + head_of(z, p.vocab));
  stream_row<kThreads, kPerVector<Out>>(z, p.vocab, [&](int j, const auto& logits) {
    constexpr int kN = int(sizeof(logits) / sizeof(float));
    float dz[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      const float log_p = logits[k] - lse, prob = fast_exp(log_p);
      float d = g * (prob - (j + k == target ? 1.0f : 0.0f));
      // prob 0: a forbidden token has log_p = -inf
      if constexpr (kEntropy) d += g_entropy * (prob == 0 ? 0.0f : prob * (log_p + entropy));
      d += even;
      if constexpr (kCapped) {
        const float tanh = logits[k] * p.inv_post;
        d *= (1 - tanh) * (1 + tanh);
      }
      dz[k] = dead ? 0.0f : d * p.scale;
    }
    store(out + j, wide, dz);
  });
}

}  // namespace

const char* logit_gradient(const LogitGradientParams& p, void* stream) {
  return dtype_switch(p.out_dtype, [&](auto out) {
    using Out = typename decltype(out)::type;
    return bool_switch(p.capped, [&](auto capped) {
      return bool_switch(p.g_entropy != nullptr, [&](auto entropy) {
        return launch(rlsd_logit_gradient_kernel<Out, capped, entropy>, p.rows, kThreads, p,
                      stream);
      });
    });
  });
}

}  // namespace rlsd
