// What a warp knows of a run of tiles whose numbers it holds in registers, and how it rounds parameters there.
#pragma once
#include "calm.h"
#include "chunk.h"

namespace shardopt {

// How parameters are rounded on their way to memory. Where they are calm, stochastic rounding is an addition.
template <class P, bool ADDED>
struct Rounded {
  static constexpr int at = 0;  // the first byte of a rounded number in its word
  using Memory = P;
};
struct Added : BF16 {
  using T = u32;
  HD static u32 store(float x, u32 noise) {  // NaN, which has the largest bits there are, stays NaN
    return signed_larger(bits(x) + (noise & 0xffffu), bits(x));
  }
};
template <>
struct Rounded<BF16, true> {
  static constexpr int at = 2;
  using Memory = Added;
};

// Whether tiles of a key are held by `Held`: by tile.h where they are wider, or walked more than once.
template <class K>
constexpr bool holds = in_registers && K::rounds == 0 && !K::stored && !K::factors && K::tile == 256;

// What a warp knows of a run of tiles: in shared memory, since registers are scarce; in pieces of 16 bytes.
template <class K>
struct alignas(16) Run {
  static constexpr int slots = K::slots;
  struct alignas(16) Draw {
    u32 key;
    Steps steps;
  };
  void* p;
  const void* g;
  void* codes[slots + 1];
  float* numbers[2][slots + 1];
  Draw draws[slots + 1];  // of every stream
  typename K::Scalars scalars;
  u32 two23;  // the bits of 2^23, which the compiler would put into a register wherever it needs them
  int length;
  bool aligned;

  HD void open(const typename K::Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, i64 row,
               i64 column, bool aligned_) {
    using Share = Member<K, 8, 32>;
    p = (typename K::P::T*)s.p + row * s.ld + column;
    g = (const typename K::G::T*)s.g + row * s.ld + column;
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      codes[I] = Share::template codes_at<I>(s, row, column);
      each<K::Slots::template at<I>::numbers>([&](auto w) {
        constexpr int which = decltype(w)::value;
        numbers[which][I] = Share::template number_at<I>(s, row, column, which);
      });
    });
    UNROLL for (int i = 0; i <= slots; i++)
      draws[i] = {noise.key[i], Steps::of(noise_from(noise.key[i], (u32)(s.col0 + column)))};
    scalars = h, two23 = 0x4b000000u, aligned = aligned_;
    length = (int)(s.cols - column < K::tile ? s.cols - column : K::tile);
  }
};

}  // namespace shardopt
