// A warp and a CTA at work, over abstract teams: cuda.h supplies real ones, emulated.h loops over lanes on a CPU.
//
//   Team   lanes(f): f(member, lane) for the lanes that this thread stands for; looking(f): f(member, look) for all lanes,
//          where look.at<WIDTH>(of, i) is of(member) for lane i mod WIDTH of this lane's group of WIDTH; meet<WIDTH>(at, op): the register
//          at(member) becomes op over each group of WIDTH lanes; sum(at): the float64 becomes the sum of all lanes;
//          any(f): whether f(member) for any; once(f): f by one lane, then visible to all; Of<M>: with other members
//   Cta    once(f): f by one thread, then visible to all; warps(f): f(warp, team); turn(warp, f): within it, f by one
//          warp after another; shared: by all
#pragma once
#include "whole.h"

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
  bool calm;     // whether its whole tiles may go through whole.h
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
    if constexpr (decltype(i)::value == K::factored)
      return;
    else if constexpr (C::packed == 2)
      found |= ((u64)s.part[part] | (u64)((ld + 1) / 2)) & 3;
    else
      found |= odd(s.part[part], ld * size, size);
  });
  return found == 0;
}

// The numbers of a group.
template <class K>
struct Numbers {
  double n[K::numbers + 1];
  HD Numbers(const Packed& a, i64 group) {
    UNROLL for (int i = 0; i < K::numbers; i++) {
      i64 at = group * K::numbers + i;
      auto* from = a.pointers ? (const double*)a.words[a.numbers + at] : nullptr;
      n[i] = from ? *from : bits_to_double(a.words[at]);
    }
  }
};

HD const u64* after_numbers(const Packed& a) { return a.words + (a.pointers ? 2 * a.numbers : a.numbers); }

