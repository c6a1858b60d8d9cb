// Checks and registration as torch.ops.rlsd_cuda.*, in PyTorch's stable ABI: one build serves
// torch 2.10 and later. The only file that knows torch; the ops write into tensors they are given.
//
// With USE_CUDA the ops take CUDA tensors and run on the current stream of their device. Without,
// they take CPU tensors: that is how the tests run the kernels where there is no GPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <optional>

#include "rlsd.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The tensor's device made current, and its current stream.
class Launch {
 public:
#ifdef USE_CUDA
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
#else
  explicit Launch(const Tensor&) {}
#endif

  void operator()(const char* error) const {
    STD_TORCH_CHECK(error == nullptr, "A kernel of rlsd_kernels could not be launched: ", error);
  }
  void* stream() const { return stream_; }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

rlsd::DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return rlsd::DType::kFloat32;
    case ScalarType::BFloat16: return rlsd::DType::kBFloat16;
    case ScalarType::Half: return rlsd::DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be fp32, bf16 or fp16.");
  }
  return rlsd::DType::kFloat32;
}

void check_device(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), name,
      " is on another device than the first argument.");
}

// (rows, columns) whose rows are contiguous.
void check_matrix(const Tensor& x, const Tensor& like, int64_t rows, int64_t columns,
                  const char* name) {
  check_device(x, like, name);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name,
                  " must have shape (", rows, ", ", columns, ").");
  STD_TORCH_CHECK(columns <= 1 || x.stride(1) == 1, name, " must have contiguous rows.");
}

// Data of a contiguous vector of n elements.
template <typename T>
T* vector_data(const Tensor& x, const Tensor& like, int64_t n, ScalarType dtype,
               const char* name) {
  check_device(x, like, name);
  STD_TORCH_CHECK(x.numel() == n && x.is_contiguous() && x.scalar_type() == dtype, name,
                  " must be contiguous with ", n, " elements of the kernel's dtype.");
  return static_cast<T*>(x.data_ptr());
}

float* floats(const Tensor& x, const Tensor& like, int64_t n, const char* name) {
  return vector_data<float>(x, like, n, ScalarType::Float, name);
}

float* floats(const MaybeTensor& x, const Tensor& like, int64_t n, const char* name) {
  return x.has_value() ? floats(*x, like, n, name) : nullptr;
}

// Rows are blocks of the grid, and columns plus one step of a block count in 32 bits.
void check_sizes(int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows <= INT_MAX && columns <= INT_MAX - 65536,
                  "Rows and columns must stay below 2^31, but got ", rows, " x ", columns, ".");
}

const float* logits_data(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float,
                  "Logits must be an fp32 matrix.");
  check_matrix(x, x, x.size(0), x.size(1), "The matrix of logits");
  check_sizes(x.size(0), x.size(1));
  return static_cast<const float*>(x.data_ptr());
}

void exp_rows(const Tensor& x, const MaybeTensor& bias, const Tensor& c, const Tensor& s,
              const MaybeTensor& t, const MaybeTensor& out, const MaybeTensor& total, double pre,
              double post, bool capped, int64_t store) {
  rlsd::ExpParams p = {};
  p.x = logits_data(x);
  p.rows = x.size(0), p.vocab = int(x.size(1)), p.stride_x = x.stride(0);
  p.c = floats(c, x, p.rows, "c"), p.s = floats(s, x, p.rows, "s");
  p.t = floats(t, x, p.rows, "t"), p.total = floats(total, x, p.rows, "total");
  p.capped = capped;
  p.epilogue = {floats(bias, x, p.vocab, "bias"), float(pre), float(post)};
  STD_TORCH_CHECK(store >= 0 && store <= 2, "store must be 0, 1 or 2, but got ", store, ".");
  p.store = static_cast<rlsd::Store>(store);
  if (p.store != rlsd::Store::kNone) {
    STD_TORCH_CHECK(out.has_value(), "There must be an out to store in.");
    check_matrix(*out, x, p.rows, p.vocab, "out");
    p.out = out->data_ptr(), p.stride_out = out->stride(0), p.out_dtype = dtype_of(*out, "out");
    STD_TORCH_CHECK(p.store != rlsd::Store::kLogits || p.out_dtype == rlsd::DType::kFloat32,
                    "Finished logits are stored in fp32.");
  }
  const Launch launch(x);
  launch(rlsd::exp_rows(p, launch.stream()));
}

void row_max(const Tensor& x, const MaybeTensor& bias, const Tensor& c, const Tensor& total,
             double pre, double post, bool capped) {
  rlsd::RowMaxParams p = {};
  p.x = logits_data(x);
  p.rows = x.size(0), p.vocab = int(x.size(1)), p.stride_x = x.stride(0);
  p.c = floats(c, x, p.rows, "c"), p.total = floats(total, x, p.rows, "total");
  p.capped = capped;
  p.epilogue = {floats(bias, x, p.vocab, "bias"), float(pre), float(post)};
  const Launch launch(x);
  launch(rlsd::row_max(p, launch.stream()));
}

