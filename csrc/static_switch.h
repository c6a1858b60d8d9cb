// Runtime flags and dtypes to template arguments: f gets a value whose type carries the choice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "rlsd.h"

namespace rlsd {

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
auto bool_switch(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

template <typename F>
auto dtype_switch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(Type<__nv_bfloat16>{});
    case DType::kFloat16: return f(Type<__half>{});
    default: return f(Type<float>{});
  }
}

}  // namespace rlsd
