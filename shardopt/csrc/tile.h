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
  static constexpr int group = E < 64 ? E : 64;  // elements whose noise comes from one product
  typename Only<!in_registers, Differences<group>>::type differences[slots + 1];
  alignas(64) float kept[slots + 1][chunks][E];  // 64: no vector lies in two lines of a cache
  u32 most[slots + 1][chunks], fewest[slots + 1][chunks];  // bits of the extremes of this member's elements

  template <int I>
  HD static auto codes_at(const Span& s, i64 row, i64 column) {
    constexpr int per = C<I>::packed;
    i64 ld = per == 2 ? (s.ld + 1) / 2 : s.ld;
    return (typename C<I>::Code*)s.part[K::Slots::part_of(I)] + row * ld + (per == 2 ? column / 2 : column);
  }
  template <int I>
  HD static float* number_at(const Span& s, i64 row, i64 column, int which) {
    constexpr int block = C<I>::block;
    return (float*)s.part[K::Slots::part_of(I) + 1 + which] + row * ((s.ld + block - 1) / block) + column / block;
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

  // Encode what was kept; the extremes are the blocks' now. The member that holds a block's first element stores
  // its numbers.
  HD void finish(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n, int lane,
                 bool aligned = true) {
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      if constexpr (C<I>::block > 0) finish_slot<I>(s, noise, row, column, n, lane, aligned);
    });
  }
  template <int I>
  HD void finish_slot(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n, int lane,
                      bool aligned);
};

template <class K, int E, int LANES, int TILES>
template <bool FULL, class Sink, int... I>
HD void Member<K, E, LANES, TILES>::chunk_of(const Span& s, const typename K::Scalars& scalars,
                                      const typename K::RowNoise& noise, Sink& sink, i64 row, i64 column, int n, int c,
                                      bool wide, Seq<I...>) {
  using P = typename K::P;
  using G = typename K::G;
  constexpr int PASS = Sink::pass, contributions = PASS < K::rounds ? K::wants(PASS).values() : 0;
#ifdef SHARDOPT_REGISTERS
  const auto& h = scalars;
#else
  const auto h = scalars;  // a copy whose address nobody has: it stays in registers
#endif
  const auto draw = noise;
  auto* to = (typename P::T*)s.p + row * s.ld + column;
  constexpr bool all = FULL || in_registers;
  Window<typename P::T, E> p;
  Window<typename G::T, E> g;
  Leaves<Seq<I...>, Codes<C<I>, E, FULL>...> codes;
  Leaves<Seq<I...>, Opened<C<I>, (C<I>::block > 0)>...> opened;
  Leaves<Seq<I...>, Storing<C<I>, (K::stored && C<I>::block > 0)>...> storing;
  p.load(to, n, wide);
  g.load((const typename G::T*)s.g + row * s.ld + column, n, wide);
  each(
      [&](auto i) {
        constexpr int S = decltype(i)::value;
        if constexpr (S == K::factored) return;
        pick<S>(codes).load(codes_at<S>(s, row, column), n, wide);
        if constexpr (tabled<S>)
          pick<S>(codes).look_up(pick<S>(tables[c * E / C<S>::block]).value, n);
        else if constexpr (C<S>::block > 0)
          pick<S>(opened) = Opened<C<S>, true>::at(number_at<S>(s, row, column, 0),
                                                   number_at<S>(s, row, column, C<S>::numbers - 1));
        pick<S>(storing).settle(most[S][c], fewest[S][c]);
      },
      Seq<I...>{});
  const u32 first = (u32)(s.col0 + column);
  const u32 near[slots + 1] = {noise_from(draw.key[0], first), noise_from(draw.key[I + 1], first)...};
  auto noise_of = [&](int stream, int e) {
    return in_blocks ? noise_near(near[stream], (u32)e) : noise_at(draw.key[stream], first + e);
  };
  u32 high[slots + 1] = {}, low[slots + 1];
  ((low[I] = inf_bits - 1), ...);  // less 1, which makes a 0 the largest of all
  float wanted[contributions + 1][E];
  // In memory, noisy writing is a loop of its own: with it, roots and divisions wait for room in the processor.
  constexpr bool later = writes<Sink> && !in_registers && K::Write::noisy && !P::exact;
  float directions[later ? E : 1];
  ELEMENTS for (int e = 0; e < (all ? E : n); e++) {
    float x = P::load(p[e]), d = G::load(g[e]), old[slots + 1], fresh[slots + 1], want[contributions + 1];
    each(
        [&](auto i) {
          constexpr int S = slots - 1 - decltype(i)::value;
          if constexpr (tabled<S>)
            old[S] = pick<S>(codes).values[e];
          else if constexpr (S != K::factored)
            old[S] = pick<S>(opened).decode(pick<S>(codes).get(e));
        },
        Seq<I...>{});
    auto stored = [&](auto i, float y) {
      constexpr int S = decltype(i)::value;
      u32 random = C<S>::stream != 0 ? noise_of(S + 1, e) : 0;
      if constexpr (C<S>::block > 0)
        return pick<S>(storing).value(y, random);
      else
        return C<S>::decode((typename C<S>::Code)C<S>::encode(y, random));
    };
    Cells<K, PASS, decltype(stored)> cells{old, fresh, want, 0, stored};
    if constexpr (K::held(PASS)) cells.factor = sink.factor(h.line, column + e, c, e);
    if constexpr (K::Rule::answered && PASS > K::from_answer) cells.answer = h.answer[column + e];
    float u = K::template direction<PASS>(x, d, cells, h, want);
    if constexpr (later) {
      directions[e] = u;
    } else if constexpr (writes<Sink>) {
      float delta = K::Decay::delta(u * h.rule.step, x, u, h.lr, h.decay);
      u32 random = K::Write::noisy && !P::exact ? noise_of(0, e) : 0;
      p[e] = K::Write::template apply<P>(x, delta, old, fresh, random);
    } else if constexpr (!Sink::previews) {
      for (int k = 0; k < contributions; k++) wanted[k][e] = want[k];
      continue;
    }
    each(
        [&](auto i) {
          constexpr int S = decltype(i)::value;
          if constexpr (C<S>::block > 0) {
            u32 magnitude = C<S>::is_signed || in_registers ? bits(fresh[S]) & 0x7fffffffu : bits(fresh[S]);  // or a NaN's
            if (!in_registers || e < n) {
              high[S] = larger(high[S], magnitude);
              if constexpr (C<S>::least) low[S] = smaller(low[S], magnitude - 1);
            }
            if constexpr (writes<Sink>) kept[S][c][e] = C<S>::prepare(fresh[S]);
          } else if constexpr (writes<Sink> && S != K::factored) {
            u32 drawn = C<S>::stream != 0 ? noise_of(S + 1, e) : 0;
            pick<S>(codes).put(e, C<S>::encode(fresh[S], drawn));
          }
        },
        Seq<I...>{});
  }
  if constexpr (later) {
    auto write = [&](int e, u32 random) {
      float x = P::load(p[e]), u = directions[e], delta = K::Decay::delta(u * h.rule.step, x, u, h.lr, h.decay);
      p[e] = K::Write::template apply<P>(x, delta, nullptr, nullptr, random);
    };
    if constexpr (FULL && in_blocks)
      drawing(differences[slots], near[0], write);
    else
      ELEMENTS for (int e = 0; e < (all ? E : n); e++) write(e, noise_of(0, e));
  }
  if constexpr (contributions > 0 && !Sink::previews) sink.take(wanted, column, n, c);
  if constexpr (writes<Sink>) p.store(to, n, wide);
  each(
      [&](auto i) {
        constexpr int S = decltype(i)::value;
        if constexpr (C<S>::block > 0)
          most[S][c] = high[S] & 0x7fffffffu, fewest[S][c] = low[S] + 1;
        else if constexpr (writes<Sink> && S != K::factored)
          pick<S>(codes).store(codes_at<S>(s, row, column), n, wide);
      },
      Seq<I...>{});
}

