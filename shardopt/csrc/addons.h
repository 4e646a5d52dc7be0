// What is done to the gradient, the direction and the decay: the twins of shardopt/addons/ and of engine.prepared.
// Each has `numbers` doubles of its own and one method of its stage; Chain runs several in order.
#pragma once
#include "platform.h"

namespace shardopt {

// gradient: g -> g -------------------------------------------------------------------------------------------------

struct Unscale {  // GradScaler's; numbers: grad_scale
  static constexpr int numbers = 1;
  HD static float apply(float, float g, float, const float* n) { return g / n[0]; }
};
struct ZeroNonfinite {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float, const float*) { return (bits(g) & inf_bits) == inf_bits ? 0.0f : g; }
};
struct Maximize {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float, const float*) { return -g; }
};
struct ClipByGlobalNorm {  // numbers: the factor, from the norm of all gradients
  static constexpr int numbers = 1;
  HD static float apply(float, float g, float, const float* n) { return g * n[0]; }
};
struct CoupledDecay {  // numbers: weight_decay
  static constexpr int numbers = 1;
  HD static float apply(float p, float g, float, const float* n) { return n[0] == 0 ? g : g + p * n[0]; }
};

// direction: u -> u --------------------------------------------------------------------------------------------------

struct Grams {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float u, const float*) { return size(u) * sign(g); }
};

// decay: what is added to delta; numbers: weight_decay -----------------------------------------------------------------

struct WeightDecay {
  static constexpr int numbers = 1;
  HD static float term(float p, float, const float* n) { return p * n[0]; }
};
struct CautiousDecay {
  static constexpr int numbers = 1;
  HD static float term(float p, float u, const float* n) { return (u * p >= 0 ? p : 0.0f) * n[0]; }
};

template <class... A>
struct Chain {
  static constexpr int numbers = (0 + ... + A::numbers);
  template <bool DIRECTION>
  HD static float apply(float p, float g, float u, const float* n) {
    float x = DIRECTION ? u : g;
    ((x = DIRECTION ? A::apply(p, g, x, n) : A::apply(p, x, u, n), n += A::numbers), ...);
    return x;
  }
  HD static float delta(float delta, float p, float u, float lr, const float* n) {
    ((delta = n[0] == 0 ? delta : delta + A::term(p, u, n) * lr, n += A::numbers), ...);
    return delta;
  }
};

}  // namespace shardopt
