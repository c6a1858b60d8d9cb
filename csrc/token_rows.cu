// RLSD on N scalars in one launch: loss, g = dloss/dlog p(y), and config.TOKEN_SUMS in fp64.
//
// Reads 12 to 32 bytes per token and writes 4. One block takes all tokens, so every sum has one
// fixed order and nothing crosses blocks; 32768 tokens are 64 steps of it, beside GEMMs of 10^14
// FLOP. The sums are fp64: counts of more than 2^24 tokens and differences of log-probs stay exact.
#include "common.cuh"
#include "rlsd_math.cuh"

namespace rlsd {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) rlsd_rows_kernel(const RlsdParams p) {
  double sums[kTokenSums] = {}, total = 0;
  const float lambda = *p.lambda;
  const auto add = [&](int index, bool chosen, double value) {
    sums[index] += chosen ? value : 0.0;
  };
  for (int64_t i = threadIdx.x; i < p.rows; i += kThreads) {
    Token<float> token;
    token.log_prob = p.log_probs[i];
    token.advantage = p.advantages[i];
    token.weight = p.loss_weights[i];
    token.teacher = p.teacher != nullptr ? p.teacher[i] : 0.0f;
    token.old_log_prob = p.old_log_probs != nullptr ? p.old_log_probs[i] : token.log_prob;
    token.ref = p.ref != nullptr ? p.ref[i] : 0.0f;
    token.entropy = p.entropy != nullptr ? p.entropy[i] : 0.0f;
    token.in_mask = p.mask == nullptr || p.mask[i];
    float loss, g;
    rlsd_token(token, p.bounds, p.flags, lambda, &loss, &g, add);
    p.g[i] = g;
    total += loss;
  }
  total = block_reduce<kThreads>(total, Add());
  if (threadIdx.x == 0) *p.loss = float(total);
#pragma unroll
  for (int k = 0; k < kTokenSums; ++k) {
    const double sum = block_reduce<kThreads>(sums[k], Add());
    if (threadIdx.x == 0) p.sums[k] = sum;
  }
}

}  // namespace

const char* token_rows(const RlsdParams& p, void* stream) {
  return launch(rlsd_rows_kernel, 1, kThreads, p, stream);
}

}  // namespace rlsd
