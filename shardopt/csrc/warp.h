// A warp and a CTA at work, over abstract teams: cuda.h supplies real ones, emulated.h loops over lanes on a CPU.
//
//   Team   lanes(f): f(member, lane) for the lanes that this thread stands for; meet<WIDTH>(at, op): the register
//          at(member) becomes op over each group of WIDTH lanes
//   Cta    once(f): f by one thread, then visible to all; warps(f): f(warp, team); known: shared by all
#pragma once
#include "tile.h"

namespace shardopt {

constexpr int warps = 8, room = 4089;  // warps of a CTA; words of a launch after its head: 32,760 bytes in all

// Everything that a launch is told, as its one parameter; made by shardopt/kernels/launcher.py. `words` holds the
// numbers of every group, as many pointers to doubles on the device where `pointers` says so (one that is not null
// is used instead of the number), and then the spans.
struct Packed {
  i64 count, tiles, per;  // spans; tiles of all of them; tiles of a CTA
  i64 numbers, pointers;
  const u8* taken;  // null, or whether the step is taken at all
  u64 words[room];
};

// The step counters that a second launch advances.
struct Counters {
  i64 count;
  const u8* taken;
  float* steps[room];
};

HD bool skipped(const u8* taken) { return taken != nullptr && *taken == 0; }
HD void advance(const Counters& a, i64 i) {
  if (!skipped(a.taken) && i < a.count) *a.steps[i] += 1;
}

template <class K>
using Lane = Member<K, 8, 32>;

// What a CTA works out once for a span.
template <class K>
struct Known {
  typename K::Scalars scalars;
  typename K::Noise noise;
  bool aligned;  // whether 8 elements of every array can be moved at once, in every row
};

// The low bits that spoil moves of E elements of this many bytes.
HD u64 odd(const void* base, i64 stride, int bytes) {
  int moved = 8 * bytes < 16 ? 8 * bytes : 16;
  return ((u64)base | (u64)stride) & (u64)(moved - 1);
}

template <class K>
HD bool aligned(const typename K::Span& s) {
  const i64 ld = s.rows > 1 ? s.ld : 0;
  u64 found = odd(s.p, ld * sizeof(typename K::P::T), sizeof(typename K::P::T));
  found |= odd(s.g, ld * sizeof(typename K::G::T), sizeof(typename K::G::T));
  each<K::slots>([&](auto i) {
    using C = typename K::Slots::template at<decltype(i)::value>;
    constexpr int part = K::Slots::part_of(decltype(i)::value), size = sizeof(typename C::Code);
    if constexpr (C::packed == 2)
      found |= ((u64)s.part[part] | (u64)((ld + 1) / 2)) & 3;
    else
      found |= odd(s.part[part], ld * size, size);
  });
  return found == 0;
}

template <class K>
HD Known<K> know(const Packed& a, const typename K::Span& s) {
  double n[K::numbers + 1];
  UNROLL for (int i = 0; i < K::numbers; i++) {
    i64 at = s.group * K::numbers + i;
    auto* from = a.pointers ? (const double*)a.words[a.numbers + at] : nullptr;
    n[i] = from ? *from : bits_to_double(a.words[at]);
  }
  double t = (double)*s.step + 1;
  return {K::derive(n, t), K::noise(s.key, (i64)t), aligned<K>(s)};
}

struct Larger {
  HD static u32 of(u32 a, u32 b) { return larger(a, b); }
};
struct Smaller {
  HD static u32 of(u32 a, u32 b) { return smaller(a, b); }
};

// One extreme of every block: over the chunks of each lane, then over the lanes.
template <class K, class Op, int BLOCK, class Team, class At>
HD void settle(Team& team, At&& at) {
  constexpr int width = BLOCK < 256 ? BLOCK / 8 : 32, span = BLOCK > 256 ? BLOCK / 256 : 1;
  UNROLL for (int c = 0; c < Lane<K>::chunks; c += span) {
    if constexpr (span > 1) team.lanes([&](auto& m, int) {
      UNROLL for (int k = c + 1; k < c + span; k++) at(m)[c] = Op::of(at(m)[c], at(m)[k]);
    });
    if constexpr (width > 1) team.template meet<width>([&](auto& m) -> u32& { return at(m)[c]; }, Op{});
    if constexpr (span > 1) team.lanes([&](auto& m, int) {
      UNROLL for (int k = c + 1; k < c + span; k++) at(m)[k] = at(m)[c];
    });
  }
}

template <class K, class Team>
HD void agree(Team& team) {
  each<K::slots>([&](auto i) {
    constexpr int I = decltype(i)::value;
    using C = typename K::Slots::template at<I>;
    if constexpr (C::block > 0) settle<K, Larger, C::block>(team, [](auto& m) -> u32* { return m.most[I]; });
    if constexpr (C::least) settle<K, Smaller, C::block>(team, [](auto& m) -> u32* { return m.fewest[I]; });
  });
}

// The extremes of a tile whose step uses what will be read back.
template <class K, int PASS, class Team>
HD void preview(Team& team, const typename K::Span& s, const Known<K>& known, const typename K::RowNoise& drawn, i64 row,
               i64 column, int n) {
  Writing<PASS, true> sink;
  team.lanes([&](auto& m, int) { m.begin(); });
  for (int i = 0; i < K::previews; i++) {
    team.lanes([&](auto& m, int lane) {
      m.forward(s, known.scalars, drawn, sink, row, column, n, lane, known.aligned);
    });
    agree<K>(team);
  }
}

// `left` tiles of one span, from its tile `first` on, by one warp.
template <class K, class Team>
HD void run(Team& team, const typename K::Span& s, const Known<K>& known, i64 first, int left) {
  const i64 across = K::across(s);
  i64 row = first / across, column = first % across * K::tile;
  auto drawn = K::row_noise(known.noise, s.row0 + row);
  Writing<K::rounds> sink;
  for (; left > 0; left--) {
    int n = (int)(s.cols - column < K::tile ? s.cols - column : K::tile);
    if constexpr (K::previews > 0) preview<K, K::rounds>(team, s, known, drawn, row, column, n);
    team.lanes([&](auto& m, int lane) {
      m.forward(s, known.scalars, drawn, sink, row, column, n, lane, known.aligned);
    });
    agree<K>(team);
    team.lanes([&](auto& m, int lane) { m.finish(s, drawn, row, column, n, lane, known.aligned); });
    column += K::tile;
    if (column >= s.cols) column = 0, row++, drawn = K::row_noise(known.noise, s.row0 + row);
  }
}

// The tiles of CTA `block`: of one span after another, shared out among its warps.
template <class K, class Cta>
HD void step(Cta& cta, const Packed& a, i64 block) {
  if (skipped(a.taken)) return;
  auto* spans = (const typename K::Span*)(a.words + (a.pointers ? 2 * a.numbers : a.numbers));
  i64 tile = block * a.per, last = tile + a.per < a.tiles ? tile + a.per : a.tiles;
  for (i64 at = span_of(spans, a.count, tile); tile < last; at++) {
    const auto& s = spans[at];
    i64 end = s.tile0 + s.rows * K::across(s), stop = end < last ? end : last;
    if (tile >= stop) continue;
    cta.once([&] { cta.known = know<K>(a, s); });
    const int all = (int)(stop - tile), share = (all + warps - 1) / warps;
    cta.warps([&](int warp, auto& team) {
      int mine = warp * share, left = all - mine < share ? all - mine : share;
      run<K>(team, s, cta.known, tile - s.tile0 + mine, left);
    });
    tile = stop;
  }
}

}  // namespace shardopt