template <class K, int E, int LANES, int TILES>
template <int I>
HD void Member<K, E, LANES, TILES>::finish_slot(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column,
                                                int n, int lane, bool aligned) {
  constexpr int block = C<I>::block, span = block > E * LANES ? block / (E * LANES) : 1;  // chunks of a block
  auto closed = [&](int c) {
    const int first = (c * LANES + lane) * E;
    float stored[2];
    auto encoder = C<I>::close(most[I][c], fewest[I][c], stored);
    if (first < n && first % block == 0)
      each<C<I>::numbers>([&](auto w) {
        *number_at<I>(s, row, column + first, decltype(w)::value) = stored[decltype(w)::value];
      });
    return encoder;
  };
  decltype(closed(0)) encoders[in_registers ? 1 : chunks];
  if constexpr (!in_registers)  // all blocks first, which hides how long each takes
    for (int c = 0; c < chunks; c++) encoders[c] = c % span ? encoders[c - 1] : closed(c);
  const u32 key = noise.key[I + 1];
  ELEMENTS for (int c = 0; c < chunks; c++) {
    const int first = (c * LANES + lane) * E, count = n - first < E ? n - first : E;
    if (count <= 0) continue;
    const auto encoder = in_registers ? closed(c) : encoders[in_registers ? 0 : c];
    auto* to = codes_at<I>(s, row, column + first);
    const u32 near = noise_from(key, (u32)(s.col0 + column + first));
    const bool wide = aligned && count == E;
    auto put = [&](auto full) {
      constexpr bool FULL = decltype(full)::value;
      Codes<C<I>, E, FULL> codes;
      codes.begin(to);
      const auto e = encoder;
      auto encode = [&](int i, u32 drawn) { codes.put(i, C<I>::encode(kept[I][c][i], e, drawn)); };
      if constexpr (FULL && !in_registers && C<I>::stream != 0)
        drawing(differences[I], near, encode);
      else
        ELEMENTS for (int i = 0; i < (FULL || in_registers ? E : count); i++)
          encode(i, C<I>::stream != 0 ? noise_near(near, (u32)i) : 0);
      codes.store(to, count, wide);
    };
    if (!in_registers && count == E)
      put(Index<1>{});
    else
      put(Index<0>{});
  }
}

}  // namespace shardopt
