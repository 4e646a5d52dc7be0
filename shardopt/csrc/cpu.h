// The CPU's side: one thread is a team, threads share the tiles of a bucket.
#pragma once
#include "chunk.h"

namespace shardopt {

// What a piece wants, added up: in 32 lanes, as it is vectorised, whatever the machine; or put where it was asked for.
template <class K, int PASS>
struct Adding : Writing<PASS> {
  static constexpr int lanes = 32;
  static constexpr Wants wants = K::wants(PASS);
  static constexpr int values = wants.values();
  double sums[values][lanes] = {};
  double* columns = nullptr;   // of the span's first column
  float* elements = nullptr;  // of the row, of the span's first column

  template <int COUNT, int E>
  HD void take(const float (&wanted)[COUNT][E], i64 column, int n, int) {
    if constexpr (wants.elements) {
      for (int e = 0; e < n; e++) elements[column + e] = wanted[0][e];
      return;
    }
    for (int k = 0; k < values; k++) {
      int e = 0;
      if constexpr (E >= lanes)
        for (; e + lanes <= n; e += lanes)
          for (int l = 0; l < lanes; l++) sums[k][l] += wanted[k][e + l];
      for (int l = 0; e + l < n; l++) sums[k][l] += wanted[k][e + l];
    }
    if constexpr (wants.cols)
      for (int e = 0; e < n; e++) columns[column + e] += wanted[0][e];
  }
  double taken(int k) {  // the sum, which begins anew
    double sum = 0;
    for (int l = 0; l < lanes; l++) sum += sums[k][l], sums[k][l] = 0;
    return sum;
  }
};

// What a call of a kernel that asks is told besides; made by shardopt/kernels/passes.py.
template <class K>
struct Asked {
  const Place* places;         // one a span
  const void* const* answers;  // of every parameter, in the order in which they were asked
  i64 pieces;                  // of all spans
  double* scratch;             // the sums of every piece
  const Gather* gathers;
  i64 gathered;
  const Settle* settles;
  i64 settled;
  const Close* closes;
  i64 closed;
  Answers of(const Place& place) const { return answers + place.parameter * K::asks; }
};

template <class K>
struct Thread {
  // What a block's numbers come to is worked out for several tiles of a row at a time, which hides how long it takes.
  static constexpr bool in_blocks = K::Slots::widest() > 0;
  static constexpr int E = K::Slots::narrowest(), enough = K::Slots::tabled() ? 1024 : in_blocks ? 512 : 0;
  static constexpr int tiles = K::tile < enough ? enough / K::tile : 1;
  static constexpr int width = K::tile * tiles, chunks = width / E;
  using Member = shardopt::Member<K, E, 1, tiles>;
  using Span = typename K::Span;

  // Tiles first..last-1 of all spans together.
  static void run(const Span* spans, i64 count, const double* numbers, i64 stride, const Asked<K>* asked, i64 first,
                  i64 last) {
    i64 at = span_of(spans, count, first);
    double known = -1;
    i64 group = -1;
    typename K::Scalars h{};
    Writing<K::rounds> sink;
    typename Only<in_blocks, Member>::type member;
    for (i64 tile = first; tile < last; at++) {
      const Span& s = spans[at];
      i64 across = K::across(s), end = s.tile0 + s.rows * across;
      if (tile >= end) continue;
      const double t = (double)*s.step + 1, *n = numbers + s.group * stride;
      if constexpr (K::rounds > 0)
        h = K::template informed<K::rounds>(s, asked->places[at], n, t, asked->of(asked->places[at]));
      else if (t != known || s.group != group)
        h = K::derive(n, t);
      known = t, group = s.group;
      auto noise = K::noise(s.key, (i64)t);
      i64 row = (tile - s.tile0) / across, column = (tile - s.tile0) % across * K::tile;
      auto drawn = K::row_noise(noise, s.row0 + row);
      auto entered = enter<K::rounds>(h, s, asked, at, row);
      for (const i64 stop = end < last ? end : last; tile < stop;) {
        const i64 left = across - column / K::tile, whole = left < tiles ? left : tiles;
        const i64 some = whole < stop - tile ? whole : stop - tile;
        if constexpr (!in_blocks) ahead<K::rounds>(s, row, column + 2 * width);  // one further is too late
        if constexpr (in_blocks)
          one(member, s, entered, drawn, sink, row, column, some * K::tile);
        else
          alone(s, entered, drawn, sink, row, column, some * K::tile);
        column += some * K::tile, tile += some;
        if (column >= s.cols && tile < end) {
          column = 0, row++;
          drawn = K::row_noise(noise, s.row0 + row);
          entered = enter<K::rounds>(h, s, asked, at, row);
        }
      }
    }
  }

