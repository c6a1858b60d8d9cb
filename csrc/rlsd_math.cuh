// The formulas, for host and device, in fp32 and fp64: softcap, and RLSD per token.
//
//   w     = clip(exp(sign(A) delta), 1 - eps_w, 1 + eps_w)       A_hat = A ((1 - lambda) + lambda w)
//   loss  = a (-A_hat exp(clamp(log rho)) + beta k3)             g = dloss / dlog p(y)
//
// A_hat keeps A's sign, so PPO's min and the dual clip are one clamp of the log-ratio. Selections
// are conditional expressions, never products with a mask: a NaN outside the set cannot enter.
#pragma once

#include <cmath>

#include "rlsd.h"

#ifdef __CUDACC__
#define RLSD_HD __host__ __device__ __forceinline__
#else
#define RLSD_HD inline
#endif

namespace rlsd {

constexpr float kMaxLogRatio = 80.0f;  // config.MAX_LOG_RATIO
constexpr float kRowSumMin = 1e-8f;    // config.ROW_SUM_BOUNDS
constexpr float kRowSumMax = 1e8f;

// False for NaN and for the sums of a bad guess.
RLSD_HD bool trusted(float s) { return s >= kRowSumMin && s <= kRowSumMax; }

// exp to a few 1e-7 |x|, one multiplication and one special-function instruction on a device.
RLSD_HD float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}
RLSD_HD double fast_exp(double x) { return std::exp(x); }

// NaN stays NaN, unlike with fmin.
template <typename T>
RLSD_HD T clamp(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// tanh to 1e-7 and slope = 1 - tanh^2, by q = exp(-2|a|); a series where 1 - q would cancel.
template <typename T>
RLSD_HD T tanh_and_slope(T a, T* slope) {
  const T q = fast_exp(T(-2) * std::fabs(a));
  *slope = T(4) * q / ((1 + q) * (1 + q));
  const T b = a * a;
  const T series =
      1 + b * (T(-1. / 3) + b * (T(2. / 15) + b * (T(-17. / 315) + b * T(62. / 2835))));
  const T tanh = (1 - q) / (1 + q);
  return std::fabs(a) < T(0.25) ? a * series : (a < 0 ? -tanh : tanh);
}

// Raw logits (bias added) to z; slope = dz/dx of the softcap, 1 without one.
template <bool kCapped, typename T>
RLSD_HD T epilogue(T x, T pre, T post, T* slope) {
  if constexpr (kCapped) {
    return post * tanh_and_slope(pre * x, slope);
  } else {
    *slope = 1;
    return pre * x;
  }
}

// exp(d) - 1 - d without cancellation near 0.
template <typename T>
RLSD_HD T exp_minus_line(T d) {
  T s = 1 + d / 8;
  s = 1 + d / 7 * s;
  s = 1 + d / 6 * s;
  s = 1 + d / 5 * s;
  s = 1 + d / 4 * s;
  s = 1 + d / 3 * s;
  return std::fabs(d) < T(0.5) ? T(0.5) * d * d * s : std::exp(d) - 1 - d;
}

template <typename T>
struct Token {
  T log_prob, advantage, weight;  // weight: a_t, 0 = masked
  T teacher, old_log_prob, ref, entropy;
  bool in_mask;
};

// One token: its weighted loss, g, and what it adds to each of kTokenSums by
// add(index, whether, value). old_log_prob is log_prob where there is none.
template <typename T, typename Add>
RLSD_HD void rlsd_token(const Token<T>& token, const TokenBounds<T>& bounds,
                        const TokenFlags& flags, T lambda, T* loss, T* g, Add add) {
  const T limit = T(kMaxLogRatio);
  const T lp = token.log_prob, a = token.advantage, old = token.old_log_prob;
  const bool unmasked = token.weight != 0;
  const bool active = unmasked && a != 0;
  const bool pos = active && a > 0, neg = active && a < 0;
  add(kActivePos, pos, T(1));
  add(kActiveNeg, neg, T(1));
  add(kPolicyKl, active, old - lp);
  add(kEntropy, active, token.entropy);

  T a_hat = a;
  if (flags.has_teacher) {
    const bool chosen = (flags.negative_only ? a < 0 : a != 0) && token.in_mask;
    const T student = flags.delta_from_old ? old : lp;
    const T delta = token.teacher == student ? T(0) : token.teacher - student;  // both may be -inf
    const T directed = a < 0 ? -delta : delta;
    const T w = std::exp(clamp(directed, bounds.weight_low, bounds.weight_high));
    a_hat = chosen ? a * ((1 - lambda) + lambda * w) : a;
    const bool counted = chosen && active;
    add(kReweightedPos, counted && pos, T(1));
    add(kReweightedNeg, counted && neg, T(1));
    add(kDeltaPos, counted && pos, delta);
    add(kDeltaNeg, counted && neg, delta);
    add(kDeltaSquared, counted, double(delta) * double(delta));
    add(kWeightClipLow, counted && directed < bounds.weight_low, T(1));
    add(kWeightClipHigh, counted && directed > bounds.weight_high, T(1));
  }
  const T multiplier = a_hat / (a == 0 ? T(1) : a);
  add(kWeightPos, pos, multiplier);
  add(kWeightNeg, neg, multiplier);

  const T log_ratio = lp - old;
  const bool praised = a_hat > 0;
  const T low = praised ? -limit : bounds.blame_low;
  const T high = praised ? bounds.praise_high : bounds.blame_high;
  T value = -a_hat * std::exp(clamp(log_ratio, low, high));
  T slope = log_ratio < low || log_ratio > high ? T(0) * a_hat : value;  // NaN stays NaN
  const T ratio = std::exp(clamp(log_ratio, -limit, limit));
  add(kRatioClipLow, neg && ratio < bounds.ratio_low, T(1));
  add(kRatioClipHigh, pos && ratio > bounds.ratio_high, T(1));
  add(kRatioClipDual, neg && ratio > bounds.ratio_dual, T(1));

  bool live = active;
  if (flags.has_ref) {
    const T d = token.ref - lp;
    const T bounded = d > limit ? limit : d;
    const T kl = exp_minus_line(bounded);
    add(kKl, active, kl);
    if (flags.has_kl_loss) {
      live = unmasked;
      value += bounds.beta * kl;
      slope -= bounds.beta * (d > limit ? T(0) : kl + bounded);
    }
  }
  *loss = live ? token.weight * value : T(0);
  *g = live ? token.weight * slope : T(0);
}

}  // namespace rlsd
