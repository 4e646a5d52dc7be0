// The GPU's side of what asks: kernels in passes, over the teams of warp.h. A CTA takes one piece and its warps the
// piece's rows; another kernel then adds up what the pieces came to. Every sum is of float64 in an order that the shape
// decides: lanes meet by shuffles, warps in turn, pieces in theirs, so that no launch geometry changes a bit.
#pragma once
#include "warp.h"

namespace shardopt {

// What a launch is told after its numbers; rows of one struct follow, those of a pass with the answers behind them.
struct Told {
  i64 first;  // CTAs of the launches before
  double* scratch;
};
HD const Told& told(const Packed& a) { return *(const Told*)after_numbers(a); }
template <class Row>
HD const Row* rows_of(const Packed& a) {
  return (const Row*)(&told(a) + 1);
}

// The row to which a CTA of all launches together belongs.
template <class Row>
HD const Row& row_of(const Packed& a, i64 cta) {
  auto* all = rows_of<Row>(a);
  return all[span_of(all, a.count, cta)];
}

// A span whose tiles are its pieces.
template <class K>
struct Placed : K::Span {
  Place place;
};

// One lane: its share of a tile, what it has added up, and the factors of the columns that it stays in.
template <class K, int PASS>
struct Adder : Lane<K> {
  static constexpr int pass = PASS, chunks = Lane<K>::chunks;
  static constexpr Wants wants = K::wants(PASS);
  static constexpr bool previews = wants.extremes > 0;  // which are all that is learnt
  static constexpr int values = wants.values();
  double sums[values + 1] = {};  // of rows: of the row, in all lanes once it is ended, and of all before
  double columns[wants.cols ? chunks : 1][8] = {};
  float* elements;  // of the row, of the span's first column
  float held[K::held(PASS) ? chunks : 1][8];

  HD static int place_of(int c, int lane, int e) { return (c * 32 + lane) * 8 + e; }
  template <class Line>
  HD void hold(const Line& line, int n, int lane) {
    UNROLL for (int c = 0; c < chunks; c++)
      UNROLL for (int e = 0; e < 8; e++) held[c][e] = place_of(c, lane, e) < n ? line.column(place_of(c, lane, e)) : 0;
  }
  template <class Line>
  HD float factor(const Line& line, i64, int c, int e) const {
    return line.relative * held[c][e];
  }
  template <int COUNT, int E>
  HD void take(const float (&wanted)[COUNT][E], i64 column, int n, int c) {
    if constexpr (wants.elements) {
      UNROLL for (int e = 0; e < E; e++)
        if (e < n) elements[column + e] = wanted[0][e];
      return;
    }
    UNROLL for (int k = 0; k < values; k++) {
      double x[E];
      UNROLL for (int e = 0; e < E; e++) x[e] = e < n ? (double)wanted[k][e] : 0;
      if constexpr (wants.cols) UNROLL for (int e = 0; e < E; e++) columns[c][e] += x[e];
      UNROLL for (int half = E / 2; half; half /= 2)
        UNROLL for (int e = 0; e < half; e++) x[e] += x[e + half];
      sums[k] += x[0];
    }
  }
};

// A lane in a preview, which adds up nothing.
template <class K, int PASS>
struct Looking : Writing<PASS, true> {
  const Adder<K, PASS>& lane;
  HD Looking(const Adder<K, PASS>& lane) : lane(lane) {}
  template <class Line>
  HD float factor(const Line& line, i64 column, int c, int e) const {
    return lane.factor(line, column, c, e);
  }
};

// Pass PASS of a step; the one after the last round writes.
template <class K, int PASS>
struct Pass {
  using Member = Adder<K, PASS>;
  using Span = typename K::Span;
  using Scalars = typename K::Scalars;
  static constexpr Wants wants = K::wants(PASS);
  static constexpr int values = wants.rows ? wants.cols : wants.sums;  // sums of a whole piece
  struct Shared {
    Known<K> known;
    double columns[wants.cols ? K::tile : 1], sums[values + 1];
  };

  HD static constexpr int whole(int k) { return wants.rows ? 1 : k; }  // where a lane keeps it

  struct Piece {
    i64 index;              // of all pieces
    i64 top, rows;          // of the span
    i64 left, right, down;  // down: pieces above it
    Answers answers;
  };

  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    auto* all = rows_of<Placed<K>>(a);
    block += told(a).first;
    const Placed<K>& s = all[span_of(all, a.count, block)];
    const Place& place = s.place;
    const i64 piece = block - place.tile0, down = piece / place.across, top = down * place.high;
    const i64 left = piece % place.across * place.wide, right = left + place.wide;
    const Piece mine = {block, top,  s.rows - top < place.high ? s.rows - top : place.high,
                        left,  right < s.cols ? right : s.cols, down,
                        (Answers)(all + a.count) + place.parameter * K::asks};
    cta.once([&] {
      Numbers<K> numbers(a, s.group);
      const double t = (double)*s.step + 1;
      cta.shared.known = {K::template informed<PASS>(s, place, numbers.n, t, mine.answers), K::noise(s.key, (i64)t),
                          aligned<K>(s)};
    });
    const int across = (int)((mine.right - left + K::tile - 1) / K::tile), tiles = (int)mine.rows * across;
    const int part = wants.rows ? across : 1, share = (tiles / part + warps - 1) / warps * part;
    cta.warps([&](int warp, auto& team) {
      const int first = warp * share, rest = tiles - first < share ? tiles - first : share;
      walk(team, s, cta.shared.known, mine, told(a).scratch, across, first, rest);
      each<values>([&](auto k) { team.sum([](auto& m) -> double& { return m.sums[whole(decltype(k)::value)]; }); });
      if constexpr (values > 0) cta.turn(warp, [&] { meet(team, cta.shared, s, mine, told(a).scratch, warp); });
    });
  }

