// Muon and its kin: the twins of shardopt/rules/muon.py and adaptive_muon.py; for what a rule has, see rules.h.
//
// What belongs to whole rows, matrices or blocks (NorMuon's second moment, norms) the rules themselves work out, from the
// squares that a round adds up along every row: see shardopt/kernels/lines.py. Each round is answered by a float a row.
#pragma once
#include "rules.h"

namespace shardopt {

// numbers: lr, momentum, the factor by which the shape adjusts lr. SIGN: what is sent is the sign of it.
template <bool EMA, bool NESTEROV, bool SIGN = false>
struct Orthogonal : Unasking {
  static constexpr int slots = 1, numbers = 3;
  static constexpr bool paced = true, answered = true, by_row = true;
  HD static constexpr Wants wants(int) { return {0, true, false}; }
  struct Scalars {
    float momentum, fresh, step, pace;
    float row[2];
  };
  HD static Scalars derive(const double* n, double) {
    return {(float)n[1], EMA ? (float)(1 - n[1]) : 1.0f, (float)(n[0] * n[2]), (float)n[0], {}};
  }
  template <class S>
  HD static float sent(float g, S& s, const Scalars& h) {
    float m = s.template recur<0>(h.momentum, g * h.fresh);
    float x = NESTEROV ? m * h.momentum + g * h.fresh : m;
    return SIGN && x == x ? sign(x) : x;
  }
};

template <bool EMA, bool NESTEROV, bool RESCALED>
struct Muon : Orthogonal<EMA, NESTEROV> {  // row: what o is multiplied by
  using typename Orthogonal<EMA, NESTEROV>::Scalars;
  static constexpr int rounds = RESCALED;
  template <int, class S>
  HD static void want(float, float, S& s, const Scalars&, float* w) {
    w[0] = s.answer * s.answer;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    s.template recur<0>(h.momentum, g * h.fresh);
    return RESCALED ? s.answer * h.row[0] : s.answer;
  }
};

template <bool EMA, bool NESTEROV>
struct NorMuon : Orthogonal<EMA, NESTEROV> {  // row: what o is divided by, and then multiplied by
  using typename Orthogonal<EMA, NESTEROV>::Scalars;
  static constexpr int rounds = 2;
  template <int ROUND, class S>
  HD static void want(float, float, S& s, const Scalars& h, float* w) {
    float u = ROUND ? s.over(s.answer, h.row[0]) : s.answer;
    w[0] = u * u;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    s.template recur<0>(h.momentum, g * h.fresh);
    return s.over(s.answer, h.row[0]) * h.row[1];
  }
};

template <bool EMA, bool NESTEROV, bool SIGN, bool ATAN2, bool CLIP>
struct AdaMuon : Orthogonal<EMA, NESTEROV, SIGN> {  // numbers: besides, beta2, eps; row: what u is multiplied by
  using Base = Orthogonal<EMA, NESTEROV, SIGN>;
  static constexpr int slots = 2, numbers = 5, rounds = 1;
  static constexpr bool by_row = !CLIP;
  HD static constexpr Wants wants(int) { return {CLIP, !CLIP, false}; }
  struct Scalars : Base::Scalars {
    float beta2, rest2, eps, clip;
  };
  HD static double decay(const double* n, double) { return n[3]; }
  HD static Scalars derive(const double* n, double t) {
    return {Base::derive(n, t), (float)n[3], (float)(1 - n[3]), (float)n[4], 1};
  }
  HD static void learn(const double* heard, const double*, double, Scalars& h) { h.clip = (float)clip_of(heard[0], 1); }
  template <class S>
  HD static float unscaled(S& s, const Scalars& h) {
    const float o = s.answer, r = s.root(s.template recur<1>(h.beta2, o * o * h.rest2));
    return ATAN2 ? (float)atan2((double)o, (double)r) : s.over(o, r + h.eps);
  }
  template <int, class S>
  HD static void want(float, float, S& s, const Scalars& h, float* w) {
    float u = unscaled(s, h);
    w[0] = u * u;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    s.template recur<0>(h.momentum, g * h.fresh);
    float u = unscaled(s, h);
    return CLIP ? u / h.clip : u * h.row[0];
  }
};

}  // namespace shardopt