template <class K>
HD Known<K> know(const Packed& a, const typename K::Span& s) {
  Numbers<K> numbers(a, s.group);
  double t = (double)*s.step + 1;
  const auto scalars = K::derive(numbers.n, t);
  const bool moved = aligned<K>(s);
  return {scalars, K::noise(s.key, (i64)t), moved, moved && s.col0 % 8 == 0 && K::Rule::calm(scalars.rule)};
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

// The extremes of a tile whose step uses what will be read back. looking: a member -> the sink of its preview.
template <class K, class Team, class Looking>
HD void preview(Team& team, Looking&& looking, const typename K::Span& s, const typename K::Scalars& h,
                const typename K::RowNoise& drawn, i64 row, i64 column, int n, bool aligned) {
  team.lanes([&](auto& m, int) { m.begin(); });
  for (int i = 0; i < K::previews; i++) {
    team.lanes([&](auto& m, int lane) {
      auto sink = looking(m);
      m.forward(s, h, drawn, sink, row, column, n, lane, aligned);
    });
    agree<K>(team);
  }
}

// Where a warp is: in shared memory, since registers are scarce.
template <class K>
struct Walk {
  i64 row, column;
  int left;  // tiles
  typename K::RowNoise noise;
  Run<K> run;
  // Whole tiles left in the row, as far as no column reaches the next multiple of 2^16, for the sake of `Steps`.
  HD int wholes(const typename K::Span& s) const {
    const i64 most = (s.cols - column) / K::tile, near = (i64)(0x10000u - ((u32)(s.col0 + column) & 0xffffu)) / K::tile;
    return (int)(most < left ? most < near ? most : near : left < near ? left : near);
  }
};

// One extreme of every block of a tile that is held.
template <class K, class Team>
HD void agree_held(Team& team) {
  each<K::slots>([&](auto i) {
    constexpr int I = decltype(i)::value;
    using C = typename K::Slots::template at<I>;
    if constexpr (C::block > 8) team.template meet<C::block / 8>([](auto& m) -> u32& { return m.most[I]; }, Larger{});
    if constexpr (C::least && C::block > 8)
      team.template meet<C::block / 8>([](auto& m) -> u32& { return m.fewest[I]; }, Smaller{});
  });
}

// Tiles of a row: calm ones, until none is left or one is not; or one of any kind. How many.
template <class K, bool CALM, class Team>
HD int held(Team team, Walk<K>& at, const typename K::Span& s, int most) {
  team.lanes([&](auto& m, int lane) { m.open((u32)(s.col0 + at.column), lane); });
  int done = 0;
  for (; done < (CALM ? most : 1); done++) {
    team.lanes([&](auto& m, int) { m.begin(at.run); });
    team.looking([&](auto& m, const auto& look) { m.update(at.run, look); });
    agree_held<K>(team);
    if constexpr (CALM)
      if (team.any([](auto& m) { return !m.calm(); })) break;
    team.looking([&](auto& m, const auto& look) { m.finish(at.run, look); });
  }
  return done;
}

// What is left of a row, by tile.h.
template <class K, class Team>
HD void walked(Team& team, Walk<K>& at, const typename K::Span& s, const Known<K>& known) {
  Writing<K::rounds> sink;
  for (; at.left > 0 && at.column < s.cols; team.once([&] { at.column += K::tile, at.left--; })) {
    const i64 row = at.row, column = at.column;
    const int n = (int)(s.cols - column < K::tile ? s.cols - column : K::tile);
    if constexpr (K::previews > 0) {
      auto looking = [](auto&) { return Writing<K::rounds, true>{}; };
      preview<K>(team, looking, s, known.scalars, at.noise, row, column, n, known.aligned);
    }
    team.lanes([&](auto& m, int lane) {
      m.forward(s, known.scalars, at.noise, sink, row, column, n, lane, known.aligned);
    });
    agree<K>(team);
    team.lanes([&](auto& m, int lane) { m.finish(s, at.noise, row, column, n, lane, known.aligned); });
  }
}

// `left` tiles of one span, from its tile `first` on, by one warp.
template <class K, class Team>
HD void run(Team& team, Walk<K>& at, const typename K::Span& s, const Known<K>& known, i64 first, int left) {
  const i64 across = K::across(s);
  team.once([&] { at.row = first / across, at.column = first % across * K::tile, at.left = left; });
  while (at.left > 0) {
    team.once([&] { at.noise = K::row_noise(known.noise, s.row0 + at.row); });
    if constexpr (holds<K>)
      while (at.left > 0 && at.column < s.cols) {
        team.once([&] { at.run.open(s, known.scalars, at.noise, at.row, at.column, known.aligned); });
        int done = 0;
        if (known.calm) done = held<K, true>(typename Team::template Of<Held<K, true>>{}, at, s, at.wholes(s));
        if (done == 0) done = held<K, false>(typename Team::template Of<Held<K, false>>{}, at, s, 1);
        team.once([&] { at.column += done * K::tile, at.left -= done; });
      }
    else
      walked(team, at, s, known);
    team.once([&] { at.column = 0, at.row++; });
  }
}

// The tiles of CTA `block`: of one span after another, shared out among its warps.
template <class K>
struct Stepping {
  using Member = Lane<K>;
  struct Shared {
    Known<K> known;
    i64 at, tile, last, words;  // words: before the spans; the span of now; the tiles from `tile` on are left, before `last`
    Walk<K> walks[warps];
  };
  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    auto& shared = cta.shared;
    using Span = typename K::Span;
    cta.once([&] {
      shared.words = after_numbers(a) - a.words;
      shared.tile = block * a.per, shared.last = shared.tile + a.per < a.tiles ? shared.tile + a.per : a.tiles;
      shared.at = span_of((const Span*)after_numbers(a), a.count, shared.tile);
    });
    while (shared.tile < shared.last) {
      const auto& s = ((const Span*)(a.words + shared.words))[shared.at];
      const i64 tile = shared.tile, end = s.tile0 + s.rows * K::across(s), stop = end < shared.last ? end : shared.last;
      if (tile < stop) {
        cta.once([&] { shared.known = know<K>(a, s); });
        const int all = (int)(stop - tile), share = (all + warps - 1) / warps;
        cta.warps([&](int warp, auto& team) {
          int mine = warp * share, left = all - mine < share ? all - mine : share;
          shardopt::run<K>(team, shared.walks[warp], s, shared.known, tile - s.tile0 + mine, left);
        });
      }
      cta.once([&] {
        const i64 here = s.tile0 + s.rows * K::across(s), done = here < shared.last ? here : shared.last;
        shared.at++, shared.tile = done > shared.tile ? done : shared.tile;
      });
    }
  }
};

}  // namespace shardopt
