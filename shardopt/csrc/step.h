// A whole step as a type: rule, formats, add-ons and write policy composed; and the descriptor of what it works on.
#pragma once
#include "adafactor.h"
#include "addons.h"
#include "factored.h"
#include "log_codecs.h"
#include "muon.h"
#include "rules.h"
#include "slots.h"
#include "write.h"

namespace shardopt {

// One run of rows x one run of columns of one parameter's local view. Pointers are to its first element, and to the
// first number of its first row where all ranks hold the numbers of all blocks. Made by shardopt/kernels/spans.py: every
// field is 8 bytes.
template <int PARTS>
struct Span {
  void* p;
  const void* g;
  const float* step;  // steps taken so far
  const i64* key;     // of the noise; null where none is drawn
  i64 group;          // whose numbers
  i64 rows, cols, row0, col0;
  i64 ld, width;  // elements of a whole row: of the local ones, of the global ones
  i64 tile0;  // tiles of all spans before this one
  void* part[PARTS > 0 ? PARTS : 1];
};

// Where a span of a kernel that asks lies in its parameter, and where its sums go. Pieces of `high` rows x `wide`
// columns are added up one after another by whoever takes them, so that no sum depends on who that is.
struct Place {
  i64 parameter;           // whose answers
  i64 matrix;              // of the local stack; -1: there is no stack
  i64 line, column;        // its first among all local rows, and among the columns of all local matrices
  i64 high, wide, across;  // across: pieces beside each other
  i64 rows0, cols0;        // where the sums of its rows and columns begin in the scratch memory, in doubles
  i64 tile0;               // pieces of all spans before this one
};

// What sums of pieces come to: out[i] = from[i] + from[count + i] + ..., n terms, i < count.
struct Gather {
  i64 from;          // in the scratch memory
  const float* row;  // not null: n rows of a factored slot are added up instead
  double* out;
  i64 count, n;
  i64 tile0;  // CTAs of all before this one
};

// The rows or columns of a factored slot and the means that they move by, once nobody needs the old ones.
struct Settle {
  float* part;
  const float* means;
  const float* step;
  i64 group, count;
  i64 tile0;
};

// The numbers of blocks that lie on several ranks, once nobody needs the old ones.
struct Close {
  float* part[2];
  const u32* asked[2];  // `Step::Extremes`
  i64 slot, count;
  i64 tile0;
};

// The last row that begins at or before a tile, a piece, a CTA.
template <class Span>
HD i64 span_of(const Span* spans, i64 count, i64 tile) {
  i64 at = 0, beyond = count;
  while (beyond - at > 1) {
    i64 middle = (at + beyond) / 2;
    (spans[middle].tile0 <= tile ? at : beyond) = middle;
  }
  return at;
}

// STORED: the step uses what will be read back, not what will be stored.
template <class P_, class G_, class Rule_, class Slots_, class Gradient_, class Direction_, class Decay_, class Write_,
          bool STORED = false>
struct Step {
  using P = P_;
  using G = G_;
  using Rule = Rule_;
  using Slots = Slots_;
  using Gradient = Gradient_;
  using Direction = Direction_;
  using Decay = Decay_;
  using Write = Write_;
  using Span = shardopt::Span<Slots::parts>;
  static constexpr int slots = Slots::count;
  static constexpr int tile = Slots::widest() > 256 ? Slots::widest() : 256;
  static constexpr int numbers = Rule::numbers + Gradient::numbers + Direction::numbers + Decay::numbers;