void row_logits(const Tensor& x, const MaybeTensor& bias, const Tensor& sum, const Tensor& top_ids,
                double pre, double post, bool capped) {
  rlsd::RowLogitsParams p = {};
  p.x = logits_data(x);
  p.rows = x.size(0), p.vocab = int(x.size(1)), p.stride_x = x.stride(0);
  p.sum = floats(sum, x, p.rows, "sum");
  p.top_ids = vector_data<int64_t>(top_ids, x, p.rows, ScalarType::Long, "top_ids");
  p.capped = capped;
  p.epilogue = {floats(bias, x, p.vocab, "bias"), float(pre), float(post)};
  const Launch launch(x);
  launch(rlsd::row_logits(p, launch.stream()));
}

void logit_gradient(const Tensor& z, const Tensor& out, const Tensor& ids, const Tensor& lse,
                    const Tensor& g, const MaybeTensor& g_entropy, const MaybeTensor& entropy,
                    const MaybeTensor& even, double scale, double inv_post, bool capped) {
  rlsd::LogitGradientParams p = {};
  p.z = logits_data(z);
  p.rows = z.size(0), p.vocab = int(z.size(1)), p.stride_z = z.stride(0);
  check_matrix(out, z, p.rows, p.vocab, "out");
  p.out = out.data_ptr(), p.stride_out = out.stride(0), p.out_dtype = dtype_of(out, "out");
  p.ids = vector_data<int64_t>(ids, z, p.rows, ScalarType::Long, "ids");
  p.lse = floats(lse, z, p.rows, "lse"), p.g = floats(g, z, p.rows, "g");
  STD_TORCH_CHECK(g_entropy.has_value() == entropy.has_value(),
                  "g_entropy and entropy come together.");
  p.g_entropy = floats(g_entropy, z, p.rows, "g_entropy");
  p.entropy = floats(entropy, z, p.rows, "entropy"), p.even = floats(even, z, p.rows, "even");
  p.capped = capped, p.scale = float(scale), p.inv_post = float(inv_post);
  const Launch launch(z);
  launch(rlsd::logit_gradient(p, launch.stream()));
}

void target_logits(const Tensor& h, const Tensor& weight, const Tensor& ids, const Tensor& out) {
  STD_TORCH_CHECK(h.dim() == 2 && weight.dim() == 2, "h and weight must be matrices.");
  rlsd::TargetLogitsParams p = {};
  p.rows = h.size(0), p.hidden = int(h.size(1)), p.vocab = weight.size(0);
  check_sizes(p.rows, h.size(1));
  check_matrix(h, h, p.rows, h.size(1), "h");
  check_matrix(weight, h, p.vocab, h.size(1), "weight");
  p.h = h.data_ptr(), p.stride_h = h.stride(0), p.h_dtype = dtype_of(h, "h");
  p.weight = weight.data_ptr(), p.stride_w = weight.stride(0);
  p.weight_dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(p.h_dtype == rlsd::DType::kFloat32 || p.h_dtype == p.weight_dtype,
                  "h must be fp32 or have the weight's dtype.");
  p.ids = vector_data<int64_t>(ids, h, p.rows, ScalarType::Long, "ids");
  p.out = floats(out, h, p.rows, "out");
  const Launch launch(h);
  launch(rlsd::target_logits(p, launch.stream()));
}

void fix_targets(const Tensor& e, const Tensor& ids, const Tensor& values) {
  STD_TORCH_CHECK(e.dim() == 2, "e must be a matrix.");
  rlsd::FixTargetsParams p = {};
  p.rows = e.size(0), p.vocab = e.size(1);
  check_matrix(e, e, p.rows, p.vocab, "e");
  check_sizes(p.rows, p.vocab);
  p.e = e.data_ptr(), p.stride_e = e.stride(0), p.e_dtype = dtype_of(e, "e");
  p.per_row = ids.dim() == 2 ? ids.size(1) : 1;
  p.ids = vector_data<int64_t>(ids, e, p.rows * p.per_row, ScalarType::Long, "ids");
  p.values = floats(values, e, p.rows * p.per_row, "values");
  const Launch launch(e);
  launch(rlsd::fix_targets(p, launch.stream()));
}

void energies(const Tensor& e, const Tensor& v, const Tensor& columns, const Tensor& parts,
              int64_t strip) {
  STD_TORCH_CHECK(e.dim() == 2, "e must be a matrix.");
  rlsd::EnergyParams p = {};
  p.rows = e.size(0), p.vocab = e.size(1);
  check_matrix(e, e, p.rows, p.vocab, "e");
  check_sizes(p.rows, p.vocab);
  p.e = e.data_ptr(), p.stride_e = e.stride(0), p.e_dtype = dtype_of(e, "e");
  p.v = floats(v, e, p.rows, "v");
  STD_TORCH_CHECK(strip > 0, "A strip must have a row.");
  p.strip = strip;
  p.columns = floats(columns, e, (p.rows + strip - 1) / strip * p.vocab, "columns");
  const int64_t strips = (p.vocab + rlsd::kEnergyColumns - 1) / rlsd::kEnergyColumns;
  p.parts = floats(parts, e, strips * p.rows, "parts");
  const Launch launch(e);
  launch(rlsd::energies(p, launch.stream()));
}

