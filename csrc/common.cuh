// 16-byte vector access at any alignment, reductions in a fixed order, and the launch.
//
// A row is streamed as a scalar head up to the first 16-byte boundary, vectors with 64 bytes of
// loads per thread in flight, and a scalar tail: nothing outside [0, n) is touched. Every
// thread's share and the order of every sum depend on n and the alignment alone, so results repeat
// bitwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "rlsd.h"

namespace rlsd {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kPerVector = kVectorBytes / int(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename T>
struct alignas(kVectorBytes) Vector {
  T at[kPerVector<T>];
};

__device__ __forceinline__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// kN elements from p as fp32; `wide`: p lies on a 16-byte boundary and kN fills whole vectors.
template <int kN, typename T>
__device__ __forceinline__ void load(const T* p, bool wide, float (&out)[kN]) {
  constexpr int kStep = kPerVector<T>;
  if constexpr (kN % kStep == 0) {
    if (wide) {
#pragma unroll
      for (int i = 0; i < kN / kStep; ++i) {
        const Vector<T> v = reinterpret_cast<const Vector<T>*>(p)[i];
#pragma unroll
        for (int k = 0; k < kStep; ++k) out[i * kStep + k] = to_float(v.at[k]);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) out[k] = to_float(p[k]);
}

template <int kN, typename T>
__device__ __forceinline__ void store(T* p, bool wide, const float (&in)[kN]) {
  constexpr int kStep = kPerVector<T>;
  if constexpr (kN % kStep == 0) {
    if (wide) {
#pragma unroll
      for (int i = 0; i < kN / kStep; ++i) {
        Vector<T> v;
#pragma unroll
        for (int k = 0; k < kStep; ++k) v.at[k] = from_float<T>(in[i * kStep + k]);
        reinterpret_cast<Vector<T>*>(p)[i] = v;
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kN; ++k) p[k] = from_float<T>(in[k]);
}

// Elements before the first 16-byte boundary of a row of n.
__device__ __forceinline__ int head_of(const float* row, int n) {
  const int past = int(reinterpret_cast<uintptr_t>(row) % kVectorBytes) / int(sizeof(float));
  const int head = past == 0 ? 0 : kPerVector<float> - past;
  return head < n ? head : n;
}

// body(j, v) for all of row[0, n): v is float[kLanes] of elements j, j + 1, ... in the vectors, and
// float[1] in head and tail. The block's threads share the row.
template <int kThreads, int kLanes, typename Body>
__device__ __forceinline__ void stream_row(const float* row, int n, Body body) {
  constexpr int kInFlight = 16 / kLanes;
  constexpr int kStep = kThreads * kLanes;
  const int head = head_of(row, n);
  const int end = head + (n - head) / kLanes * kLanes;
  const auto one = [&](int j) {
    const float v[1] = {row[j]};
    body(j, v);
  };
  const int thread = int(threadIdx.x);
  if (thread < head) one(thread);
  for (int j = head + thread * kLanes; j < end; j += kInFlight * kStep) {
    float v[kInFlight][kLanes];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (j + i * kStep < end) load(row + j + i * kStep, true, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (j + i * kStep < end) body(j + i * kStep, v[i]);
    }
  }
  if (end + thread < n) one(end + thread);  // the tail is shorter than a vector
}

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {  // a NaN loses: the row's sum is NaN already
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// x of all threads combined, in thread 0. Lanes fold by halves, then warps in order.
template <int kThreads, typename T, typename Op>
__device__ __forceinline__ T block_reduce(T x, Op op) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T by_warp[kWarps];
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x = op(x, __shfl_down_sync(0xffffffffu, x, d));
  __syncthreads();  // an earlier call may still be reading by_warp
  if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 1; i < kWarps; ++i) x = op(x, by_warp[i]);
  }
  return x;
}

// Null or CUDA's sentence. No blocks is nothing to do, which CUDA itself calls an error.
template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, const Params& params,
                   void* stream) {
  if (blocks == 0) return nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rlsd
