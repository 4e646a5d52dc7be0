// The rules over slots that answer for themselves, for steps that ask or use what is stored: the updates of rules.h with
// s.recur<I>(decay, x), which is slot I <- decay slot I + x and returns the value that the step uses, as in
// shardopt/state.py.
//
//   recurring   whether the rule itself is written so
//   paced       whether its decay has a factor of its own, in place of lr
//   depth       how many recurrences follow from each other
//   decay       of the second moment, float64
//   floor       the smallest mean(row) of a factored second moment
//   rounds, wants, want, learn   of a rule that asks itself; see asking.h
#pragma once
#include "adafactor.h"
#include "rules.h"

namespace shardopt {

template <class Rule>
struct Recurring : Rule {};  // written so from the start

struct Plainly : Silent {
  static constexpr int depth = 1;
  static constexpr bool recurring = false, paced = false;
  HD static double floor(const double*) { return 1e-30; }
};

template <bool MOMENTUM, bool NESTEROV, bool ATAN2, bool CORRECT>
struct Recurring<AdamW<MOMENTUM, NESTEROV, ATAN2, CORRECT>> : Plainly {
  using Scalars = typename AdamW<MOMENTUM, NESTEROV, ATAN2, CORRECT>::Scalars;
  HD static double decay(const double* n, double) { return n[2]; }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    float m = g;
    if constexpr (MOMENTUM) {
      m = s.template recur<0>(h.beta1, g * h.rest1);
      if constexpr (NESTEROV) m = m * h.beta1 + g * h.rest1;
    }
    float v = s.template recur<MOMENTUM ? 1 : 0>(h.beta2, g * g * h.rest2);
    float r = root(v) * h.inverse_root;
    if constexpr (ATAN2) return (float)(atan2((double)m, (double)r) * (4 / 3.14159265358979323846));
    return over(m, r + h.eps);
  }
};

template <>
struct Recurring<Lion> : Plainly {
  HD static double decay(const double*, double) { return 0; }
  template <class S>
  HD static float update(float, float g, S& s, const Lion::Scalars& h) {
    float u = sign(s.old[0] * h.beta1 + g * h.rest1);
    s.template recur<0>(h.beta2, g * h.rest2);
    return u;
  }
};

template <bool MOMENTUM, bool NESTEROV>
struct Recurring<SGD<MOMENTUM, NESTEROV>> : Plainly {
  HD static double decay(const double*, double) { return 0; }
  template <class S>
  HD static float update(float, float g, S& s, const typename SGD<MOMENTUM, NESTEROV>::Scalars& h) {
    if constexpr (MOMENTUM) {
      float m = s.template recur<0>(h.momentum, g * h.kept);
      return NESTEROV ? g + m * h.momentum : m;
    }
    return g;
  }
};

template <bool CENTERED, bool MOMENTUM, bool CORRECT>
struct Recurring<RMSprop<CENTERED, MOMENTUM, CORRECT>> : Plainly {
  static constexpr int depth = 1 + MOMENTUM;
  HD static double decay(const double* n, double) { return n[1]; }
  template <class S>
  HD static float update(float, float g, S& s, const typename RMSprop<CENTERED, MOMENTUM, CORRECT>::Scalars& h) {
    float v = s.template recur<0>(h.alpha, g * g * h.rest);
    if constexpr (CORRECT) v = v / h.bias;
    if constexpr (CENTERED) {
      float mean = s.template recur<1>(h.alpha, g * h.rest);
      v = v - mean * mean;
      v = v < 0 ? 0 : v;
    }
    float u = over(g, root(v) + h.eps);
    if constexpr (MOMENTUM) u = s.template recur<1 + CENTERED>(h.momentum, u);
    return u;
  }
};

}  // namespace shardopt