void scale(const Tensor& x, const Tensor& factor) {
  rlsd::ScaleParams p = {};
  p.n = x.numel(), p.x_dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous.");
  p.x = x.data_ptr(), p.factor = floats(factor, x, 1, "factor");
  const Launch launch(x);
  launch(rlsd::scale(p, launch.stream()));
}

void token_rows(const Tensor& log_probs, const Tensor& advantages, const Tensor& loss_weights,
                const MaybeTensor& teacher, const MaybeTensor& old_log_probs,
                const MaybeTensor& ref, const MaybeTensor& mask, const MaybeTensor& entropy,
                const Tensor& lambda, const Tensor& loss, const Tensor& g, const Tensor& sums,
                double weight_low, double weight_high, double blame_low, double blame_high,
                double praise_high, double ratio_low, double ratio_high, double ratio_dual,
                double beta, bool delta_from_old, bool negative_only) {
  const int64_t n = log_probs.numel();
  const auto column = [&](const auto& x, const char* name) {
    return floats(x, log_probs, n, name);
  };
  rlsd::RlsdParams p = {};
  p.rows = n;
  p.log_probs = column(log_probs, "log_probs"), p.advantages = column(advantages, "advantages");
  p.loss_weights = column(loss_weights, "loss_weights");
  p.teacher = column(teacher, "teacher"), p.old_log_probs = column(old_log_probs, "old");
  p.ref = column(ref, "ref"), p.entropy = column(entropy, "entropy");
  if (mask.has_value()) p.mask = vector_data<bool>(*mask, log_probs, n, ScalarType::Bool, "mask");
  p.lambda = floats(lambda, log_probs, 1, "rlsd_lambda");
  p.loss = floats(loss, log_probs, 1, "loss"), p.g = column(g, "g");
  p.sums = vector_data<double>(sums, log_probs, rlsd::kTokenSums, ScalarType::Double, "sums");
  p.bounds = {float(weight_low), float(weight_high), float(blame_low),
              float(blame_high), float(praise_high), float(ratio_low),
              float(ratio_high), float(ratio_dual),  float(beta)};
  p.flags.has_teacher = teacher.has_value();
  p.flags.has_ref = ref.has_value();
  p.flags.has_kl_loss = beta > 0;
  p.flags.delta_from_old = delta_from_old;
  p.flags.negative_only = negative_only;
  const Launch launch(log_probs);
  launch(rlsd::token_rows(p, launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY(rlsd_cuda, m) {
  m.def(
      "exp_rows(Tensor x, Tensor? bias, Tensor c, Tensor(a!) s, Tensor(b!)? t, Tensor(c!)? out, "
      "Tensor? total, float pre, float post, bool capped, int store) -> ()");
  m.def(
      "row_max(Tensor x, Tensor? bias, Tensor(a!) c, Tensor total, float pre, float post, "
      "bool capped) -> ()");
  m.def(
      "row_logits(Tensor x, Tensor? bias, Tensor(a!) sum, Tensor(b!) top_ids, float pre, "
      "float post, bool capped) -> ()");
  m.def(
      "logit_gradient(Tensor z, Tensor(a!) out, Tensor ids, Tensor lse, Tensor g, "
      "Tensor? g_entropy, Tensor? entropy, Tensor? even, float scale, float inv_post, "
      "bool capped) -> ()");
  m.def("target_logits(Tensor h, Tensor weight, Tensor ids, Tensor(a!) out) -> ()");
  m.def("fix_targets(Tensor(a!) e, Tensor ids, Tensor values) -> ()");
  m.def("energies(Tensor e, Tensor v, Tensor(a!) columns, Tensor(b!) parts, int strip) -> ()");
  m.def("scale(Tensor(a!) x, Tensor factor) -> ()");
  m.def(
      "token_rows(Tensor log_probs, Tensor advantages, Tensor loss_weights, Tensor? teacher, "
      "Tensor? old, Tensor? ref, Tensor? mask, Tensor? entropy, Tensor rlsd_lambda, "
      "Tensor(a!) loss, Tensor(b!) g, Tensor(c!) sums, float weight_low, float weight_high, "
      "float blame_low, float blame_high, float praise_high, float ratio_low, float ratio_high, "
      "float ratio_dual, float beta, bool delta_from_old, bool negative_only) -> ()");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(rlsd_cuda, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rlsd_cuda, CPU, m) {
#endif
  m.impl("exp_rows", TORCH_BOX(&exp_rows));
  m.impl("row_max", TORCH_BOX(&row_max));
  m.impl("row_logits", TORCH_BOX(&row_logits));
  m.impl("logit_gradient", TORCH_BOX(&logit_gradient));
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("fix_targets", TORCH_BOX(&fix_targets));
  m.impl("energies", TORCH_BOX(&energies));
  m.impl("scale", TORCH_BOX(&scale));
  m.impl("token_rows", TORCH_BOX(&token_rows));
}
