// A tile in a warp's registers: 256 elements of a row, of which a lane holds 8. Calm is one that is whole and aligned
// and whose numbers are neither tiny, huge nor broken: what formats do for the sake of those is left out there, and
// nothing asks how many elements exist. Whether it was calm is known before anything of it is written.
#pragma once
#include "calm.h"
#include "tile.h"

namespace shardopt {

// How parameters are rounded on their way to memory. Where they are calm, stochastic rounding is an addition.
template <class P, bool ADDED>
struct Rounded {
  static constexpr int at = 0;  // the first byte of a rounded number in its word
  using Memory = P;
};
struct Added : BF16 {
  using T = u32;
  HD static u32 store(float x, u32 noise) {  // NaN, which has the largest bits there are, stays NaN
    return signed_larger(bits(x) + (noise & 0xffffu), bits(x));
  }
};
template <>
struct Rounded<BF16, true> {
  static constexpr int at = 2;
  using Memory = Added;
};

// Whether tiles of a key are held by `Held`: by tile.h where they are wider, or walked more than once.
template <class K>
constexpr bool holds = in_registers && K::rounds == 0 && !K::stored && !K::factors && K::tile == 256;

// What a warp knows of a run of tiles: in shared memory, since registers are scarce; in pieces of 16 bytes.
template <class K>
struct alignas(16) Run {
  static constexpr int slots = K::slots;
  struct alignas(16) Draw {
    u32 key;
    Steps steps;
  };
  void* p;
  const void* g;
  void* codes[slots + 1];
  float* numbers[2][slots + 1];
  Draw draws[slots + 1];  // of every stream
  typename K::Scalars scalars;
  u32 two23;  // the bits of 2^23, which the compiler would put into a register wherever it needs them
  int length;
  bool aligned;

