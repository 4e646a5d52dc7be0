// The GPU's kernels on a CPU: 32 members a warp, every phase looped over the lanes; for tests without a GPU.
#pragma once
#define SHARDOPT_REGISTERS

inline long long misaligned = 0;  // moves that would be an error on a GPU
inline long long calm = 0;        // tiles that were, of those that looked it

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
#include "settling.h"

namespace shardopt {

template <class Member>
struct EmulatedWarp {
  template <class Other>
  using Of = EmulatedWarp<Other>;
  Member members[32];
  template <class F>
  void lanes(F&& f) {
    for (int lane = 0; lane < 32; lane++) f(members[lane], lane);
  }
  struct Look {
    EmulatedWarp& team;
    int lane;
    template <int WIDTH, class Of>
    u32 at(Of&& of, u32 i) const {
      return of(team.members[(lane & ~(WIDTH - 1)) | (int)(i & (WIDTH - 1))]);
    }
  };
  template <class F>
  void looking(F&& f) {
    for (int lane = 0; lane < 32; lane++) f(members[lane], Look{*this, lane});
  }
  template <int WIDTH, class At, class Op>
  void meet(At&& at, Op) {
    for (int offset = WIDTH / 2; offset; offset /= 2)
      shuffle<u32>(at, offset, [](u32 mine, u32 theirs) { return Op::of(mine, theirs); });
  }
  template <class F>
  bool any(F&& f) {
    bool found = false;
    for (auto& member : members) found = f(member) || found;
    calm += !found;
    return found;
  }
  template <class F>
  void once(F&& f) {
    f();
  }
  template <class At>
  void sum(At&& at) {
    for (int offset = 16; offset; offset /= 2)
      shuffle<double>(at, offset, [](double mine, double theirs) { return mine + theirs; });
  }
  template <class T, class At, class Op>
  void shuffle(At&& at, int offset, Op op) {  // all lanes read before any writes
    T theirs[32];
    for (int lane = 0; lane < 32; lane++) theirs[lane] = at(members[lane ^ offset]);
    for (int lane = 0; lane < 32; lane++) at(members[lane]) = op(at(members[lane]), theirs[lane]);
  }
};

// Its warps run one after another, so that whoever has a turn has it at once.
template <class Member, class Shared>
struct EmulatedCta {
  Shared shared;
  template <class F>
  void once(F&& f) {
    f();
  }
  template <class F>
  void warps(F&& f) {
    for (int warp = 0; warp < shardopt::warps; warp++) {
      EmulatedWarp<Member> team;
      f(warp, team);
    }
  }
  template <class F>
  void turn(int, F&& f) {
    f();
  }
};

}  // namespace shardopt

// What a driver does with a launch: the packed parameter, for every CTA; the last first, since none may wait for one.
#define SHARDOPT_EMULATED_TOLD(NAME, TOLD, ...)                              \
  extern "C" void shardopt_##NAME(const void* launch, long long ctas) {      \
    using Kernel = __VA_ARGS__;                                              \
    while (ctas-- > 0) {                                                     \
      shardopt::EmulatedCta<Kernel::Member, Kernel::Shared> cta;             \
      Kernel::run(cta, *(const TOLD*)launch, ctas);                          \
    }                                                                        \
  }
#define SHARDOPT_EMULATED(NAME, ...) SHARDOPT_EMULATED_TOLD(NAME, shardopt::Packed, __VA_ARGS__)
extern "C" void shardopt_advance(const void* launch, long long ctas) {
  for (long long i = 0; i < ctas * 256; i++) shardopt::advance(*(const shardopt::Counters*)launch, i);
}
extern "C" long long shardopt_misaligned() { return misaligned; }
extern "C" long long shardopt_calm() { return calm; }
