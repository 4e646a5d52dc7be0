// The body of every step: one tile of a row, held by a team. On a CPU the team is one thread that walks the tile in
// chunks of E elements; on a GPU it is a warp whose 32 lanes hold 8 elements of every chunk. Everything is read once
// and written once; between `forward` and `finish` the team agrees on the extremes of the blocks. A pass of a step that
// asks only reads: its sink takes what every element contributes to the sums. A step from what is stored previews the tile
// first, since a block's extremes decide what will be read back.
#pragma once
#include "cells.h"
#include "window.h"

namespace shardopt {

// A sink of what writes, or what only learns the extremes of its tile.
template <int PASS, bool PREVIEWS = false>
struct Writing {
  static constexpr int pass = PASS;
  static constexpr bool previews = PREVIEWS;
  template <class Line>
  HD static float factor(const Line& line, i64 column, int, int) {  // of a factored slot
    return line.value(column);
  }
};

// One member of a team and its share of a tile: chunk c holds elements c * E * LANES + lane * E and following.
template <class K, int E, int LANES, int TILES = 1>
struct Member {
  using Span = typename K::Span;
  template <int I>
  using C = typename K::Slots::template at<I>;
  static constexpr int chunks = K::tile * TILES / (E * LANES), slots = K::slots;
  static constexpr bool in_blocks = K::Slots::widest() > 0;  // so that chunks begin at multiples of E
  template <int I>
  static constexpr bool tabled = C<I>::packed == 2 && !in_registers;

  template <int... I>
  static Leaves<Seq<I...>, Table<C<I>, tabled<I>>...> tables_of(Seq<I...>);
  decltype(tables_of(typename Count<slots>::type{})) tables[chunks];  // of the tile's blocks
  static constexpr bool by_slot = K::Slots::tabled();  // encoders of tables have too many constants to take turns
  static constexpr int group = E < 64 ? E : 64;  // elements whose noise comes from one product
  typename Only<!in_registers, Differences<group>>::type differences[slots + 1];
  alignas(64) float kept[slots + 1][chunks][E];  // 64: no vector lies in two lines of a cache
  u32 most[slots + 1][chunks], fewest[slots + 1][chunks];  // bits of the extremes of this member's elements
  template <int... I>
  static Leaves<Seq<I...>, Encoders<C<I>, !in_registers && (C<I>::block > 0), chunks>...> encoders_of(Seq<I...>);
  decltype(encoders_of(typename Count<slots>::type{})) encoders;

  template <int I>
  HD static auto codes_at(const Span& s, i64 row, i64 column) {
    constexpr int per = C<I>::packed;
    i64 ld = per == 2 ? (s.ld + 1) / 2 : s.ld;
    return (typename C<I>::Code*)s.part[K::Slots::part_of(I)] + row * ld + (per == 2 ? column / 2 : column);
  }
  template <int I>
  HD static i64 block_at(const Span& s, i64 row, i64 column) {  // among a slot's numbers
    constexpr bool all = C<I>::across;
    return row * K::template blocks_of<C<I>>(all ? s.width : s.ld) + (all ? s.col0 + column : column) / C<I>::block;
  }
  template <int I>
  HD static float* number_at(const Span& s, i64 row, i64 column, int which) {
    return (float*)s.part[K::Slots::part_of(I) + 1 + which] + block_at<I>(s, row, column);
  }

  template <class Sink>
  static constexpr bool writes = Sink::pass == K::rounds && !Sink::previews;

  // Read, update, write p and what is stored element by element; keep the rest. column: of the tile; n: its length;
  // aligned: whether every array's first element of a row begins at a multiple of what `Window::copy` moves.
  template <class Sink>
  HD void forward(const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, Sink& sink, i64 row,
                  i64 column, int n, int lane, bool aligned = true) {
    open(s, row, column, n, typename Count<slots>::type{});
    ELEMENTS for (int c = 0; c < chunks; c++) {
      int first = (c * LANES + lane) * E, count = n - first;
      if (!K::stored || count <= 0) begin(c);  // a step from what is stored reads the extremes that it previewed
      if constexpr (in_blocks && writes<Sink> && !in_registers) {
        if (count >= E)
          chunk<true>(s, h, noise, sink, row, column + first, E, c, true);
        else if (count > 0)
          chunk<false>(s, h, noise, sink, row, column + first, count, c, false);
        if constexpr (!by_slot) settle(s, row, column, n, c);
        continue;
      }
      if (count <= 0) continue;
      if constexpr (!in_registers && Sink::pass == K::rounds)  // passes that only read are compiled for any length alone
        if (count >= E) {
          chunk<true>(s, h, noise, sink, row, column + first, E, c, true);
          continue;
        }
      chunk<false>(s, h, noise, sink, row, column + first, count < E ? count : E, c, aligned && count >= E);
    }
  }
  // The tables of all blocks, before any is needed: what a power costs is then hidden.
  template <int... I>
  HD void open(const Span& s, i64 row, i64 column, int n, Seq<I...> seq) {
    each(
        [&](auto i) {
          constexpr int S = decltype(i)::value;
          if constexpr (tabled<S>)
            for (int first = 0, b = 0; first < n; first += C<S>::block, b++)
              pick<S>(tables[b]).open(number_at<S>(s, row, column + first, 0),
                                      number_at<S>(s, row, column + first, C<S>::numbers - 1));
        },
        seq);
  }
  HD void begin() {
    ELEMENTS for (int c = 0; c < chunks; c++) begin(c);
  }
  HD void begin(int c) {
    each<slots>([&](auto i) { most[decltype(i)::value][c] = 0, fewest[decltype(i)::value][c] = inf_bits; });
  }

