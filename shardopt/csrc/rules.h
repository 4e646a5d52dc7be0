// The update rules, one struct each: the twins of shardopt/rules/.
//
//   slots, numbers   how many; `numbers` doubles of the param group come in the order of shardopt/kernels/twins.py
//   derive           numbers and the step's number t -> what is the same for all elements; `step` multiplies u
//   update           old slots -> fresh slots and the direction u, fp32, in the reference's order of operations
#pragma once
#include "platform.h"

namespace shardopt {

HD double unbias(double beta, double t) { return 1 - pow(beta, t); }

template <bool MOMENTUM, bool NESTEROV, bool ATAN2, bool CORRECT>
struct AdamW {  // numbers: lr, beta1, beta2, eps
  static constexpr int slots = MOMENTUM ? 2 : 1, numbers = 4;
  struct Scalars {
    float beta1, rest1, beta2, rest2, eps, inverse_root, step;
  };
  HD static Scalars derive(const double* n, double t) {
    double bias1 = CORRECT && MOMENTUM ? unbias(n[1], t) : 1, bias2 = CORRECT ? unbias(n[2], t) : 1;
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)(1 - n[2]), (float)n[3], (float)(1 / sqrt(bias2)),
            (float)(n[0] / bias1)};
  }
  HD static float update(float, float g, const float* old, float* fresh, const Scalars& h) {
    constexpr int second = MOMENTUM ? 1 : 0;  // first, since its root takes longest
    float v = fresh[second] = old[second] * h.beta2 + g * g * h.rest2;
    float r = root(v) * h.inverse_root, m = g;
    if constexpr (MOMENTUM) {
      m = fresh[0] = old[0] * h.beta1 + g * h.rest1;
      if constexpr (NESTEROV) m = m * h.beta1 + g * h.rest1;
    }
    if constexpr (ATAN2) return (float)(atan2((double)m, (double)r) * (4 / 3.14159265358979323846));
    return over(m, r + h.eps);
  }
};

struct Lion {  // numbers: lr, beta1, beta2
  static constexpr int slots = 1, numbers = 3;
  struct Scalars {
    float beta1, rest1, beta2, rest2, step;
  };
  HD static Scalars derive(const double* n, double) {
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)(1 - n[2]), (float)n[0]};
  }
  HD static float update(float, float g, const float* old, float* fresh, const Scalars& h) {
    fresh[0] = old[0] * h.beta2 + g * h.rest2;
    return sign(old[0] * h.beta1 + g * h.rest1);
  }
};

template <bool MOMENTUM, bool NESTEROV>
struct SGD {  // numbers: lr, momentum, dampening
  static constexpr int slots = MOMENTUM ? 1 : 0, numbers = 3;
  struct Scalars {
    float momentum, kept, step;
  };
  HD static Scalars derive(const double* n, double t) {
    return {(float)n[1], t == 1 ? 1.0f : (float)(1 - n[2]), (float)n[0]};
  }
  HD static float update(float, float g, const float* old, float* fresh, const Scalars& h) {
    if constexpr (!MOMENTUM) return g;
    float m = fresh[0] = old[0] * h.momentum + g * h.kept;
    return NESTEROV ? g + m * h.momentum : m;
  }
};

template <bool CENTERED, bool MOMENTUM, bool CORRECT>
struct RMSprop {  // numbers: lr, alpha, eps, momentum
  static constexpr int slots = 1 + CENTERED + MOMENTUM, numbers = 4;
  struct Scalars {
    float alpha, rest, eps, momentum, bias, step;
  };
  HD static Scalars derive(const double* n, double t) {
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)n[3], CORRECT ? (float)unbias(n[1], t) : 1.0f,
            (float)n[0]};
  }
  HD static float update(float, float g, const float* old, float* fresh, const Scalars& h) {
    float v = fresh[0] = old[0] * h.alpha + g * g * h.rest;
    if constexpr (CORRECT) v = v / h.bias;
    if constexpr (CENTERED) {
      float mean = fresh[1] = old[1] * h.alpha + g * h.rest;
      v = v - mean * mean;
      v = v < 0 ? 0 : v;
    }
    float u = over(g, root(v) + h.eps);
    if constexpr (MOMENTUM) u = fresh[1 + CENTERED] = old[1 + CENTERED] * h.momentum + u;
    return u;
  }
};

}  // namespace shardopt