  // Rounds of asks: those of the gradient's add-ons, of the whole matrix, of the factored slot, of the rule, of the
  // direction's add-ons, of the blocks that lie on several ranks.
  static constexpr int factored = Slots::factored(), factors = factored >= 0 ? 1 : 0;
  static constexpr int from_answer = Gradient::rounds, from_slot = from_answer + Rule::answered;
  static constexpr int from_rule = from_slot + factors;
  static constexpr int from_direction = from_rule + Rule::rounds;
  static constexpr int from_extremes = from_direction + Direction::rounds, extremes = Slots::asks_before(slots);
  static constexpr int rounds = from_extremes + (extremes > 0);
  static constexpr int answer_asks = Gradient::asks, slot_asks = answer_asks + Rule::answered;
  static constexpr int rule_asks = slot_asks + 4 * factors;
  static constexpr int direction_asks = rule_asks + asks_of<Rule>(Rule::rounds);
  static constexpr int extreme_asks = direction_asks + Direction::asks, asks = extreme_asks + extremes;
  static constexpr bool stored = STORED;
  static constexpr bool by_row = factors || Gradient::by_row || Rule::answered;
  static constexpr bool held(int pass) { return factors && pass > from_slot; }  // whether the slot's factors are known
  static constexpr int previews = stored ? (Rule::depth < Slots::blocked() ? Rule::depth : Slots::blocked()) : 0;

  static constexpr Wants wants(int round) {
    return round < from_answer      ? Gradient::wants(round)
           : round < from_slot      ? Wants{0, false, false, true}
           : round < from_rule      ? Factored::wants(0)
           : round < from_direction ? Rule::wants(round - from_rule)
           : round < from_extremes  ? Direction::wants(round - from_direction)
                                    : Wants{0, false, false, false, round < rounds ? extremes : 0};
  }

  static constexpr bool weighs(int pass) {  // whether p is read in a pass that only reads
    return Gradient::weighs(pass) || (Rule::weighs && pass == from_rule);
  }

  template <class C>
  HD static i64 blocks_of(i64 columns) {  // of a row
    return (columns + C::block - 1) / C::block;
  }
  HD static i64 across(const Span& s) { return (s.cols + tile - 1) / tile; }  // tiles of a row

  // What is asked of blocks that lie on several ranks, ask by ask, and then answered: bits of the largest magnitude, or of
  // minus the smallest positive value; a row of numbers for every row, from the span's first row on.
  struct Extremes {
    u32* of[extremes + 1];
  };

  // What is the same for all elements of a parameter in a step; `n`: numbers of the rule, then of every add-on.
  struct Scalars {
    typename Rule::Scalars rule;
    float lr, gradient[Gradient::floats + 1], direction[Direction::floats + 1], decay[Decay::floats + 1];
    typename Only<Rule::answered, const float*>::type answer;  // of the row, from the span's first column on
    typename Only<factors != 0, Factored::Line>::type line;
    typename Only<(extremes > 0), Extremes>::type blocks;
  };
  HD static Scalars derive(const double* n, double t) {
    Scalars h;
    h.rule = Rule::derive(n, t);
    h.lr = (float)n[0];
    if constexpr (Rule::paced) h.lr = h.rule.pace;
    n += Rule::numbers;
    Gradient::derive(n, t, h.gradient);
    Direction::derive(n + Gradient::numbers, t, h.direction);
    Decay::derive(n + Gradient::numbers + Direction::numbers, t, h.decay);
    return h;
  }

  // The same with what the rounds before PASS have answered.
  template <int PASS>
  HD static Scalars informed(const Span& s, const Place& place, const double* n, double t, Answers answers) {
    Scalars h = derive(n, t);
    const double *gradient = n + Rule::numbers, *direction = gradient + Gradient::numbers;
    Gradient::template learn<PASS>(gradient, answers, h.gradient);
    if constexpr (Rule::rounds > 0 && !Rule::by_row && PASS > from_rule) {
      Rule::learn(Heard<Rule, 1>(answers + rule_asks).x, n, t, h.rule);
      if constexpr (Rule::paced) h.lr = h.rule.pace;
    }
    Direction::template learn<PASS - from_direction>(direction, answers + direction_asks, h.direction);
    if constexpr (held(PASS)) {
      Answers a = answers + slot_asks;
      const double decay = Rule::decay(n, t);
      h.line.col = (const float*)s.part[Slots::part_of(factored) + 1];
      h.line.cols = (const float*)a[Factored::COLS] + place.column;
      h.line.decay = (float)decay;
      h.line.mean = Factored::mean(a, decay, Rule::floor(n), place.matrix);
    }
    if constexpr (extremes > 0 && PASS >= from_extremes)
      each<slots>([&](auto i) {
        using C = typename Slots::template at<decltype(i)::value>;
        constexpr int first = Slots::asks_before(decltype(i)::value);
        if constexpr (C::across)
          UNROLL for (int k = first; k <= first + C::least; k++)
            h.blocks.of[k] = (u32*)answers[extreme_asks + k] + place.line * blocks_of<C>(s.width);
      });
    return h;
  }

