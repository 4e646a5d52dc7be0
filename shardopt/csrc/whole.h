// A tile in a warp's registers: 256 elements of a row, of which a lane holds 8. Calm is one that is whole and aligned
// and whose numbers are neither tiny, huge nor broken: what formats do for the sake of those is left out there, and
// nothing asks how many elements exist. Whether it was calm is known before anything of it is written.
#pragma once
#include "run.h"

namespace shardopt {

// An element's slots in a calm tile: what it divides and takes roots of is looked at once for all elements.
template <class K>
struct Calmly : Cells<K, 0, Nothing> {
  Range &dividends, &squares;
  HD float root(float x) {
    if constexpr (calm_checked) squares.add(bits(x));
    return root_calm(x);
  }
  HD float over(float a, float b) {
    if constexpr (calm_checked) dividends.add(bits(a) << 1);
    return over_calm(a, b);
  }
  constexpr static u32 least_dividend = 0x17800000u << 1, most_dividend = 0x67800000u << 1;  // 2^-80, 2^80
  constexpr static u32 least_square = 0x0d800000u, most_square = calm_most;                  // 2^-100, 2^60
};

// A lane's share of a tile.
template <class K, bool CALM>
struct Held {
  using Run = shardopt::Run<K>;
  template <int I>
  using C = typename K::Slots::template at<I>;
  static constexpr int E = 8, tile = 256, slots = K::slots;
  static constexpr bool noisy = K::Write::noisy && !K::P::exact, in_blocks = K::Slots::widest() > 0;
  static constexpr bool added = CALM && noisy && Rounded<typename K::P, true>::at > 0;
  using Rounding = Rounded<typename K::P, added>;
  template <int I>
  static constexpr bool quick = CALM && Calm<C<I>>::doubts;
  template <int I>
  static constexpr bool looks = quick<I> && Calm<C<I>>::looks;

  u32 column, at;  // of the lane's first element: global, and eighths from the first of the run
  template <int... I>
  static Leaves<Seq<I...>, Pack<C<I>>...> packs_of(Seq<I...>);
  Elements<typename K::P> changed;
  Elements<typename K::G> gradient;
  decltype(packs_of(typename Count<slots>::type{})) packs;  // what is stored, and then what will be
  float entry[slots + 1], fresh[slots + 1][E];
  u32 most[slots + 1], fewest[slots + 1];  // bits of the extremes
  i32 measure[slots + 1];
  Range range, dividends, squares;
  u32 spoilt;  // not 0 where a parameter is not finite

  HD void open(u32 first, int lane) { at = (u32)lane, column = first + at * E; }

  HD int existing(const Run& a) const { return CALM ? E : a.length - (int)at * E; }
  HD bool wide(const Run& a) const { return CALM || (a.aligned && existing(a) >= E); }
  template <int I>
  HD float* number(const Run& a, int which) const {
    return in_memory(a.numbers[which][I]) + (existing(a) > 0 ? at / (C<I>::block / E) : 0);
  }

  // Noise of the lane's elements but for the last steps.
  HD void draw(const typename Run::Draw& d, u32 (&products)[E]) const {
    d.steps.products(noise_from(d.key, column), products);
  }

  template <int I>
  HD u32 drawn(const Run& a, int e) const {  // the same of one element
    return C<I>::stream != 0 ? noise_at(a.draws[I + 1].key, column + (u32)e) : 0;
  }

  // Read a calm tile, and work out this lane's share of what is looked up.
  HD void begin(const Run& a) {
    range = dividends = squares = {};
    if constexpr (CALM) {
      changed.load(a.p, at), gradient.load(a.g, at);
      each<slots>([&](auto i) {
        constexpr int S = decltype(i)::value;
        pick<S>(packs).load(a.codes[S], at);
        if constexpr (looks<S>) {
          entry[S] = Calm<C<S>>::entry(at % 16, *number<S>(a, 0), *number<S>(a, C<S>::numbers - 1));
          if constexpr (Calm<C<S>>::measured) range.most = larger(range.most, bits(entry[S]));
        }
      });
    }
  }

