// The update rules, one struct each: the twins of shardopt/rules/; Adafactor and Muon have files of their own.
//
//   slots, numbers   how many; `numbers` doubles of the param group come in the order of shardopt/kernels/twins.py
//   derive           numbers and the step's number t -> what is the same for all elements; `step` multiplies u
//   update           slots s -> fresh slots and the direction u, fp32, in the reference's order of operations.
//                    s.recur<I>(decay, x) is slot I <- decay slot I + x and returns the value that the step uses, as in
//                    shardopt/state.py; s.old is for what comes before it
//   paced            whether its decay has a factor of its own, `pace`, in place of lr
//   depth            how many recurrences follow from each other
//   decay, floor     of a second moment that may be factored: its decay, float64, and the smallest mean(row)
//   rounds, wants, want, learn, weighs   of a rule that asks itself; see asking.h
//   answered, sent   whether a round comes before those, that of a whole matrix: `sent` is what an element sends, s.answer
//                    what came back. Before a factored slot's round, since the second moment is then of the answer
//   by_row           whether its rounds are answered by a float a row, h.row[round], which `learn` does not see
#pragma once
#include "asking.h"

namespace shardopt {

HD double unbias(double beta, double t) { return 1 - pow(beta, t); }

struct Unasking : Silent {
  static constexpr int depth = 1;
  static constexpr bool paced = false, answered = false;
  HD static double floor(const double*) { return 1e-30; }
};

template <bool MOMENTUM, bool NESTEROV, bool ATAN2, bool CORRECT>
struct AdamW : Unasking {  // numbers: lr, beta1, beta2, eps
  static constexpr int slots = MOMENTUM ? 2 : 1, numbers = 4;
  struct Scalars {
    float beta1, rest1, beta2, rest2, eps, inverse_root, step;
  };
  HD static Scalars derive(const double* n, double t) {
    double bias1 = CORRECT && MOMENTUM ? unbias(n[1], t) : 1, bias2 = CORRECT ? unbias(n[2], t) : 1;
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)(1 - n[2]), (float)n[3], (float)(1 / sqrt(bias2)),
            (float)(n[0] / bias1)};
  }
  HD static double decay(const double* n, double) { return n[2]; }
  HD static bool calm(const Scalars& h) {
    return !ATAN2 && h.inverse_root <= 1024 && h.eps >= h.inverse_root * 0x1p-38f && h.eps <= 1024;
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    float v = s.template recur<MOMENTUM ? 1 : 0>(h.beta2, g * g * h.rest2);  // first, since its root takes longest
    const float r = s.root(v);
    float m = g;
    if constexpr (MOMENTUM) {
      m = s.template recur<0>(h.beta1, g * h.rest1);
      if constexpr (NESTEROV) m = m * h.beta1 + g * h.rest1;
    }
    if constexpr (ATAN2) return (float)(atan2((double)m, (double)(r * h.inverse_root)) * (4 / 3.14159265358979323846));
    return s.over(m, multiply_add(r, h.inverse_root, h.eps));
  }
};

struct Lion : Unasking {  // numbers: lr, beta1, beta2
  static constexpr int slots = 1, numbers = 3;
  struct Scalars {
    float beta1, rest1, beta2, rest2, step;
  };
  HD static Scalars derive(const double* n, double) {
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)(1 - n[2]), (float)n[0]};
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    s.template recur<0>(h.beta2, g * h.rest2);
    return sign(s.old[0] * h.beta1 + g * h.rest1);
  }
};

template <bool MOMENTUM, bool NESTEROV>
struct SGD : Unasking {  // numbers: lr, momentum, dampening
  static constexpr int slots = MOMENTUM ? 1 : 0, numbers = 3;
  struct Scalars {
    float momentum, kept, step;
  };
  HD static Scalars derive(const double* n, double t) {
    return {(float)n[1], t == 1 ? 1.0f : (float)(1 - n[2]), (float)n[0]};
  }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    if constexpr (MOMENTUM) {
      float m = s.template recur<0>(h.momentum, g * h.kept);
      return NESTEROV ? g + m * h.momentum : m;
    }
    return g;
  }
};

template <bool CENTERED, bool MOMENTUM, bool CORRECT>
struct RMSprop : Unasking {  // numbers: lr, alpha, eps, momentum
  static constexpr int slots = 1 + CENTERED + MOMENTUM, numbers = 4, depth = 1 + MOMENTUM;
  struct Scalars {
    float alpha, rest, eps, momentum, bias, step;
  };
  HD static Scalars derive(const double* n, double t) {
    return {(float)n[1], (float)(1 - n[1]), (float)n[2], (float)n[3], CORRECT ? (float)unbias(n[1], t) : 1.0f,
            (float)n[0]};
  }
  HD static double decay(const double* n, double) { return n[1]; }
  HD static bool calm(const Scalars& h) { return h.eps >= 0x1p-38f && h.eps <= 1024; }
  template <class S>
  HD static float update(float, float g, S& s, const Scalars& h) {
    float v = s.template recur<0>(h.alpha, g * g * h.rest);
    if constexpr (CORRECT) v = v / h.bias;
    if constexpr (CENTERED) {
      float mean = s.template recur<1>(h.alpha, g * h.rest);
      v = v - mean * mean;
      v = v < 0 ? 0 : v;
    }
    float u = s.over(g, s.root(v) + h.eps);
    if constexpr (MOMENTUM) u = s.template recur<1 + CENTERED>(h.momentum, u);
    return u;
  }
};

}  // namespace shardopt
