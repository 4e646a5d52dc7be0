// A codec as the format of messages on a GPU, see wire.h: a warp takes 256 columns of a row, 8 of them a lane, so that
// block / 8 lanes share a block.
#pragma once
#include "warp.h"

namespace shardopt {

// What a launch is told; made by shardopt/kernels/wire.py. x: float32 (rows, cols); numbers: one a block, null where
// there are none; into: columns of a block that lie before the first, a multiple of 8; aligned: whether 8 elements of
// x and of codes can be moved at once in every row; step: warps of the launch.
struct Message {
  float* x;
  void* codes;
  float* numbers;
  i64 rows, cols, into, aligned, step;
};

template <class C>
struct Wiring {
  using Code = typename C::Code;
  static constexpr bool blocked = C::block > 0;
  static constexpr int block = blocked ? C::block : 8, lanes = block / 8, wide = 256;
  static_assert(block <= wide && C::numbers <= 1 && C::stream == 0 && !C::least, "not sent");
  struct Member {
    Window<float, 8> x;
    u32 most;
  };
  struct Shared {};

  // What a lane holds of a tile: `n` elements from `column` of `row` on.
  struct Place {
    i64 row, column, before;  // before: columns of the row's first block and what follows it
    int n;
    bool whole;
    HD Place(const Message& a, i64 tile, int lane) {
      const i64 across = (a.into + a.cols + wide - 1) / wide;
      row = tile / across, before = tile % across * wide + lane * 8, column = before - a.into;
      const i64 left = column < 0 ? 0 : a.cols - column;
      n = left > 8 ? 8 : left > 0 ? (int)left : 0;
      whole = a.aligned && n == 8;
    }
    HD float* x(const Message& a) const { return a.x + row * a.cols + column; }
    HD Code* codes(const Message& a) const {
      return (Code*)a.codes + row * ((a.cols + C::packed - 1) / C::packed) + column / C::packed;
    }
    HD float* number(const Message& a) const {
      return a.numbers + row * ((a.into + a.cols + block - 1) / block) + before / block;
    }
  };

  template <class Cta, class F>
  HD static void tiles(Cta& cta, const Message& a, i64 index, F&& f) {
    const i64 all = a.rows * ((a.into + a.cols + wide - 1) / wide);
    cta.warps([&](int warp, auto& team) {
      for (i64 tile = index * warps + warp; tile < all; tile += a.step) f(team, tile);
    });
  }
};

template <class C>
struct Encoding : Wiring<C> {
  using typename Wiring<C>::Member;
  using typename Wiring<C>::Place;
  template <class Cta>
  HD static void run(Cta& cta, const Message& a, i64 index) {
    Wiring<C>::tiles(cta, a, index, [&](auto& team, i64 tile) {
      team.lanes([&](Member& m, int lane) {
        const Place at(a, tile, lane);
        m.x.load(at.x(a), at.n, at.whole);
        m.most = 0;
        UNROLL for (int e = 0; e < 8; e++) m.most = larger(m.most, bits(m.x[e]) & 0x7fffffffu);
      });
      if constexpr (Wiring<C>::lanes > 1)
        team.template meet<Wiring<C>::lanes>([](Member& m) -> u32& { return m.most; }, Larger{});
      team.lanes([&](Member& m, int lane) {
        const Place at(a, tile, lane);
        if (at.n == 0) return;
        Codes<C, 8, false> codes;
        if constexpr (Wiring<C>::blocked) {
          float stored[1];
          const auto scale = C::close(m.most, inf_bits, stored);
          if (at.before % C::block == 0) *at.number(a) = stored[0];
          UNROLL for (int e = 0; e < 8; e++) codes.put(e, C::encode(C::prepare(m.x[e]), scale, 0));
        } else {
          UNROLL for (int e = 0; e < 8; e++) codes.put(e, C::encode(m.x[e], 0));
        }
        codes.store(at.codes(a), at.n, at.whole);
      });
    });
  }
};

template <class C>
struct Decoding : Wiring<C> {
  using typename Wiring<C>::Member;
  using typename Wiring<C>::Place;
  template <class Cta>
  HD static void run(Cta& cta, const Message& a, i64 index) {
    Wiring<C>::tiles(cta, a, index, [&](auto& team, i64 tile) {
      team.lanes([&](Member& m, int lane) {
        const Place at(a, tile, lane);
        if (at.n == 0) return;
        Codes<C, 8, false> codes;
        codes.load(at.codes(a), at.n, at.whole);
        if constexpr (Wiring<C>::blocked) {
          const auto scale = C::open(at.number(a), at.number(a));
          UNROLL for (int e = 0; e < 8; e++) m.x[e] = C::decode(codes.get(e), scale);
        } else {
          UNROLL for (int e = 0; e < 8; e++) m.x[e] = C::decode(codes.get(e));
        }
        m.x.store(at.x(a), at.n, at.whole);
      });
    });
  }
};

}  // namespace shardopt