  // `rest` tiles of a piece, from its tile `first` on, by one warp.
  template <class Team>
  HD static void walk(Team& team, const Placed<K>& s, const Known<K>& known, const Piece& mine, double* scratch,
                      int across, int first, int rest) {
    if (rest <= 0) return;
    i64 row = mine.top + first / across, column = mine.left + (i64)(first % across) * K::tile;
    if constexpr (K::held(PASS))
      team.lanes([&](auto& m, int lane) { m.hold(at(known.scalars.line, column), (int)(mine.right - column), lane); });
    Scalars own;  // where rows differ
    const Scalars& h = K::by_row ? own : known.scalars;
    typename K::RowNoise drawn;
    auto enter = [&] {
      drawn = K::row_noise(known.noise, s.row0 + row);
      if constexpr (K::by_row) own = K::template enter<PASS>(known.scalars, s, s.place, mine.answers, row);
      if constexpr (wants.elements)
        team.lanes([&](auto& m, int) { m.elements = K::row_at(mine.answers, s, s.place, row); });
    };
    enter();
    for (;;) {
      const int n = (int)(mine.right - column < K::tile ? mine.right - column : K::tile);
      if constexpr (K::previews > 0 && PASS >= K::from_answer)
        preview<K>(team, [](auto& m) { return Looking<K, PASS>(m); }, s, h, drawn, row, column, n, known.aligned);
      else if constexpr (K::previews > 0)
        team.lanes([&](auto& m, int) { m.begin(); });
      team.lanes([&](auto& m, int lane) { m.forward(s, h, drawn, m, row, column, n, lane, known.aligned); });
      if constexpr (PASS == K::rounds) {
        agree<K>(team);
        team.lanes([&](auto& m, int lane) { m.finish(s, drawn, row, column, n, lane, known.aligned); });
      }
      if constexpr (wants.extremes > 0) {
        agree<K>(team);
        team.lanes([&](auto& m, int lane) { m.offer(s, h, row, column, n, lane); });
      }
      rest--, column += K::tile;
      if (column >= mine.right) {
        if constexpr (wants.rows) end(team, scratch + s.place.rows0 + mine.left / s.place.wide * s.rows + row);
        column = mine.left, row++;
        if (rest > 0) enter();
      }
      if (rest == 0) break;
    }
  }

  template <class Line>
  HD static Line at(Line line, i64 column) {
    line.col += column, line.cols += column;
    return line;
  }

  // The sum of a row, which another follows.
  template <class Team>
  HD static void end(Team& team, double* to) {
    team.lanes([](auto& m, int) { m.sums[1] += m.sums[0]; });
    team.sum([](auto& m) -> double& { return m.sums[0]; });
    team.lanes([&](auto& m, int lane) {
      if (lane == 0) *to = m.sums[0];
      m.sums[0] = 0;
    });
  }

  // The sums of a piece: one warp's on top of those before it.
  template <class Team>
  HD static void meet(Team& team, Shared& shared, const Placed<K>& s, const Piece& mine, double* scratch, int warp) {
    const bool last = warp == warps - 1;
    team.lanes([&](auto& m, int lane) {
      UNROLL for (int k = 0; k < values; k++) {
        const double x = warp ? shared.sums[k] + m.sums[whole(k)] : m.sums[whole(k)];
        if (lane == 0) (last ? scratch[mine.index * values + k] : shared.sums[k]) = x;
      }
    });
    if constexpr (wants.cols)
      team.lanes([&](auto& m, int lane) {
        UNROLL for (int c = 0; c < Member::chunks; c++)
          UNROLL for (int e = 0; e < 8; e++) {
            const int j = Member::place_of(c, lane, e);
            const double x = warp ? shared.columns[j] + m.columns[c][e] : m.columns[c][e];
            if (!last)
              shared.columns[j] = x;
            else if (mine.left + j < mine.right)
              scratch[s.place.cols0 + mine.down * s.cols + mine.left + j] = x;
          }
      });
  }
};

// What the sums of pieces come to: a CTA has 32 results, whose terms its warps share; one whose terms all lanes share
// where a gather has fewer.
struct Gathering {
  struct Member {
    double sum = 0;
  };
  struct Shared {
    double sums[32];
  };
  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    block += told(a).first;
    const Gather& g = row_of<Gather>(a, block);
    const bool few = g.count < 32;
    cta.warps([&](int warp, auto& team) {
      const i64 first = few ? block - g.tile0 : (block - g.tile0) * 32;
      const double* from = told(a).scratch + g.from;
      team.lanes([&](auto& m, int lane) {
        const i64 i = few ? first : first + lane;
        if (i < g.count)
          for (i64 k = few ? warp * 32 + lane : warp; k < g.n; k += few ? warps * 32 : warps)
            m.sum += g.row ? (double)g.row[k] : from[k * g.count + i];
      });
      if (few) team.sum([](auto& m) -> double& { return m.sum; });
      cta.turn(warp, [&] {
        team.lanes([&](auto& m, int lane) {
          cta.shared.sums[lane] = warp ? cta.shared.sums[lane] + m.sum : m.sum;
          if (warp == warps - 1 && (few ? lane == 0 : first + lane < g.count))
            g.out[few ? first : first + lane] = cta.shared.sums[lane];
        });
      });
    });
  }
};

}  // namespace shardopt