  template <bool FULL, class Sink, int... I>
  HD void chunk_of(const Span& s, const typename K::Scalars& scalars, const typename K::RowNoise& noise, Sink& sink,
                   i64 row, i64 column, int n, int c, bool wide, Seq<I...>);
  template <bool FULL, class Sink>
  HD void chunk(const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, Sink& sink, i64 row,
                i64 column, int n, int c, bool wide) {
    chunk_of<FULL>(s, h, noise, sink, row, column, n, c, wide, typename Count<slots>::type{});
  }

  // In memory: f(e, noise) for all elements of a chunk.
  template <class F>
  HD static void drawing(Differences<group>& differences, u32 near, F&& f) {
    differences.settle(near);
    for (int k = 0; k < E; k += group) {
      const u32 product = noise_product(near ^ (u32)k);
      ELEMENTS for (int l = 0; l < group; l++) f(k + l, noise_of_product(product + differences.by[l]));
    }
  }

  // Of blocks that lie on several ranks: what the parts of a block come to, put where all of a row's are asked; and what
  // was answered. The team has agreed on the blocks of its tile.
  HD void offer(const Span& s, const typename K::Scalars& h, i64 row, i64 column, int n, int lane) const {
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value, ask = K::Slots::asks_before(I);
      if constexpr (C<I>::across) {
        ELEMENTS for (int c = 0; c < chunks; c++) {
          const int first = (c * LANES + lane) * E;
          if (first >= n || first % C<I>::block != 0) continue;
          const i64 at = block_at<I>(s, row, column + first);
          raise(h.blocks.of[ask] + at, most[I][c]);
          if constexpr (C<I>::least) lower(h.blocks.of[ask + 1] + at, fewest[I][c] | 0x80000000u);
        }
      }
    });
  }
  template <int I>
  HD void answered(const Span& s, const typename K::Scalars& h, i64 row, i64 column, int c) {
    constexpr int ask = K::Slots::asks_before(I);
    const i64 at = block_at<I>(s, row, column);
    most[I][c] = h.blocks.of[ask][at] & 0x7fffffffu;
    if constexpr (C<I>::least) fewest[I][c] = h.blocks.of[ask + 1][at] & 0x7fffffffu;
  }

  // The encoder of a block whose first element is the tile's `first`. The member that holds it stores its numbers, unless
  // others may not have read the old ones.
  template <int I>
  HD static auto closed(const Span& s, i64 row, i64 column, int first, int n, u32 most, u32 fewest) {
    float stored[2];
    auto encoder = C<I>::close(most, fewest, stored);
    if (!C<I>::across && first < n && first % C<I>::block == 0)
      each<C<I>::numbers>([&](auto w) {
        *number_at<I>(s, row, column + first, decltype(w)::value) = stored[decltype(w)::value];
      });
    return encoder;
  }
  // In memory: the block that ends with chunk c, if one does. Well before its encoder is used, since that takes long.
  template <int I>
  HD void settle(const Span& s, i64 row, i64 column, int n, int c) {
    constexpr int span = C<I>::block > E ? C<I>::block / E : 1;
    const int from = c + 1 - span;
    if ((c + 1) % span != 0 || from * E >= n) return;
    u32 high = 0, low = inf_bits;
    for (int k = from; k <= c; k++) high = larger(high, most[I][k]), low = smaller(low, fewest[I][k]);
    const auto encoder = closed<I>(s, row, column, from * E, n, high, low);
    for (int k = from; k <= c; k++) pick<I>(encoders).of[k] = encoder;
  }
  HD void settle(const Span& s, i64 row, i64 column, int n, int c) {
    each<slots>([&](auto i) {
      if constexpr (C<decltype(i)::value>::block > 0) settle<decltype(i)::value>(s, row, column, n, c);
    });
  }

  // Encode what was kept; in registers the extremes are the blocks' now.
  HD void finish(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n, int lane,
                 bool aligned = true) {
    if constexpr (in_registers)
      each<slots>([&](auto i) {
        constexpr int I = decltype(i)::value;
        if constexpr (C<I>::block > 0) {
          ELEMENTS for (int c = 0; c < chunks; c++) {
            const int first = (c * LANES + lane) * E;
            if (first < n)
              encode<I>(s, noise, row, column, n, first, c, aligned,
                        closed<I>(s, row, column, first, n, most[I][c], fewest[I][c]));
          }
        }
      });
    if constexpr (!in_registers) {
      const int some = (n + E - 1) / E;
      auto put = [&](auto i, int c) {
        constexpr int I = slots - 1 - decltype(i)::value;
        if constexpr (C<I>::block > 0)
          encode<I>(s, noise, row, column, n, c * E, c, aligned, pick<I>(encoders).of[c]);
      };
      if constexpr (by_slot) {
        for (int c = 0; c < chunks; c++) settle(s, row, column, n, c);
        each<slots>([&](auto i) {
          for (int c = 0; c < some; c++) put(i, c);
        });
      } else {
        for (int c = 0; c < some; c++) each<slots>([&](auto i) { put(i, c); });
      }
    }
  }
  template <int I, class Encoder>
  HD void encode(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n, int first, int c,
                 bool aligned, const Encoder& encoder);
};

}  // namespace shardopt
