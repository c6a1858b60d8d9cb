// What the kernels are given: plain structs of pointers and numbers, and one launcher each.
//
// A launcher returns nullptr or CUDA's sentence about what went wrong. Rows lie `stride` elements
// apart, and the elements of a row side by side; sizes are checked in api.cpp.
#pragma once

#include <cstdint>

namespace rlsd {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// What a streaming exp leaves behind; the numbers are those of streaming.py.
enum class Store { kNone = 0, kExp = 1, kLogits = 2 };

// z = post tanh(pre (x + bias)) with a softcap, else pre (x + bias).
struct Epilogue {
  const float* bias;  // (V,) or null
  float pre, post;
};

struct ExpParams {
  const float* x;      // (M, V) raw logits; `out` may be the same memory
  const float* c;      // (M,)
  const float* total;  // (M,) or null: rows whose sum here is trusted are left alone
  float* s;            // (M,) sum_j e_j, e = exp(z - c); may be `total`
  float* t;            // (M,) sum_j e_j (z_j - c), or null
  void* out;           // (M, V): e times the softcap's slope, or z
  int64_t rows, stride_x, stride_out;
  int vocab;
  bool capped;
  Epilogue epilogue;
  Store store;
  DType out_dtype;
};

struct RowMaxParams {
  const float* x;
  const float* total;
  float* c;  // (M,) the row's largest z, where the sum in `total` is not trusted
  int64_t rows, stride_x;
  int vocab;
  bool capped;
  Epilogue epilogue;
};

struct RowLogitsParams {
  const float* x;
  float* sum;        // (M,) of the row's z
  int64_t* top_ids;  // (M,) where the first of its largest z is
  int64_t rows, stride_x;
  int vocab;
  bool capped;
  Epilogue epilogue;
};

struct LogitGradientParams {
  const float* z;  // (M, V) finished logits; `out` may be the same memory
  void* out;       // (M, V)
  const int64_t* ids;
  const float *lse, *g;              // (M,)
  const float *g_entropy, *entropy;  // (M,), or both null
  const float* even;                 // (M,) or null
  int64_t rows, stride_z, stride_out;
  int vocab;
  bool capped;
  float scale, inv_post;
  DType out_dtype;
};

struct TargetLogitsParams {
  const void* h;       // (M, H), fp32 or the weight's dtype
  const void* weight;  // (V, H)
  const int64_t* ids;
  float* out;  // (M,)
  int64_t rows, vocab, stride_h, stride_w;
  int hidden;
  DType h_dtype, weight_dtype;
};

struct FixTargetsParams {
  void* e;  // (M, V)
  const int64_t* ids;
  const float* values;  // (M, per_row), like ids
  int64_t rows, per_row, vocab, stride_e;
  DType e_dtype;
};

constexpr int kEnergyColumns = 256;  // cuda_impl.ENERGY_COLUMNS

struct EnergyParams {
  const void* e;   // (M, V)
  const float* v;  // (M,)
  float* columns;  // (ceil(M / strip), V) sum_i (v_i e_ij)^2, by strips of rows
  float* parts;    // (ceil(V / kEnergyColumns), M) the same along rows, by strips of columns
  int64_t rows, vocab, stride_e, strip;
  DType e_dtype;
};

struct ScaleParams {
  void* x;              // (n,)
  const float* factor;  // (1,)
  int64_t n;
  DType x_dtype;
};

// config.TOKEN_SUMS, in its order.
enum TokenSum {
  kReweightedPos, kReweightedNeg, kActivePos, kActiveNeg, kDeltaPos, kDeltaNeg, kDeltaSquared,
  kWeightPos, kWeightNeg, kWeightClipLow, kWeightClipHigh, kRatioClipLow, kRatioClipHigh,
  kRatioClipDual, kKl, kEntropy, kPolicyKl, kTokenSums
};

// The numbers of RLSDLossConfig.token_bounds, in its order.
template <typename T>
struct TokenBounds {
  T weight_low, weight_high, blame_low, blame_high, praise_high, ratio_low, ratio_high, ratio_dual,
      beta;
};

struct TokenFlags {
  bool has_teacher, has_ref, has_kl_loss, delta_from_old, negative_only;
};

struct RlsdParams {
  const float *log_probs, *advantages, *loss_weights;           // (M,)
  const float *teacher, *old_log_probs, *ref, *entropy;         // (M,) or null
  const bool* mask;                                             // (M,) or null
  const float* lambda;                                          // (1,)
  float* loss;                                                  // (1,)
  float* g;                                                     // (M,)
  double* sums;                                                 // (kTokenSums,)
  int64_t rows;
  TokenBounds<float> bounds;
  TokenFlags flags;
};

const char* exp_rows(const ExpParams& params, void* stream);
const char* row_max(const RowMaxParams& params, void* stream);
const char* row_logits(const RowLogitsParams& params, void* stream);
const char* logit_gradient(const LogitGradientParams& params, void* stream);
const char* target_logits(const TargetLogitsParams& params, void* stream);
const char* fix_targets(const FixTargetsParams& params, void* stream);
const char* energies(const EnergyParams& params, void* stream);
const char* scale(const ScaleParams& params, void* stream);
const char* token_rows(const RlsdParams& params, void* stream);

}  // namespace rlsd