  template <int PASS>
  HD static typename K::Scalars enter(const typename K::Scalars& h, const Span& s, const Asked<K>* asked, i64 at,
                                      i64 row) {
    if constexpr (K::by_row) return K::template enter<PASS>(h, s, asked->places[at], asked->of(asked->places[at]), row);
    return h;
  }

  // Without blocks nothing outlasts a tile. Measured: 3 % faster out of line, bf16 state on Zen 5.
  template <class Sink>
  __attribute__((noinline)) static void alone(const Span& s, const typename K::Scalars& h,
                                              const typename K::RowNoise& noise, Sink& sink, i64 row, i64 column,
                                              i64 most) {
    Member member;
    one(member, s, h, noise, sink, row, column, most);
  }
  template <class Sink>
  static void one(Member& member, const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise,
                  Sink& sink, i64 row, i64 column, i64 most) {
    const int n = (int)(s.cols - column < most ? s.cols - column : most);
    if constexpr (K::previews > 0) {
      member.begin();
      Writing<Sink::pass, true> preview;
      for (int i = 0; i < K::previews; i++) {
        member.forward(s, h, noise, preview, row, column, n, 0);
        agree(member);
      }
    }
    member.forward(s, h, noise, sink, row, column, n, 0);
    if constexpr (Sink::pass == K::rounds) member.finish(s, noise, row, column, n, 0);
  }

  // The extremes of a block that spans several chunks.
  HD static void agree(Member& m) {
    each<K::slots>([&](auto i) {
      constexpr int I = decltype(i)::value, block = K::Slots::template at<I>::block, span = block / E;
      if constexpr (span > 1)
        for (int c = 0; c < chunks; c += span) {
          u32 most = 0, fewest = inf_bits;
          for (int k = c; k < c + span; k++) most = larger(most, m.most[I][k]), fewest = smaller(fewest, m.fewest[I][k]);
          for (int k = c; k < c + span; k++) m.most[I][k] = most, m.fewest[I][k] = fewest;
        }
    });
  }

  // Of what is only read: what is written as well, the processor foresees better than this. Beside the codes of blocks
  // it does not help, and may cost a tenth.
  template <int PASS>
  HD static void ahead(const Span& s, i64 row, i64 column) {
    const i64 at = row * s.ld + column;
    if constexpr (PASS < K::rounds && K::weighs(PASS)) fetch((const typename K::P::T*)s.p + at);
    fetch((const typename K::G::T*)s.g + at);
  }
  template <class T>
  HD static void fetch(const T* from) {
    for (unsigned i = 0; i < width * sizeof(T); i += 64) __builtin_prefetch((const char*)from + i);
  }

  // What one piece wants in this pass, into its places of the scratch memory.
  template <int PASS>
  static void piece(const Span* spans, i64 count, const double* numbers, i64 stride, const Asked<K>& a, i64 index) {
    const i64 at = span_of(a.places, count, index);
    const Span& s = spans[at];
    const Place& place = a.places[at];
    const i64 down = (index - place.tile0) / place.across, beside = (index - place.tile0) % place.across;
    const i64 bottom = (down + 1) * place.high < s.rows ? (down + 1) * place.high : s.rows;
    const i64 left = beside * place.wide, right = left + place.wide < s.cols ? left + place.wide : s.cols;
    const double t = (double)*s.step + 1, *n = numbers + s.group * stride;
    const auto h = K::template informed<PASS>(s, place, n, t, a.of(place));
    const auto noise = K::noise(s.key, (i64)t);
    constexpr Wants wants = K::wants(PASS);
    typename At<wants.extremes == 0, Writing<PASS, true>, Adding<K, PASS>>::type sink;
    Member member;
    double whole = 0;  // of the rows
    if constexpr (wants.cols) {
      sink.columns = a.scratch + place.cols0 + down * s.cols;
      for (i64 j = left; j < right; j++) sink.columns[j] = 0;
    }
    for (i64 row = down * place.high; row < bottom; row++) {
      const auto drawn = K::row_noise(noise, s.row0 + row);
      const auto entered = enter<PASS>(h, s, &a, at, row);
      if constexpr (wants.elements) sink.elements = K::row_at(a.of(place), s, place, row);
      for (i64 column = left; column < right; column += width) {
        bool more = column + width < right;
        ahead<PASS>(s, more ? row : row + 1, more ? column + width : left);
        const int n = (int)(right - column < width ? right - column : width);
        one(member, s, entered, drawn, sink, row, column, n);
        if constexpr (wants.extremes > 0) agree(member), member.offer(s, entered, row, column, n, 0);
      }
      if constexpr (wants.rows) whole += a.scratch[place.rows0 + beside * s.rows + row] = sink.taken(0);
    }
    if constexpr (wants.cols) a.scratch[index] = whole;
    if constexpr (wants.sums > 0)
      for (int k = 0; k < Adding<K, PASS>::values; k++) a.scratch[index * Adding<K, PASS>::values + k] = sink.taken(k);
  }
};

// Elements that a thread takes at a time: enough to hide what taking costs, and where there are many, so many that
// no two threads are in one page and the processor's prefetching is seldom broken off.
constexpr i64 few = 1 << 14, many = 1 << 19, turns = 16;  // of every thread

inline void gather(const Gather& a, const double* scratch) {
  for (i64 i = 0; i < a.count; i++) a.out[i] = 0;
  for (i64 k = 0; k < a.n; k++)
    for (i64 i = 0; i < a.count; i++) a.out[i] += a.row ? (double)a.row[k] : scratch[a.from + k * a.count + i];
}

template <class K>
void settle(const Settle& a, const double* numbers, i64 stride) {
  const float decay = (float)K::Rule::decay(numbers + a.group * stride, (double)*a.step + 1);
  for (i64 i = 0; i < a.count; i++) a.part[i] = Factored::moved(a.part, a.means, decay, i);
}

template <class K>
void close(const Close& a, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && a.count > few)
  for (i64 i = 0; i < a.count; i++) K::close(a, i);
}

