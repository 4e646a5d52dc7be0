// The GPU's kernels on a CPU: 32 members a warp, every phase looped over the lanes; for tests without a GPU.
#pragma once
#define SHARDOPT_REGISTERS

inline long long misaligned = 0;  // moves that would be an error on a GPU

template <int BYTES>
struct alignas(BYTES) Moved {
  char bytes[BYTES];
  void operator=(const Moved& from) {
    unsigned long long addresses = (unsigned long long)this | (unsigned long long)&from;
    asm("" : "+r"(addresses));  // the compiler may not conclude from the type that they are aligned
    misaligned += addresses % BYTES != 0;
    __builtin_memcpy(bytes, (const char*)&from, BYTES);
  }
};
using uint4 = Moved<16>;
using uint2 = Moved<8>;
using uint1 = Moved<4>;
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
#define SHARDOPT_EMULATED(KEY)                                                                 \
  extern "C" void shardopt_step(const void* launch, long long ctas) {                          \
    while (ctas-- > 0) {                                                                       \
      shardopt::EmulatedCta<KEY> cta;                                                          \
      shardopt::step<KEY>(cta, *(const shardopt::Packed*)launch, ctas);                        \
    }                                                                                          \
  }                                                                                            \
  extern "C" void shardopt_advance(const void* launch, long long ctas) {                       \
    for (long long i = 0; i < ctas * 256; i++)                                                 \
      shardopt::advance(*(const shardopt::Counters*)launch, i);                                \
  }                                                                                            \
  extern "C" long long shardopt_misaligned() { return misaligned; }