  // A row of what the rule asks for all elements, from the span's first column on: where a pass puts what it asks, and
  // the passes after it find the answer.
  HD static float* row_at(Answers answers, const Span& s, const Place& place, i64 row) {
    const i64 column = factors && place.matrix > 0 ? place.column - place.matrix * s.ld : place.column;
    return (float*)answers[answer_asks] + (place.line + row) * s.ld + column;
  }

  // And what is the row's own. row: of the span.
  template <int PASS>
  HD static Scalars enter(const Scalars& known, const Span& s, const Place& place, Answers answers, i64 row) {
    Scalars h = known;
    Gradient::template enter<PASS>(answers, place.line + row, h.gradient);
    if constexpr (Rule::answered && PASS > from_answer) h.answer = row_at(answers, s, place, row);
    if constexpr (Rule::by_row)
      each<within(PASS - from_rule, 0, Rule::rounds)>([&](auto i) {
        constexpr int I = decltype(i)::value;
        h.rule.row[I] = ((const float*)answers[rule_asks + I])[place.line + row];
      });
    if constexpr (held(PASS)) {
      auto* part = (const float*)s.part[Slots::part_of(factored)];
      auto* means = (const float*)answers[slot_asks + Factored::ROWS] + place.line;
      h.line.relative = Factored::moved(part, means, h.line.decay, row) / h.line.mean;
    }
    return h;
  }

  // One element up to the round PASS: the direction after the last one, and before that what the round wants.
  template <int PASS, class S>
  HD static float direction(float p, float& g, S& s, const Scalars& h, float* want) {
    g = Gradient::template apply<PASS, false>(p, g, 0, h.gradient, want, s);
    float u = 0;
    if constexpr (PASS >= from_direction || (factors && PASS == from_slot))
      u = Rule::update(p, g, s, h.rule);
    else if constexpr (PASS >= from_rule)
      Rule::template want<PASS - from_rule>(p, g, s, h.rule, want);
    else if constexpr (PASS == from_answer)
      want[0] = Rule::sent(g, s, h.rule);
    if constexpr (PASS >= from_direction)
      u = Direction::template apply<PASS - from_direction, true>(p, g, u, h.direction, want, s);
    return u;
  }

  // The numbers of a block that lies on several ranks.
  HD static void close(const Close& a, i64 at) {
    each<slots>([&](auto i) {
      using C = typename Slots::template at<decltype(i)::value>;
      if constexpr (C::across) {
        if (a.slot != decltype(i)::value) return;
        float numbers[2];
        C::close(a.asked[0][at] & 0x7fffffffu, C::least ? a.asked[1][at] & 0x7fffffffu : inf_bits, numbers);
        UNROLL for (int k = 0; k < C::numbers; k++) a.part[k][at] = numbers[k];
      }
    });
  }

  // Noise of every stream: of the parameter, then of every slot.
  struct Noise {
    u64 base[slots + 1];
  };
  struct RowNoise {
    u32 key[slots + 1];
  };
  HD static Noise noise(const i64* key, i64 t) {
    Noise found{};
    if constexpr (Write::noisy && !P::exact) found.base[0] = noise_base(*key, t, 0);
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      constexpr u32 stream = Slots::template at<I>::stream;
      if constexpr (stream != 0) found.base[I + 1] = noise_base(*key, t, stream);
    });
    return found;
  }
  HD static RowNoise row_noise(const Noise& noise, i64 row) {
    RowNoise found{};
    if constexpr (Write::noisy && !P::exact) found.key[0] = row_key(noise.base[0], row);
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      if constexpr (Slots::template at<I>::stream != 0) found.key[I + 1] = row_key(noise.base[I + 1], row);
    });
    return found;
  }
};

}  // namespace shardopt
