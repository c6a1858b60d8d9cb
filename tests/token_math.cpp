// rlsd_math.cuh behind C functions over arrays, in fp32 and fp64, for ctypes.
#include "rlsd_math.cuh"

#include <cstdint>

namespace {

template <typename T>
void tokens(int64_t n, const T* lp, const T* a, const T* weight, const T* teacher, const T* old,
            const T* ref, const T* entropy, const bool* mask, T lambda,
            const rlsd::TokenBounds<T>* bounds, const rlsd::TokenFlags* flags, T* loss, T* g,
            double* terms) {
  for (int64_t i = 0; i < n; ++i) {
    const rlsd::Token<T> token{lp[i], a[i], weight[i], teacher[i], old[i], ref[i], entropy[i],
                               mask[i]};
    double* sums = terms + i * rlsd::kTokenSums;
    const auto add = [&](int index, bool chosen, double x) { sums[index] += chosen ? x : 0.0; };
    rlsd::rlsd_token(token, *bounds, *flags, lambda, loss + i, g + i, add);
  }
}

}  // namespace

#define RLSD_EXPORT(T, suffix)                                                                    \
  extern "C" void tokens_##suffix(                                                                \
      int64_t n, const T* lp, const T* a, const T* weight, const T* teacher, const T* old,        \
      const T* ref, const T* entropy, const bool* mask, T lambda,                                 \
      const rlsd::TokenBounds<T>* bounds, const rlsd::TokenFlags* flags, T* loss, T* g,           \
      double* terms) {                                                                            \
    tokens(n, lp, a, weight, teacher, old, ref, entropy, mask, lambda, bounds, flags, loss, g,    \
           terms);                                                                                \
  }                                                                                               \
  extern "C" void clamp_##suffix(int64_t n, const T* x, T low, T high, T* out) {                  \
    for (int64_t i = 0; i < n; ++i) out[i] = rlsd::clamp(x[i], low, high);                        \
  }                                                                                               \
  extern "C" void exp_minus_line_##suffix(int64_t n, const T* x, T* out) {                        \
    for (int64_t i = 0; i < n; ++i) out[i] = rlsd::exp_minus_line(x[i]);                          \
  }                                                                                               \
  extern "C" void epilogue_##suffix(int64_t n, const T* x, T pre, T post, bool capped, T* out,    \
                                    T* slope) {                                                   \
    for (int64_t i = 0; i < n; ++i) {                                                             \
      out[i] = capped ? rlsd::epilogue<true>(x[i], pre, post, slope + i)                          \
                      : rlsd::epilogue<false>(x[i], pre, post, slope + i);                        \
    }                                                                                             \
  }

RLSD_EXPORT(float, fp32)
RLSD_EXPORT(double, fp64)
extern "C" bool trusted(float s) { return rlsd::trusted(s); }
