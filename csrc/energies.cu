// Energies of D = v e: squares summed down each column (V,) and along each row.
//
// One read of e, 2 or 4 bytes per entry. A block takes kEnergyColumns columns of `strip` rows, a warp
// a row of them at a time, so that column sums stay in registers; strips of columns (`parts`) and of
// rows (`columns`) are added up by the caller. Every order is fixed by the sizes: results repeat
// bitwise.
#include "common.cuh"
#include "static_switch.h"

namespace rlsd {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kEnergyColumns / kWarp;
// Blocks per processor whose registers suffice without spills: on an H100 2048 rows take 0.34 ms
// with 4, 0.50 with the 2 that the compiler would allow.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 3;
#endif
constexpr int kInFlight = 4;  // rows per warp: 64 bytes of loads of 16-bit entries per thread

__host__ __device__ __forceinline__ int64_t strips_of(const EnergyParams& p) {
  return (p.rows + p.strip - 1) / p.strip;
}

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocks) rlsd_energies_kernel(const EnergyParams p) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t block = blockIdx.x / strips_of(p), strip = blockIdx.x % strips_of(p);
  const int64_t j = block * kEnergyColumns + lane * kLanes;
  const E* e = static_cast<const E*>(p.e) + j;
  const bool whole = j + kLanes <= p.vocab;
  const bool wide = whole && is_aligned(e) && p.stride_e % kPerVector<E> == 0;
  float* parts = p.parts + block * p.rows;
  const int64_t begin = strip * p.strip;
  const int64_t end = begin + p.strip < p.rows ? begin + p.strip : p.rows;
  float total[kLanes] = {};
  for (int64_t first = begin; first < end; first += kWarps * kInFlight) {
    float x[kInFlight][kLanes] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t row = first + i * kWarps + warp;
      if (row >= end) continue;
      const E* here = e + row * p.stride_e;
      if (whole) {
        load(here, wide, x[i]);
      } else {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          if (j + k < p.vocab) x[i][k] = to_float(here[k]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t row = first + i * kWarps + warp;
      const float v = row < end ? p.v[row] : 0.0f;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        const float d = x[i][k] * v, squared = j + k < p.vocab ? d * d : 0.0f;
        total[k] += squared;
        sum += squared;
      }
#pragma unroll
      for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, d);
      if (lane == 0 && row < end) parts[row] = sum;
    }
  }
  __shared__ float by_warp[kWarps][kEnergyColumns];
#pragma unroll
  for (int k = 0; k < kLanes; ++k) by_warp[warp][lane * kLanes + k] = total[k];
  __syncthreads();
  const int64_t column = block * kEnergyColumns + threadIdx.x;
  if (column >= p.vocab) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += by_warp[i][threadIdx.x];
  p.columns[strip * p.vocab + column] = sum;
}

}  // namespace

const char* energies(const EnergyParams& p, void* stream) {
  static_assert(kThreads == kEnergyColumns, "a thread finishes a column");
  const int64_t blocks = (p.vocab + kEnergyColumns - 1) / kEnergyColumns * strips_of(p);
  return dtype_switch(p.e_dtype, [&](auto e) {
    using E = typename decltype(e)::type;
    return launch(rlsd_energies_kernel<E>, blocks, kThreads, p, stream);
  });
}

}  // namespace rlsd
