// The body of every step: one tile of a row, held by a team. On a CPU the team is one thread that walks the tile in
// chunks of E elements; on a GPU it is a warp whose 32 lanes hold 8 elements of every chunk. Everything is read once
// and written once; between `forward` and `finish` the team agrees on the extremes of the blocks.
#pragma once
#include "step.h"

namespace shardopt {

// In memory, a loop over elements ends at the last one and is vectorised. In registers, which have no addresses, it is
// unrolled: all E are worked out, and only those that exist are loaded, stored and counted.
#ifdef SHARDOPT_REGISTERS
#define ELEMENTS UNROLL
constexpr bool in_registers = true;
#else
#define ELEMENTS IVDEP
constexpr bool in_registers = false;
#endif

// E elements of memory: in place on a CPU; in registers on a GPU, moved 16 bytes at a time where all n == E exist and
// are aligned (`wide`).
template <class T, int E>
struct Window {
#ifdef SHARDOPT_REGISTERS
  alignas(16) T x[E];
  HD void load(const T* from, int n, bool wide) {
    if (wide)
      copy(x, from);
    else
      UNROLL for (int i = 0; i < E; i++) x[i] = i < n ? from[i] : T(0);
  }
  HD void store(T* to, int n, bool wide) {
    if (wide)
      copy(to, x);
    else
      UNROLL for (int i = 0; i < E; i++)
        if (i < n) to[i] = x[i];
  }
  HD static void copy(T* to, const T* from) {
    constexpr int bytes = E * sizeof(T), piece = bytes >= 16 ? 16 : bytes;
    UNROLL for (int i = 0; i < bytes / piece; i++) {
      if constexpr (piece == 16) ((uint4*)to)[i] = ((const uint4*)from)[i];
      if constexpr (piece == 8) ((uint2*)to)[i] = ((const uint2*)from)[i];
      if constexpr (piece == 4) ((uint1*)to)[i] = ((const uint1*)from)[i];
    }
  }
#else
  T* x;
  HD void load(const T* from, int, bool) { x = const_cast<T*>(from); }
  HD void store(T*, int, bool) {}
#endif
  HD T& operator[](int i) { return x[i]; }
};

// Codes of E elements; two of a byte are taken apart before the loop and put together after it.
template <class C, int E, bool FULL>
struct Codes {
  static constexpr bool all = FULL || in_registers;
  using T = typename C::Code;
  Window<T, E / C::packed> bytes;
  u8 apart[C::packed == 2 ? E : 1];
  HD void load(const T* from, int n, bool wide) {
    bytes.load(from, C::packed == 2 ? (n + 1) / 2 : n, wide);
    if constexpr (C::packed == 2) {
      ELEMENTS for (int i = 0; i < (all ? E : n + 1) / 2; i++) {
        apart[2 * i] = bytes[i] & 15;
        apart[2 * i + 1] = bytes[i] >> 4;
      }
    }
  }
  HD void begin(T* to) {
    if constexpr (!in_registers) bytes.load(to, E, true);
  }
  HD auto get(int i) {
    if constexpr (C::packed == 2) {
      return (int)apart[i];
    } else {
      return bytes[i];
    }
  }
  template <class V>
  HD void put(int i, V code) {
    if constexpr (C::packed == 2) {
      apart[i] = (u8)code;
    } else {
      bytes[i] = (T)code;
    }
  }
  HD void store(T* to, int n, bool wide) {
    if constexpr (C::packed == 2) {
      ELEMENTS for (int i = 0; i < (all ? E : n + 1) / 2; i++) {
        u8 high = !FULL && 2 * i + 1 == n ? (u8)C::zero : apart[2 * i + 1];
        bytes[i] = (u8)(apart[2 * i] | (high << 4));
      }
    }
    bytes.store(to, C::packed == 2 ? (n + 1) / 2 : n, wide);
  }
};

// One member of a team and its share of a tile: chunk c holds elements c * E * LANES + lane * E and following.
template <class K, int E, int LANES>
struct Member {
  using Span = typename K::Span;
  template <int I>
  using C = typename K::Slots::template at<I>;
  static constexpr int chunks = K::tile / (E * LANES), slots = K::slots;

  float kept[slots + 1][chunks][E];
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

  // Read, update, write p and what is stored element by element; keep the rest. column: of the tile; n: its length;
  // aligned: whether every array's first element of a row begins at a multiple of what `Window::copy` moves.
  HD void forward(const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, i64 row, i64 column,
                  int n, int lane, bool aligned = true) {
    ELEMENTS for (int c = 0; c < chunks; c++) {
      int first = (c * LANES + lane) * E, count = n - first;
      each<slots>([&](auto i) { most[decltype(i)::value][c] = 0, fewest[decltype(i)::value][c] = inf_bits; });
      if (count <= 0) continue;
      if (!in_registers && count >= E)
        chunk<true>(s, h, noise, row, column + first, E, c, true);
      else
        chunk<false>(s, h, noise, row, column + first, count < E ? count : E, c, aligned && count >= E);
    }
  }

