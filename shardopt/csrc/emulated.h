// The GPU's kernels on a CPU: 32 members a warp, every phase looped over the lanes; for tests without a GPU.
#pragma once
#define SHARDOPT_REGISTERS
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
#include "warp.h"

namespace shardopt {

template <class K>
struct EmulatedWarp {
  Lane<K> members[32];
  template <class F>
  void lanes(F&& f) {
    for (int lane = 0; lane < 32; lane++) f(members[lane], lane);
  }
  template <int WIDTH, class At, class Op>
  void meet(At&& at, Op) {
    for (int offset = WIDTH / 2; offset; offset /= 2) {  // all lanes read before any writes, as a shuffle does
      u32 theirs[32];
      for (int lane = 0; lane < 32; lane++) theirs[lane] = at(members[lane ^ offset]);
      for (int lane = 0; lane < 32; lane++) at(members[lane]) = Op::of(at(members[lane]), theirs[lane]);
    }
  }
};

template <class K>
struct EmulatedCta {
  Known<K> known;
  template <class F>
  void once(F&& f) {
    f();
  }
  template <class F>
  void warps(F&& f) {
    for (int warp = 0; warp < shardopt::warps; warp++) {
      EmulatedWarp<K> team;
      f(warp, team);
    }
  }
};

}  // namespace shardopt

// What a driver does with a launch: the packed parameter, for every CTA; the last first, since none may wait for one.
#define SHARDOPT_EMULATED(KEY)                                                        \
  extern "C" void shardopt_step(const void* launch, long long ctas) {                 \
    while (ctas-- > 0) {                                                              \
      shardopt::EmulatedCta<KEY> cta;                                                 \
      shardopt::step<KEY>(cta, *(const shardopt::Packed*)launch, ctas);               \
    }                                                                                 \
  }                                                                                   \
  extern "C" void shardopt_advance(const void* launch, long long ctas) {              \
    for (long long i = 0; i < ctas * 256; i++)                                        \
      shardopt::advance(*(const shardopt::Counters*)launch, i);                       \
  }
