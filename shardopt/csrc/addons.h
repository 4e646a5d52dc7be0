// What is done to the gradient, the direction and the decay: the twins of shardopt/addons/ and of engine.prepared.
// Each has `numbers` doubles of its own and one method of its stage; Chain runs several in order. One that has a slot is
// given the element's slots and, by `begin`, the number of the step.
#pragma once
#include "asking.h"

namespace shardopt {

// gradient: g -> g -------------------------------------------------------------------------------------------------

struct Unscale : Silent {  // GradScaler's; numbers: grad_scale
  static constexpr int numbers = 1;
  HD static float apply(float, float g, float, const float* n) { return g / n[0]; }
};
struct ZeroNonfinite : Silent {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float, const float*) { return wild(g) ? 0.0f : g; }
};
struct Maximize : Silent {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float, const float*) { return -g; }
};
struct ClipByGlobalNorm : Silent {  // numbers: the factor, from the norm of all gradients
  static constexpr int numbers = 1;
  HD static float apply(float, float g, float, const float* n) { return g * n[0]; }
};
struct CoupledDecay : Silent {  // numbers: weight_decay
  static constexpr int numbers = 1;
  static constexpr bool weighs = true;
  HD static float apply(float p, float g, float, const float* n) { return n[0] == 0 ? g : g + p * n[0]; }
};
struct Centralize : Bare {  // of matrices; known: the row's mean
  static constexpr int numbers = 0, known = 1, rounds = 1;
  static constexpr bool by_row = true;
  HD static constexpr Wants wants(int) { return {0, true, false}; }
  template <int>
  HD static void want(float, float g, float, const float*, float* w) {
    w[0] = g;
  }
  template <int>
  HD static void learn(const double*, const double*, float*) {}
  HD static float apply(float, float g, float, const float* n) { return g - n[0]; }
};
struct OrthoGrad : Bare {  // known: <p, g> / ||p||^2; ||g|| / ||h||
  static constexpr int numbers = 0, known = 2, rounds = 2;
  static constexpr bool weighs = true;
  HD static constexpr Wants wants(int round) { return {round == 0 ? 3 : 1, false, false}; }
  HD static float rest(float p, float g, const float* n) { return g - p * n[0]; }
  template <int ROUND>
  HD static void want(float p, float g, float, const float* n, float* w) {
    if constexpr (ROUND == 0) {
      w[0] = p * g, w[1] = p * p, w[2] = g * g;
    } else {
      float h = rest(p, g, n);
      w[0] = h * h;
    }
  }
  template <int ROUNDS>
  HD static void learn(const double* heard, const double*, float* n) {
    n[0] = (float)(heard[0] / (heard[1] + 1e-30));
    if constexpr (ROUNDS == 2) n[1] = (float)sqrt(heard[3] > 1e-12 * heard[2] ? heard[2] / heard[3] : 0.0);
  }
  HD static float apply(float p, float g, float, const float* n) { return rest(p, g, n) * n[1]; }
};

// numbers: gamma beta / (1 - beta); known: whether the step is the first, what is divided by. SLOT: the last gradient.
template <int SLOT, bool CLIP>
struct Mars : Bare {
  static constexpr int slots = 1, numbers = 1, known = 1 + CLIP, rounds = CLIP;
  HD static constexpr Wants wants(int) { return {1, false, false}; }
  HD static void begin(double t, float* n) { n[1] = t == 1; }
  template <class S>
  HD static float corrected(float g, S& s, const float* n) {
    s.fresh[SLOT] = g;
    return g + (n[1] != 0 ? 0.0f : g - s.old[SLOT]) * n[0];
  }
  template <int, class S>
  HD static void want(float, float g, float, const float* n, float* w, S& s) {
    float c = corrected(g, s, n);
    w[0] = c * c;
  }
  template <int>
  HD static void learn(const double* heard, const double*, float* n) {
    n[2] = (float)clip_of(heard[0], 1);
  }
  template <class S>
  HD static float apply(float, float g, float, const float* n, S& s) {
    float c = corrected(g, s, n);
    if constexpr (CLIP) c = c / n[2];
    return c;
  }
};

// direction: u -> u --------------------------------------------------------------------------------------------------

struct Grams : Silent {
  static constexpr int numbers = 0;
  HD static float apply(float, float g, float u, const float*) { return size(u) * sign(g); }
};
struct RMSClip : Bare {  // numbers: d; known: what u is divided by
  static constexpr int numbers = 1, known = 1, rounds = 1;
  HD static constexpr Wants wants(int) { return {1, false, false}; }
  template <int>
  HD static void want(float, float, float u, const float*, float* w) {
    w[0] = u * u;
  }
  template <int>
  HD static void learn(const double* heard, const double* given, float* n) {
    n[1] = (float)clip_of(heard[0], given[0]);
  }
  HD static float apply(float, float, float u, const float* n) { return u / n[1]; }
};
template <bool ACTIVE>
struct Cautious : Bare {  // numbers: floor; known: the share of those that agree
  static constexpr int numbers = 1, known = 1, rounds = 1;
  HD static constexpr Wants wants(int) { return {2, false, false}; }
  HD static float agrees(float g, float u) { return u * g > 0 ? 1.0f : 0.0f; }
  template <int>
  HD static void want(float, float g, float u, const float*, float* w) {
    w[0] = agrees(g, u), w[1] = ACTIVE && g == 0 ? 0.0f : 1.0f;
  }
  template <int>
  HD static void learn(const double* heard, const double* given, float* n) {
    double share = heard[0] / (heard[1] < 1 ? 1 : heard[1]);
    n[1] = (float)(share < given[0] ? given[0] : share);
  }
  HD static float apply(float, float g, float u, const float* n) { return u * agrees(g, u) / n[1]; }
};