  HD void open(const typename K::Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, i64 row,
               i64 column, bool aligned_) {
    using Share = Member<K, 8, 32>;
    p = (typename K::P::T*)s.p + row * s.ld + column;
    g = (const typename K::G::T*)s.g + row * s.ld + column;
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      codes[I] = Share::template codes_at<I>(s, row, column);
      each<K::Slots::template at<I>::numbers>([&](auto w) {
        constexpr int which = decltype(w)::value;
        numbers[which][I] = Share::template number_at<I>(s, row, column, which);
      });
    });
    UNROLL for (int i = 0; i <= slots; i++)
      draws[i] = {noise.key[i], Steps::of(noise_from(noise.key[i], (u32)(s.col0 + column)))};
    scalars = h, two23 = 0x4b000000u, aligned = aligned_;
    length = (int)(s.cols - column < K::tile ? s.cols - column : K::tile);
  }
};

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

  u32 column, at;  // of the lane's first element: global, and eighths from the first of the run
  template <int... I>
  static Leaves<Seq<I...>, Pack<C<I>>...> packs_of(Seq<I...>);
  Elements<typename K::P> changed;
  decltype(packs_of(typename Count<slots>::type{})) packs;  // what is stored
  float fresh[slots + 1][E];
  u32 most[slots + 1], fewest[slots + 1];  // bits of the extremes
  Range range, dividends, squares;
  u32 spoilt;  // not 0 where a parameter is not finite

  HD void open(u32 first, int lane) { at = (u32)lane, column = first + at * E; }

  HD int existing(const Run& a) const { return CALM ? E : a.length - (int)at * E; }
  HD bool wide(const Run& a) const { return CALM || (a.aligned && existing(a) >= E); }
  template <int I>
  HD float* number(const Run& a, int which) const {
    return in_memory(a.numbers[which][I]) + at / (C<I>::block / E);
  }

  // Noise of the lane's elements but for the last steps.
  HD void draw(const typename Run::Draw& d, u32 (&products)[E]) const {
    d.steps.products(noise_from(d.key, column), products);
  }

  template <int I>
  HD u32 drawn(const Run& a, int e) const {  // the same of one element
    return C<I>::stream != 0 ? noise_at(a.draws[I + 1].key, column + (u32)e) : 0;
  }

  template <int... I>
  HD void update(const Run& a, Seq<I...> seq) {
    const auto& h = a.scalars;
    const int n = existing(a);
    Elements<typename K::G> gradient;
    Leaves<Seq<I...>, Pack<C<I>>...> stored;
    Leaves<Seq<I...>, Opened<C<I>, (C<I>::block > 0)>...> opened;
    if constexpr (CALM) changed.load(a.p, at), gradient.load(a.g, at);
    range = dividends = squares = {};
    each(
        [&](auto i) {
          constexpr int S = decltype(i)::value;
          if constexpr (CALM) pick<S>(stored).load(a.codes[S], at);
          if constexpr (C<S>::block > 0) {
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
            if constexpr (quick<S>)
              old[S] = Calm<C<S>>::decode(pick<S>(stored), e, pick<S>(opened).scale, a.two23);
            else
              old[S] = pick<S>(opened).decode(given(pick<S>(stored), a.codes[S]));
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
      ROLLED for (int e = 0; e < E; e++) element(e);
    }
    spoilt = 0;
    if constexpr (added) UNROLL for (int i = 0; i < E / 2; i++) spoilt = broken(changed.word[i], spoilt);
    ((most[I] = high[I], fewest[I] = low[I] + 1), ...);
  }
  HD void update(const Run& a) { update(a, typename Count<slots>::type{}); }

  // Whether nothing was left out that matters; the extremes are the blocks' now.
  HD bool calm() {
    each<slots>([&](auto i) {
      constexpr int S = decltype(i)::value;
      if constexpr (quick<S>) range.add(most[S]);
    });
    const bool found = range.calm() && (spoilt & 0x7fff7fffu) == 0;
    return found && dividends.calm(Calmly<K>::least_dividend, Calmly<K>::most_dividend) &&
           squares.calm(Calmly<K>::least_square, Calmly<K>::most_square);
  }

  // Encode and write everything, and move on by a tile.
  HD void finish(const Run& a) {
    bool doubtful[slots + 1] = {}, any = false;
    each<slots>([&](auto i) {
      constexpr int S = decltype(i)::value;
      doubtful[S] = encode<S>(a, pick<S>(packs)), any = any || doubtful[S];
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
  template <int I>
  HD bool encode(const Run& a, Pack<C<I>>& pack) {
    using Q = Calm<C<I>>;
    float stored[2];
    if constexpr (quick<I>) {
      const float stored[2] = {Q::number(most[I])}, scale = Q::close(most[I]);
      keep<I>(a, stored);
      u32 words[E], products[E];
      Doubt doubt;
      if constexpr (C<I>::stream != 0) draw(a.draws[I + 1], products);
      UNROLL for (int e = 0; e < E; e++)
        words[e] = Q::encode(fresh[I][e], scale, C<I>::stream != 0 ? noise_of_product(products[e]) : 0);
      UNROLL for (int e = 0; e < E; e += 2) doubt.add(words[e], words[e + 1], Q::fraction, Q::margin);
      UNROLL for (int e = 0; e < E; e++) words[e] = Q::settle(words[e], fresh[I][e]);
      pack.set(words, Q::at);
      UNROLL for (int i = 0; i < 2; i++) pack.word[i] = Q::finish(pack.word[i]);
      return doubt.found(Q::margin);
    } else if constexpr (CALM || C<I>::block > 0) {
      exact<I>(a, pack);
    }
    return false;
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
        const float x = fresh[I][0];
        u32 code = encode(x, drawn<I>(a, e));
        if constexpr (C<I>::packed == 2) code = e % 2 == 1 && e == n ? (u32)C<I>::zero : code;
        pack.turn(code), turn(fresh[I], x);
      }
    }
  }
};

}  // namespace shardopt
