// The GPU's side: warps as teams. Compiled by NVRTC, without any header but these.
#pragma once
#include "settling.h"

namespace shardopt {

template <class Member>
struct Warp {
  template <class Other>
  using Of = Warp<Other>;
  Member member;
  template <class F>
  __device__ __forceinline__ void lanes(F&& f) {
    f(member, lane());
  }
  struct Look {
    Member& member;
    template <int WIDTH, class Of>
    __device__ __forceinline__ u32 at(Of&& of, u32 i) const {
      return __shfl_sync(~0u, of(member), (int)i, WIDTH);
    }
  };
  template <class F>
  __device__ __forceinline__ void looking(F&& f) {
    f(member, Look{member});
  }
  __device__ static int lane() {  // asked anew every time, which costs no register
    int x;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
    return x & 31;
  }
  template <int WIDTH, class At, class Op>
  __device__ __forceinline__ void meet(At&& at, Op op) {
    u32& x = at(member);
    if constexpr (WIDTH == 32 && __CUDA_ARCH__ >= 800)
      x = all(x, op);
    else
      UNROLL for (int offset = WIDTH / 2; offset; offset /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, offset));
  }
  template <class At>
  __device__ __forceinline__ void sum(At&& at) {
    double& x = at(member);
    UNROLL for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  }
  template <class F>
  __device__ __forceinline__ bool any(F&& f) {
    return __any_sync(~0u, f(member));
  }
  template <class F>
  __device__ __forceinline__ void once(F&& f) {
    __syncwarp();
    if (lane() == 0) f();
    __syncwarp();
  }
#if __CUDA_ARCH__ >= 800
  __device__ static u32 all(u32 x, Larger) { return __reduce_max_sync(~0u, x); }
  __device__ static u32 all(u32 x, Smaller) { return __reduce_min_sync(~0u, x); }
#endif
};

template <class Member, class Shared>
struct Cta {
  Shared& shared;
  template <class F>
  __device__ __forceinline__ void once(F&& f) {
    __syncthreads();  // the span before is done with
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void warps(F&& f) {
    Warp<Member> team;
    f((int)(threadIdx.x / 32u), team);
  }
  template <class F>
  __device__ __forceinline__ void turn(int warp, F&& f) {
    for (int i = 0; i < shardopt::warps; i++) {
      if (i == warp) f();
      __syncthreads();
    }
  }
};

}  // namespace shardopt

// A kernel by its name, what it is told and its type, which may hold commas. SHARDOPT_CTAS_*: how many CTAs of 256
// threads a processor must hold; chosen by shardopt/kernels/cuda.py.
#define SHARDOPT_CUDA_TOLD(NAME, TOLD, ...)                                 \
  extern "C" __global__ void __launch_bounds__(256, SHARDOPT_CTAS_##NAME)   \
      shardopt_##NAME(const __grid_constant__ TOLD launch) {                \
    using Kernel = __VA_ARGS__;                                             \
    __shared__ Kernel::Shared shared;                                       \
    shardopt::Cta<Kernel::Member, Kernel::Shared> cta{shared};              \
    Kernel::run(cta, launch, blockIdx.x);                                   \
  }
#define SHARDOPT_CUDA(NAME, ...) SHARDOPT_CUDA_TOLD(NAME, shardopt::Packed, __VA_ARGS__)
extern "C" __global__ void __launch_bounds__(256)
    shardopt_advance(const __grid_constant__ shardopt::Counters launch) {
  shardopt::advance(launch, (long long)blockIdx.x * 256 + threadIdx.x);
}
