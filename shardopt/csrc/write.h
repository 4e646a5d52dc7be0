// How numbers of parameters and gradients lie in memory, and how p - delta is rounded: the twin of shardopt/write.py.
#pragma once
#include "rounding.h"

namespace shardopt {

struct F32 {
  using T = float;
  static constexpr bool exact = true;
  HD static float load(float x) { return x; }
  HD static float store(float x) { return x; }
  HD static float store(float x, u32) { return x; }
};
template <class Float>
struct Low {
  using T = u16;
  static constexpr bool exact = false;
  HD static float load(u16 x) { return Float::load(x); }
  HD static u16 store(float x) { return Float::nearest(x); }
  HD static u16 store(float x, u32 noise) { return Float::stochastic(x, noise); }
};
using BF16 = Low<Bfloat16>;
using F16 = Low<Float16>;

struct Nearest {
  static constexpr bool noisy = false;
  template <class P>
  HD static typename P::T apply(float p, float delta, const float*, float*, u32) {
    return P::store(p - delta);
  }
};
struct Stochastic {
  static constexpr bool noisy = true;
  template <class P>
  HD static typename P::T apply(float p, float delta, const float*, float*, u32 noise) {
    return P::store(p - delta, noise);
  }
};
template <int SLOT>
struct Kahan {  // what was lost is kept in the slot
  static constexpr bool noisy = false;
  template <class P>
  HD static typename P::T apply(float p, float delta, const float* old, float* fresh, u32) {
    float c = old[SLOT] - delta;
    auto stored = P::store(p + c);
    fresh[SLOT] = c - (P::load(stored) - p);
    return stored;
  }
};

}  // namespace shardopt