  template <class Look, int... I>
  HD void update(const Run& a, const Look& look, Seq<I...> seq) {
    const auto& h = a.scalars;
    const int n = existing(a);
    Leaves<Seq<I...>, Opened<C<I>, (C<I>::block > 0)>...> opened;
    each(
        [&](auto i) {
          constexpr int S = decltype(i)::value;
          if constexpr (C<S>::block > 0 && !looks<S>) {
            pick<S>(opened) = Opened<C<S>, true>::at(number<S>(a, 0), number<S>(a, C<S>::numbers - 1));
            if constexpr (quick<S>) range.add(bits(pick<S>(opened).scale.scale));
          }
        },
        seq);
    u32 high[slots + 1] = {}, low[slots + 1], words[E], products[E];
    ((low[I] = inf_bits - 1), ...);  // less 1, which makes a 0 the largest of all
    if constexpr (noisy && CALM) draw(a.draws[0], products);
    auto element = [&](int e) {
      const auto given = [&](auto& pack, const void* array) {
        if constexpr (CALM)
          return pack.get(e);
        else
          return pack.one(array, at * E + (u32)e, e < n);
      };
      float x = K::P::load(given(changed, a.p)), d = K::G::load(given(gradient, a.g));
      float old[slots + 1], made[slots + 1], want[1];
      each(
          [&](auto i) {
            constexpr int S = decltype(i)::value;
            if constexpr (looks<S>)
              old[S] = from_bits(look.template at<16>([](auto& m) { return bits(m.entry[S]); },
                                                      pick<S>(packs).nibbles_from(e)));
            else if constexpr (quick<S>)
              old[S] = Calm<C<S>>::decode(pick<S>(packs), e, pick<S>(opened).scale, a.two23);
            else
              old[S] = pick<S>(opened).decode(given(pick<S>(packs), a.codes[S]));
          },
          seq);
      const Nothing nothing;
      float u;
      if constexpr (CALM) {
        Calmly<K> cells{{old, made, want, 0, nothing}, dividends, squares};
        u = K::template direction<0>(x, d, cells, h, want);
      } else {
        Cells<K, 0, Nothing> cells{old, made, want, 0, nothing};
        u = K::template direction<0>(x, d, cells, h, want);
      }
      const float delta = K::Decay::delta(u * h.rule.step, x, u, h.lr, h.decay);
      const u32 random = noisy ? CALM ? noise_of_product(products[e]) : noise_at(a.draws[0].key, column + e) : 0;
      const u32 word = as_word(K::Write::template apply<typename Rounding::Memory>(x, delta, old, made, random));
      if constexpr (CALM)
        words[e] = word;
      else
        changed.turn(word);
      each(
          [&](auto i) {
            constexpr int S = decltype(i)::value;
            if constexpr (CALM)
              fresh[S][e] = made[S];
            else if constexpr (C<S>::block > 0)
              turn(fresh[S], made[S]);
            else
              pick<S>(packs).turn(as_word(C<S>::encode(made[S], drawn<S>(a, e))));
            if constexpr (C<S>::block > 0) {
              if constexpr (quick<S> && !Calm<C<S>>::is_signed) {
                high[S] = larger(high[S], bits(made[S]));
                if constexpr (C<S>::least) low[S] = smaller(low[S], bits(made[S]) - 1);
              } else if (CALM || e < n) {
                high[S] = bits(peak(from_bits(high[S]), made[S]));
                if constexpr (C<S>::least) low[S] = smaller(low[S], (bits(made[S]) & 0x7fffffffu) - 1);
              }
            }
          },
          seq);
    };
    if constexpr (CALM) {
      UNROLL for (int e = 0; e < E; e++) element(e);
      changed.set(words, Rounding::at);
    } else {
      ROLLED for (int e = 0; e < E; e++) forget(), element(e);
    }
    spoilt = 0;
    if constexpr (added) UNROLL for (int i = 0; i < E / 2; i++) spoilt = broken(changed.word[i], spoilt);
    ((most[I] = high[I], fewest[I] = low[I] + 1), ...);
  }
  template <class Look>
  HD void update(const Run& a, const Look& look) {
    update(a, look, typename Count<slots>::type{});
  }

  // Whether nothing was left out that matters; the extremes are the blocks' now.
  HD bool calm() {
    bool apart = true;
    each<slots>([&](auto i) {
      constexpr int S = decltype(i)::value;
      if constexpr (quick<S>) range.add(most[S]);
      if constexpr (quick<S> && Calm<C<S>>::measured) {
        apart = apart && Calm<C<S>>::calm(most[S], fewest[S]);
        measure[S] = Calm<C<S>>::measure(at % 2 == 0 ? most[S] : fewest[S]);
      }
    });
    const bool found = apart && range.calm() && (spoilt & 0x7fff7fffu) == 0;
    return found && dividends.calm(Calmly<K>::least_dividend, Calmly<K>::most_dividend) &&
           squares.calm(Calmly<K>::least_square, Calmly<K>::most_square);
  }

