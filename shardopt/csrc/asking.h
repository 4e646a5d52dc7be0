// What an item of a step asks of the whole parameter: the twins of shardopt/asks.py. An item with `rounds` > 0 has
//
//   wants(round)   what is added up in this round
//   want<ROUND>    one element's contributions, float32, from the answers of the rounds before
//   learn          answers -> the `known` floats that lie behind its numbers; the first of them is one of the row's
//                  own where `by_row`
//   weighs         whether it reads p
//
// A kernel runs in passes: pass k works out every element up to the k-th round of its items, adds up what that wants in
// float64 and writes nothing; the pass after the last round writes.
#pragma once
#include "platform.h"

namespace shardopt {

// So many sums over the parameter; sums of every row; of every column, which come with rows, the sums of each matrix
// of a stack, and the sums of the stored rows; or no sums but the elements themselves, or the extremes of blocks. Rows are
// asked one mean, rows and columns four.
struct Wants {
  int sums = 0;
  bool rows = false, cols = false, elements = false;
  int extremes = 0;  // of every block of a slot the largest, or that and the smallest positive value
  HD constexpr int asks() const { return cols ? 4 : rows || elements ? 1 : sums + extremes; }
  HD constexpr int values() const { return rows || cols || elements ? 1 : sums; }  // an element's contributions
};

struct Bare {  // knows nothing of rows, reads no p, keeps nothing
  static constexpr int slots = 0;
  static constexpr bool by_row = false, weighs = false;
};

struct Silent : Bare {  // asks nothing
  static constexpr int rounds = 0, known = 0;
  HD static constexpr Wants wants(int) { return {}; }
  template <class Scalars>
  HD static bool calm(const Scalars&) {  // of a rule: whether its calm tiles may take `root_calm` and `over_calm`
    return true;
  }
};

// The answers of an asking parameter: pointers, in the order in which they were asked.
using Answers = const void* const*;

template <class A>
HD constexpr int asks_of(int rounds) {  // in its first `rounds` rounds
  int count = 0;
  for (int i = 0; i < rounds; i++) count += A::wants(i).asks();
  return count;
}

// The scalars that an item has been answered in KNOWN rounds.
template <class A, int KNOWN>
struct Heard {
  static constexpr int count = asks_of<A>(KNOWN);
  double x[count];
  HD Heard(Answers from) {
    UNROLL for (int i = 0; i < count; i++) x[i] = *(const double*)from[i];
  }
};

HD constexpr int within(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// clip_rms of shardopt/rules/math.py: what u is divided by
HD double clip_of(double mean_square, double d) {
  double ratio = sqrt(mean_square) / d;
  return ratio < 1 ? 1 : ratio;
}

}  // namespace shardopt
