// Adafactor: the twin of shardopt/rules/adafactor.py; for what a rule has, see rules.h.
#pragma once
#include "asking.h"

namespace shardopt {

constexpr int by_torch = 0, scaled = 1, decoupled = 2;  // what the decay is multiplied by: lr, alpha, rho

// numbers: lr, beta2_decay, beta2, beta1, d, smallest RMS(p), smallest mean(row), smallest exp_avg_sq, added to g^2
template <bool MOMENTUM, bool RAW, bool FIXED, bool CLIP, bool SCALE, bool RELATIVE, bool CORRECT, int DECAY>
struct Adafactor : Bare {
  static constexpr int slots = MOMENTUM ? 2 : 1, numbers = 9, second = MOMENTUM ? 1 : 0;
  static constexpr int rounds = CLIP || SCALE ? 1 : 0, depth = MOMENTUM && !RAW ? 2 : 1;
  static constexpr bool paced = true, weighs = SCALE, answered = false;
  template <class Scalars>
  HD static bool calm(const Scalars&) {
    return true;
  }
  HD static constexpr Wants wants(int) { return {CLIP + SCALE, false, false}; }
  struct Scalars {
    float decay, w, beta1, rest1, floor, added, clip, step, pace;
  };
  HD static double weight(const double* n, double t) { return FIXED ? 1 - n[2] : pow(t, n[1]); }
  HD static double decay(const double* n, double t) { return 1 - weight(n, t); }
  HD static double floor(const double* n) { return n[6]; }
  HD static double rho(const double* n, double t) {
    double r = pow(t, -0.5);
    return RELATIVE && r < n[0] ? r : n[0];
  }
  HD static Scalars derive(const double* n, double t) {
    Scalars h = {(float)decay(n, t), (float)weight(n, t), (float)n[3], (float)(1 - n[3]), (float)n[7], (float)n[8], 1, 0, 0};
    if constexpr (rounds == 0) pace(n, t, rho(n, t), h);
    return h;
  }
  HD static void pace(const double* n, double t, double alpha, Scalars& h) {
    double step = alpha;
    if constexpr (CORRECT) step = step * sqrt(1 - pow(n[2], t));
    if constexpr (CORRECT && MOMENTUM) step = step / (1 - pow(n[3], t));
    h.step = (float)step;
    h.pace = (float)(DECAY == by_torch ? n[0] : DECAY == scaled ? alpha : rho(n, t));
  }
  HD static void learn(const double* heard, const double* n, double t, Scalars& h) {
    double alpha = rho(n, t);
    if constexpr (CLIP) h.clip = (float)clip_of(heard[0], n[4]);
    if constexpr (SCALE) {
      double size = sqrt(heard[CLIP ? 1 : 0]);
      alpha = alpha * (size < n[5] ? n[5] : size);
    }
    pace(n, t, alpha, h);
  }
  template <class S>
  HD static float unclipped(float g, S& s, const Scalars& h) {
    float v = s.template recur<second>(h.decay, (g * g + h.added) * h.w);
    float x = g;
    if constexpr (MOMENTUM && RAW) x = s.template recur<0>(h.beta1, g * h.rest1);
    return over(x, root(v < h.floor ? h.floor : v));
  }
  template <int, class S>
  HD static void want(float p, float g, S& s, const Scalars& h, float* w) {
    if constexpr (CLIP) {
      float u = unclipped(g, s, h);
      w[0] = u * u;
    }
    if constexpr (SCALE) w[CLIP ? 1 : 0] = p * p;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    float u = unclipped(g, s, h);
    if constexpr (CLIP) u = u / h.clip;
    if constexpr (MOMENTUM && !RAW) u = s.template recur<0>(h.beta1, u * h.rest1);
    return u;
  }
};

}  // namespace shardopt