  // Encode and write everything, and move on by a tile.
  template <class Look>
  HD void finish(const Run& a, const Look& look) {
    bool doubtful[slots + 1] = {}, any = false;
    each<slots>([&](auto i) {
      constexpr int S = decltype(i)::value;
      doubtful[S] = encode<S>(a, look, pick<S>(packs)), any = any || doubtful[S];
    });
    if (any) each<slots>([&](auto i) {
        constexpr int S = decltype(i)::value;
        if constexpr (quick<S>)
          if (doubtful[S]) exact<S>(a, pick<S>(packs));
      });
    const int n = existing(a);
    const bool all = wide(a);
    changed.store(a.p, at, n, all);
    each<slots>([&](auto i) { pick<decltype(i)::value>(packs).store(a.codes[decltype(i)::value], at, n, all); });
    at += tile / E, column += tile;
  }

  // Whether the result is in doubt.
  template <int I, class Look>
  HD bool encode(const Run& a, const Look& look, Pack<C<I>>& pack) {
    using Q = Calm<C<I>>;
    if constexpr (quick<I>) {
      float stored[2];
      const auto encoder = closed<I>(look, stored);
      keep<I>(a, stored);
      u32 words[E], products[E];
      Doubt doubt;
      if constexpr (C<I>::stream != 0) draw(a.draws[I + 1], products);
      UNROLL for (int e = 0; e < E; e++)
        words[e] = Q::encode(fresh[I][e], encoder, C<I>::stream != 0 ? noise_of_product(products[e]) : 0);
      if constexpr (Q::cells) {
        UNROLL for (int e = 0; e < E; e++) {
          const auto cell = [](auto& m) { return Q::cell_of(m.at % 32); };
          words[e] = Q::placed(words[e], look.template at<32>(cell, Q::cell(words[e])));
        }
      }
      UNROLL for (int e = 0; e < E; e += 2) doubt.add(words[e], words[e + 1], Q::fraction, Q::margin);
      UNROLL for (int e = 0; e < E; e++) words[e] = Q::settle(words[e], fresh[I][e]);
      pack.set(words, Q::at);
      for (u32& word : pack.word) word = Q::finish(word);
      return doubt.found(Q::margin);
    } else if constexpr (CALM || C<I>::block > 0) {
      exact<I>(a, pack);
    }
    return false;
  }

  template <int I, class Look>
  HD auto closed(const Look& look, float* stored) const {
    using Q = Calm<C<I>>;
    if constexpr (Q::measured) {
      const auto measured = [](auto& m) { return (u32)m.measure[I]; };
      const i32 hi = (i32)look.template at<2>(measured, 0), lo = (i32)look.template at<2>(measured, 1);
      return Q::close(most[I], fewest[I], stored, hi, lo);
    } else {
      return Q::close(most[I], fewest[I], stored);
    }
  }

  // The lane that holds a block's first element stores its numbers.
  template <int I>
  HD void keep(const Run& a, const float (&stored)[2]) const {
    if (at % (C<I>::block / E) == 0 && existing(a) > 0)
      each<C<I>::numbers>([&](auto w) { *number<I>(a, decltype(w)::value) = stored[decltype(w)::value]; });
  }

  template <int I>
  HD void exact(const Run& a, Pack<C<I>>& pack) {
    if constexpr (C<I>::block > 0) {
      float stored[2];
      const auto encoder = C<I>::close(most[I], fewest[I], stored);
      if constexpr (!quick<I>) keep<I>(a, stored);
      encode_all<I>(a, pack, [&](float x, u32 noise) {
        return as_word((typename C<I>::Code)C<I>::encode(C<I>::prepare(x), encoder, noise));
      });
    } else {
      encode_all<I>(a, pack, [](float x, u32 noise) { return as_word(C<I>::encode(x, noise)); });
    }
  }
  // Where it is rare, by a loop: eight copies take a compiler eight times as long.
  template <int I, class F>
  HD void encode_all(const Run& a, Pack<C<I>>& pack, F&& encode) {
    if constexpr (CALM && !quick<I>) {
      u32 words[E], products[E];
      if constexpr (C<I>::stream != 0) draw(a.draws[I + 1], products);
      UNROLL for (int e = 0; e < E; e++)
        words[e] = encode(fresh[I][e], C<I>::stream != 0 ? noise_of_product(products[e]) : 0);
      pack.set(words);
    } else {
      const int n = existing(a);
      ROLLED for (int e = 0; e < E; e++) {
        forget();
        u32 code = encode(fresh[I][0], drawn<I>(a, e));
        if constexpr (C<I>::packed == 2) code = e % 2 == 1 && e == n ? (u32)C<I>::zero : code;
        pack.turn(code), turn(fresh[I], 0);
      }
    }
  }
};

}  // namespace shardopt
