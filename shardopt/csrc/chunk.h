// One chunk of a tile, element by element: read and updated, and later encoded.
#pragma once
#include "tile.h"

namespace shardopt {

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
  auto noise_of = [&](int stream, int e) INLINE {
    return in_blocks && (FULL || !K::extremes) ? noise_near(near[stream], (u32)e) : noise_at(draw.key[stream], first + e);
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
    auto stored = [&](auto i, float y) INLINE {
      constexpr int S = decltype(i)::value;
      u32 random = C<S>::stream != 0 ? noise_of(S + 1, e) : 0;
      if constexpr (C<S>::block > 0)
        return pick<S>(storing).value(y, random);
      else
        return C<S>::decode((typename C<S>::Code)C<S>::encode(y, random));
    };
    Cells<K, PASS, decltype(stored)> cells{old, fresh, want, 0, stored};
    if constexpr (K::held(PASS)) cells.factor = sink.factor(h.line, column + e, c, e);
    if constexpr (K::Rule::answered && PASS > K::from_answer)
      cells.answer = in_registers && e >= n ? 0 : h.answer[column + e];  // which may end here
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
            if ((!in_registers || e < n) && !(C<S>::across && writes<Sink>)) {
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
    auto write = [&](int e, u32 random) INLINE {
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
        if constexpr (C<S>::across && writes<Sink>)
          answered<S>(s, h, row, column, c);
        else if constexpr (C<S>::block > 0)
          most[S][c] = high[S] & 0x7fffffffu, fewest[S][c] = low[S] + 1;
        else if constexpr (writes<Sink> && S != K::factored)
          pick<S>(codes).store(codes_at<S>(s, row, column), n, wide);
      },
      Seq<I...>{});
}

template <class K, int E, int LANES, int TILES>
template <int I, class Encoder>
HD void Member<K, E, LANES, TILES>::encode(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n,
                                           int first, int c, bool aligned, const Encoder& encoder) {
  auto* to = codes_at<I>(s, row, column + first);
  const int count = n - first < E ? n - first : E;
  const u32 key = noise.key[I + 1], at = (u32)(s.col0 + column + first), near = noise_from(key, at);
  const bool wide = aligned && count == E;
  auto put = [&](auto full) {
    constexpr bool FULL = decltype(full)::value;
    Codes<C<I>, E, FULL> codes;
    codes.begin(to);
    const auto e = encoder;
    auto one = [&](int i, u32 drawn) INLINE { codes.put(i, C<I>::encode(kept[I][c][i], e, drawn)); };
    if constexpr (FULL && !in_registers && C<I>::stream != 0)
      drawing(differences[I], near, one);
    else
      ELEMENTS for (int i = 0; i < (FULL || in_registers ? E : count); i++)
        one(i, C<I>::stream == 0 ? 0 : FULL || !K::extremes ? noise_near(near, (u32)i) : noise_at(key, at + (u32)i));
    codes.store(to, count, wide);
  };
  if (!in_registers && count == E)
    put(Index<1>{});
  else
    put(Index<0>{});
}

}  // namespace shardopt