// decay: where p is added to delta, times lr and numbers, weight_decay -----------------------------------------------------------------

struct WeightDecay : Silent {
  static constexpr int numbers = 1;
  HD static bool acts(float, float) { return true; }
};
struct CautiousDecay : Silent {
  static constexpr int numbers = 1;
  HD static bool acts(float p, float u) { return u * p >= 0; }
};

template <class... A>
struct Chain {
  static constexpr int count = sizeof...(A);
  template <int I>
  using at = typename At<I, A..., void>::type;
  static constexpr int numbers = (0 + ... + A::numbers);                // given
  static constexpr int floats = (0 + ... + (A::numbers + A::known));    // held: every item's numbers, what it knows
  static constexpr int rounds = (0 + ... + A::rounds);
  static constexpr int asks = (0 + ... + asks_of<A>(A::rounds));
  static constexpr bool by_row = (false || ... || A::by_row);

  struct Before {  // what the items before one have
    int numbers = 0, floats = 0, rounds = 0, asks = 0;
  };
  static constexpr Before before(int item) {
    Before found;
    int i = 0;
    ((found = i++ < item ? Before{found.numbers + A::numbers, found.floats + A::numbers + A::known,
                                  found.rounds + A::rounds, found.asks + asks_of<A>(A::rounds)}
                         : found),
     ...);
    return found;
  }
  static constexpr Wants wants(int round) {
    Wants found;
    ((found = round >= 0 && round < A::rounds ? A::wants(round) : found, round -= A::rounds), ...);
    return found;
  }

  static constexpr bool weighs(int pass) {  // whether any item up to that round reads p
    int i = 0;
    return (false || ... || (before(i++).rounds <= pass && A::weighs));
  }

  HD static void derive(const double* given, double t, float* n) {
    each<count>([&](auto i) {
      using Item = at<decltype(i)::value>;
      constexpr Before mine = before(decltype(i)::value);
      copy<Item::numbers>(given + mine.numbers, n + mine.floats);
      if constexpr (Item::slots > 0) Item::begin(t, n + mine.floats);
    });
  }
  template <int COUNT>
  HD static void copy(const double* given, float* n) {
    UNROLL for (int i = 0; i < COUNT; i++) n[i] = (float)given[i];
  }

  // What the answers of the rounds before PASS come to.
  template <int PASS>
  HD static void learn(const double* given, Answers answers, float* n) {
    each<count>([&](auto i) {
      using Item = at<decltype(i)::value>;
      constexpr Before mine = before(decltype(i)::value);
      constexpr int known = within(PASS - mine.rounds, 0, Item::rounds);
      if constexpr (known > 0 && !Item::by_row)
        Item::template learn<known>(Heard<Item, known>(answers + mine.asks).x, given + mine.numbers, n + mine.floats);
    });
  }
  // What differs from row to row; line: of the local rows.
  template <int PASS>
  HD static void enter(Answers answers, i64 line, float* n) {
    each<count>([&](auto i) {
      using Item = at<decltype(i)::value>;
      constexpr Before mine = before(decltype(i)::value);
      if constexpr (Item::by_row && PASS > mine.rounds)
        n[mine.floats + Item::numbers] = ((const float*)answers[mine.asks])[line];
    });
  }

  // One element through the items whose rounds have been answered; what the next one wants.
  template <int PASS, bool DIRECTION, class S>
  HD static float apply(float p, float g, float u, const float* n, float* want, S& s) {
    float x = DIRECTION ? u : g;
    each<count>([&](auto i) {
      using Item = at<decltype(i)::value>;
      constexpr Before mine = before(decltype(i)::value);
      constexpr int round = PASS - mine.rounds;
      const float* its = n + mine.floats;
      const float gradient = DIRECTION ? g : x, direction = DIRECTION ? x : u;
      if constexpr (round >= Item::rounds && Item::slots > 0)
        x = Item::apply(p, gradient, direction, its, s);
      else if constexpr (round >= Item::rounds)
        x = Item::apply(p, gradient, direction, its);
      else if constexpr (round >= 0 && Item::slots > 0)
        Item::template want<round>(p, gradient, direction, its, want, s);
      else if constexpr (round >= 0)
        Item::template want<round>(p, gradient, direction, its, want);
    });
    return x;
  }
  HD static float delta(float delta, float p, float u, float lr, const float* n) {
    ((delta = n[0] == 0 ? delta : decayed(A::acts(p, u), p, n[0], lr, delta), n += A::numbers), ...);
    return delta;
  }
};

}  // namespace shardopt
