// The CPU's side: one thread is a team, threads share the tiles of a bucket.
#pragma once
#include "tile.h"

namespace shardopt {

template <class K>
struct Thread {
  static constexpr int E = K::Slots::narrowest(), chunks = K::tile / E;
  using Span = typename K::Span;

  // Tiles first..last-1 of all spans together.
  static void run(const Span* spans, i64 count, const double* numbers, i64 stride, i64 first, i64 last) {
    i64 at = span_of(spans, count, first);
    double known = -1;
    i64 group = -1;
    typename K::Scalars h{};
    for (i64 tile = first; tile < last; at++) {
      const Span& s = spans[at];
      i64 across = K::across(s), end = s.tile0 + s.rows * across;
      if (tile >= end) continue;
      double t = (double)*s.step + 1;
      if (t != known || s.group != group) h = K::derive(numbers + s.group * stride, t);
      known = t, group = s.group;
      auto noise = K::noise(s.key, (i64)t);
      i64 row = (tile - s.tile0) / across, column = (tile - s.tile0) % across * K::tile;
      auto drawn = K::row_noise(noise, s.row0 + row);
      for (; tile < end && tile < last; tile++) {
        one(s, h, drawn, row, column);
        column += K::tile;
        if (column >= s.cols) column = 0, row++, drawn = K::row_noise(noise, s.row0 + row);
      }
    }
  }

  static void one(const Span& s, const typename K::Scalars& h, const typename K::RowNoise& noise, i64 row, i64 column) {
    int n = (int)(s.cols - column < K::tile ? s.cols - column : K::tile);
    ahead(s, row, column);
    Member<K, E, 1> member;
    member.forward(s, h, noise, row, column, n, 0);
    agree(member);
    member.finish(s, noise, row, column, n, 0);
  }

  // The extremes of a block that spans several chunks.
  HD static void agree(Member<K, E, 1>& m) {
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

  HD static void ahead(const Span& s, i64 row, i64 column) {
    const char* p = (const char*)s.p + (row * s.ld + column + K::tile) * sizeof(typename K::P::T);
    const char* g = (const char*)s.g + (row * s.ld + column + K::tile) * sizeof(typename K::G::T);
    for (unsigned i = 0; i < K::tile * sizeof(typename K::P::T); i += 64) __builtin_prefetch(p + i, 1);
    for (unsigned i = 0; i < K::tile * sizeof(typename K::G::T); i += 64) __builtin_prefetch(g + i, 0);
  }
};

constexpr i64 piece = 1 << 14;  // elements that a thread takes at a time

template <class K>
void run_all(const void* spans, i64 count, i64 tiles, const double* numbers, i64 stride, float* const* steps,
             i64 n_steps, int threads) {
  const i64 several = piece / K::tile > 1 ? piece / K::tile : 1, pieces = (tiles + several - 1) / several;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && pieces > 1)
  for (i64 i = 0; i < pieces; i++) {
    i64 first = i * several, last = first + several < tiles ? first + several : tiles;
    Thread<K>::run((const typename K::Span*)spans, count, numbers, stride, first, last);
  }
  for (i64 i = 0; i < n_steps; i++) *steps[i] += 1;  // only now: every thread has read its own
}

}  // namespace shardopt

#define SHARDOPT_CPU(KEY)                                                                                           \
  extern "C" void shardopt_step(const void* spans, long long count, long long tiles, const double* numbers,         \
                                long long stride, float* const* steps, long long n_steps, int threads) {            \
    shardopt::run_all<KEY>(spans, count, tiles, numbers, stride, steps, n_steps, threads);                          \
  }
