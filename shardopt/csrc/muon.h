// Muon: the twin of shardopt/rules/muon.py; for what a rule has, see rules.h.
#pragma once
#include "rules.h"

namespace shardopt {

template <bool EMA, bool NESTEROV>
struct Muon : Unasking {  // numbers: lr, momentum, the factor by which the shape adjusts lr
  static constexpr int slots = 1, numbers = 3, rounds = 1;
  static constexpr bool paced = true, answered = true;
  HD static constexpr Wants wants(int) { return {0, false, false, true}; }
  struct Scalars {
    float momentum, fresh, step, pace;
  };
  HD static Scalars derive(const double* n, double) {
    return {(float)n[1], EMA ? (float)(1 - n[1]) : 1.0f, (float)(n[0] * n[2]), (float)n[0]};
  }
  template <class S>
  HD static void want(float, float g, S& s, const Scalars& h, float* w) {
    float m = s.template recur<0>(h.momentum, g * h.fresh);
    w[0] = NESTEROV ? m * h.momentum + g * h.fresh : m;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    s.template recur<0>(h.momentum, g * h.fresh);
    return s.answer;
  }
};

}  // namespace shardopt
