// Streaming exp: s = sum_j e_j with e = exp(z - c), z the softcapped, scaled logits of a row.
//
// c is a guess of the log-sum-exp, so one pass needs no maximum. Traffic per row: 4V bytes read, and
// 2V (16-bit E) or 4V (fp32) written, or none; sums are fp32 and taken before E is rounded. With
// `total` only rows whose first sum is not trusted are done, with the maximum that row_max.cu left
// in c: the exact path, without asking the host.
#include "common.cuh"
#include "rlsd_math.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;

template <typename Out, Store kStore, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kThreads) rlsd_exp_kernel(const ExpParams p) {
  const int64_t row = blockIdx.x;
  if (p.total != nullptr && trusted(p.total[row])) return;
  // A 16-bit vector takes two of fp32. The same without a store, for one order of the sums: student
  // and teacher get equal bits from equal logits.
  constexpr int kLanes = kPerVector<__nv_bfloat16>;
  const float* x = p.x + row * p.stride_x;
  Out* out = static_cast<Out*>(p.out) + row * p.stride_out;
  const int head = head_of(x, p.vocab);
  const float* bias = p.epilogue.bias;
  const bool wide_bias = is_aligned(bias + head);
  const bool wide_out = kStore != Store::kNone && is_aligned(out + head);
  const float c = p.c[row], pre = p.epilogue.pre, post = p.epilogue.post;
  float s = 0, t = 0;
  stream_row<kThreads, kLanes>(x, p.vocab, [&](int j, const auto& raw) {
    constexpr int kN = int(sizeof(raw) / sizeof(float));
    float b[kN] = {}, kept[kN];
    if (bias != nullptr) load(bias + j, wide_bias, b);
    float sum = 0, weighted = 0;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      float slope;
      const float z = epilogue<kCapped>(raw[k] + b[k], pre, post, &slope);
      const float d = z - c, e = fast_exp(d);
      sum += e;
      if constexpr (kEntropy) weighted += e == 0 ? 0.0f : e * d;  // a forbidden token: d = -inf
      kept[k] = kStore == Store::kExp ? e * slope : z;
    }
    s += sum;
    t += weighted;
    if constexpr (kStore != Store::kNone) store(out + j, wide_out, kept);
  });
  s = block_reduce<kThreads>(s, Add());
  if (threadIdx.x == 0) p.s[row] = s;
  if constexpr (kEntropy) {
    t = block_reduce<kThreads>(t, Add());
    if (threadIdx.x == 0) p.t[row] = t;
  }
}

}  // namespace

const char* exp_rows(const ExpParams& p, void* stream) {
  const auto run = [&](auto out, auto store) {
    using Out = typename decltype(out)::type;
    constexpr Store kStore = decltype(store)::value;
    return bool_switch(p.capped, [&](auto capped) {
      return bool_switch(p.t != nullptr, [&](auto entropy) {
        return launch(rlsd_exp_kernel<Out, kStore, capped, entropy>, p.rows, kThreads, p, stream);
      });
    });
  };
  switch (p.store) {
    case Store::kExp:
      return dtype_switch(p.out_dtype, [&](auto out) {
        return run(out, std::integral_constant<Store, Store::kExp>());
      });
    case Store::kLogits:
      return run(Type<float>(), std::integral_constant<Store, Store::kLogits>());
    default:
      return run(Type<float>(), std::integral_constant<Store, Store::kNone>());
  }
}

}  // namespace rlsd
