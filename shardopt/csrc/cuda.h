// The GPU's side: warps as teams. Compiled by NVRTC, without any header but these.
#pragma once
#include "warp.h"

namespace shardopt {

template <class K>
struct Warp {
  Lane<K> member;
  template <class F>
  __device__ __forceinline__ void lanes(F&& f) {
    f(member, (int)threadIdx.x % 32);
  }
  template <int WIDTH, class At, class Op>
  __device__ __forceinline__ void meet(At&& at, Op op) {
    u32& x = at(member);
    if constexpr (WIDTH == 32 && __CUDA_ARCH__ >= 800)
      x = all(x, op);
    else
      UNROLL for (int offset = WIDTH / 2; offset; offset /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, offset));
  }
#if __CUDA_ARCH__ >= 800
  __device__ static u32 all(u32 x, Larger) { return __reduce_max_sync(~0u, x); }
  __device__ static u32 all(u32 x, Smaller) { return __reduce_min_sync(~0u, x); }
#endif
};

template <class K>
struct Cta {
  Known<K>& known;  // in shared memory
  template <class F>
  __device__ __forceinline__ void once(F&& f) {
    __syncthreads();  // the span before is done with
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void warps(F&& f) {
    Warp<K> team;
    f((int)threadIdx.x / 32, team);
  }
};

}  // namespace shardopt

// SHARDOPT_CTAS: how many CTAs of 256 threads a processor must hold; chosen by shardopt/kernels/cuda.py.
#define SHARDOPT_CUDA(KEY)                                                                     \
  extern "C" __global__ void __launch_bounds__(256, SHARDOPT_CTAS)                             \
      shardopt_step(const __grid_constant__ shardopt::Packed launch) {                         \
    __shared__ shardopt::Known<KEY> known;                                                     \
    shardopt::Cta<KEY> cta{known};                                                             \
    shardopt::step<KEY>(cta, launch, blockIdx.x);                                              \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                            \
      shardopt_advance(const __grid_constant__ shardopt::Counters launch) {                    \
    shardopt::advance(launch, (long long)blockIdx.x * 256 + threadIdx.x);                      \
  }