  template <bool FULL, int... I>
  HD void chunk_of(const Span& s, const typename K::Scalars& scalars, const typename K::RowNoise& noise, i64 row,
                   i64 column, int n, int c, bool wide, Seq<I...>);
  template <bool FULL>
  HD void chunk(const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, i64 row, i64 column,
                int n, int c, bool wide) {
    chunk_of<FULL>(s, h, noise, row, column, n, c, wide, typename Count<slots>::type{});
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

// The decoding numbers of a slot's block, or nothing.
template <class C, bool BLOCKED>
struct Opened {
  HD static Opened at(const float*, const float*) { return {}; }
  template <class V>
  HD float decode(V code) const {
    return C::decode(code);
  }
};
template <class C>
struct Opened<C, true> {
  typename C::Scale scale;
  HD static Opened at(const float* a, const float* b) { return {C::open(a, b)}; }
  template <class V>
  HD float decode(V code) const {
    return C::decode(code, scale);
  }
};

// A slot's things, by the slot's index.
template <int I, class T>
struct Leaf {
  T value;
};
template <class S, class... T>
struct Leaves;
template <int... I, class... T>
struct Leaves<Seq<I...>, T...> : Leaf<I, T>... {};
template <int I, class T>
HD T& pick(Leaf<I, T>& leaf) {
  return leaf.value;
}

template <class K, int E, int LANES>
template <bool FULL, int... I>
HD void Member<K, E, LANES>::chunk_of(const Span& s, const typename K::Scalars& scalars,
                                      const typename K::RowNoise& noise, i64 row, i64 column, int n, int c, bool wide,
                                      Seq<I...>) {
  using P = typename K::P;
  using G = typename K::G;
  const auto h = scalars;  // a copy whose address nobody has: it stays in registers
  const auto draw = noise;
  auto* to = (typename P::T*)s.p + row * s.ld + column;
  constexpr bool all = FULL || in_registers;
  Window<typename P::T, E> p;
  Window<typename G::T, E> g;
  Leaves<Seq<I...>, Codes<C<I>, E, FULL>...> codes;
  Leaves<Seq<I...>, Opened<C<I>, (C<I>::block > 0)>...> opened;
  p.load(to, n, wide);
  g.load((const typename G::T*)s.g + row * s.ld + column, n, wide);
  each(
      [&](auto i) {
        constexpr int S = decltype(i)::value;
        pick<S>(codes).load(codes_at<S>(s, row, column), n, wide);
        if constexpr (C<S>::block > 0)
          pick<S>(opened) = Opened<C<S>, true>::at(number_at<S>(s, row, column, 0),
                                                   number_at<S>(s, row, column, C<S>::numbers - 1));
      },
      Seq<I...>{});
  const u32 first = (u32)(s.col0 + column);
  u32 high[slots + 1] = {}, low[slots + 1];
  ((low[I] = inf_bits), ...);
  ELEMENTS for (int e = 0; e < (all ? E : n); e++) {
    float x = P::load(p[e]), old[slots + 1], fresh[slots + 1];
    ((old[I] = pick<I>(opened).decode(pick<I>(codes).get(e))), ...);
    float d = K::Gradient::template apply<false>(x, G::load(g[e]), 0, h.gradient);
    float u = K::Rule::update(x, d, old, fresh, h.rule);
    u = K::Direction::template apply<true>(x, d, u, h.direction);
    float delta = K::Decay::delta(u * h.rule.step, x, u, h.lr, h.decay);
    u32 random = K::Write::noisy && !P::exact ? noise_at(draw.key[0], first + e) : 0;
    p[e] = K::Write::template apply<P>(x, delta, old, fresh, random);
    each(
        [&](auto i) {
          constexpr int S = decltype(i)::value;
          if constexpr (C<S>::block > 0) {
            u32 magnitude = bits(fresh[S]) & 0x7fffffffu;
            if (!in_registers || e < n) {
              high[S] = larger(high[S], magnitude);
              if constexpr (C<S>::least) low[S] = smaller(low[S], fresh[S] > 0 ? magnitude : inf_bits);
            }
            kept[S][c][e] = C<S>::prepare(fresh[S]);
          } else {
            u32 drawn = C<S>::stream != 0 ? noise_at(draw.key[S + 1], first + e) : 0;
            pick<S>(codes).put(e, C<S>::encode(fresh[S], drawn));
          }
        },
        Seq<I...>{});
  }
  p.store(to, n, wide);
  each(
      [&](auto i) {
        constexpr int S = decltype(i)::value;
        if constexpr (C<S>::block > 0)
          most[S][c] = high[S], fewest[S][c] = low[S];
        else
          pick<S>(codes).store(codes_at<S>(s, row, column), n, wide);
      },
      Seq<I...>{});
}

template <class K, int E, int LANES>
template <int I>
HD void Member<K, E, LANES>::finish_slot(const Span& s, const typename K::RowNoise& noise, i64 row, i64 column, int n,
                                         int lane, bool aligned) {
  constexpr int block = C<I>::block;
  const u32 key = noise.key[I + 1];
  ELEMENTS for (int c = 0; c < chunks; c++) {
    int first = (c * LANES + lane) * E, count = n - first < E ? n - first : E;
    if (count <= 0) continue;
    float stored[2];
    auto encoder = C<I>::close(most[I][c], fewest[I][c], stored);
    if (first % block == 0)
      each<C<I>::numbers>([&](auto w) {
        *number_at<I>(s, row, column + first, decltype(w)::value) = stored[decltype(w)::value];
      });
    auto* to = codes_at<I>(s, row, column + first);
    const u32 global = (u32)(s.col0 + column + first);
    const bool wide = aligned && count == E;
    auto put = [&](auto full) {
      constexpr bool FULL = decltype(full)::value;
      Codes<C<I>, E, FULL> codes;
      codes.begin(to);
      const auto e = encoder;
      ELEMENTS for (int i = 0; i < (FULL || in_registers ? E : count); i++) {
        u32 drawn = C<I>::stream != 0 ? noise_at(key, global + i) : 0;
        codes.put(i, C<I>::encode(kept[I][c][i], e, drawn));
      }
      codes.store(to, count, wide);
    };
    if (!in_registers && count == E)
      put(Index<1>{});
    else
      put(Index<0>{});
  }
}

}  // namespace shardopt