template <class K>
void run_all(const void* spans, i64 count, i64 tiles, const double* numbers, i64 stride, float* const* steps,
             i64 n_steps, int threads, const Asked<K>* asked = nullptr) {
  const i64 fair = tiles / (threads * turns) * K::tile, wanted = fair < few ? few : fair > many ? many : fair;
  const i64 several = wanted / K::tile > 1 ? wanted / K::tile : 1, pieces = (tiles + several - 1) / several;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && pieces > 1)
  for (i64 i = 0; i < pieces; i++) {
    i64 first = i * several, last = first + several < tiles ? first + several : tiles;
    Thread<K>::run((const typename K::Span*)spans, count, numbers, stride, asked, first, last);
  }
  if constexpr (K::factors) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && pieces > 1)
    for (i64 i = 0; i < asked->settled; i++) settle<K>(asked->settles[i], numbers, stride);
  }
  if constexpr (K::extremes > 0)
    for (i64 i = 0; i < asked->closed; i++) close<K>(asked->closes[i], threads);
  for (i64 i = 0; i < n_steps; i++) *steps[i] += 1;  // only now: every thread has read its own
}

template <class K, int PASS>
void pass(const void* spans, i64 count, const double* numbers, i64 stride, int threads, const Asked<K>& asked) {
  auto* all = (const typename K::Span*)spans;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && asked.pieces > 1)
  for (i64 i = 0; i < asked.pieces; i++) Thread<K>::template piece<PASS>(all, count, numbers, stride, asked, i);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && asked.pieces > 1)
  for (i64 i = 0; i < asked.gathered; i++) gather(asked.gathers[i], asked.scratch);
}

// Which pass it is, as a number of the program.
template <class K>
void run_pass(i64 which, const void* spans, i64 count, const double* numbers, i64 stride, int threads,
              const Asked<K>& asked) {
  each<K::rounds>([&](auto i) {
    if (which == decltype(i)::value) pass<K, decltype(i)::value>(spans, count, numbers, stride, threads, asked);
  });
}

}  // namespace shardopt

#define SHARDOPT_CPU(KEY)                                                                                           \
  extern "C" void shardopt_step(const void* spans, long long count, long long tiles, const double* numbers,         \
                                long long stride, float* const* steps, long long n_steps, int threads,              \
                                const void* asked) {                                                                \
    shardopt::run_all<KEY>(spans, count, tiles, numbers, stride, steps, n_steps, threads,                           \
                           (const shardopt::Asked<KEY>*)asked);                                                     \
  }                                                                                                                 \
  extern "C" void shardopt_pass(long long which, const void* spans, long long count, const double* numbers,         \
                                long long stride, int threads, const void* asked) {                                 \
    shardopt::run_pass<KEY>(which, spans, count, numbers, stride, threads, *(const shardopt::Asked<KEY>*)asked);    \
  }
