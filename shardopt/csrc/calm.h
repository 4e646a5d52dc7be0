// Codecs as a whole tile in a GPU's registers uses them: the bits of codecs.h in fewer instructions, where the block is
// calm. What codecs.h rounds correctly is approximated here, and the result is in doubt where the error may decide: the
// lane then encodes exactly. docs/tiles.md has the bounds.
//
//   decode    element i of a pack of codes; or `entry`, the value of a lane's own code, where a block's 16 values are
//             worked out by as many lanes and looked up there
//   close     the stored numbers, and what encode needs; of a block's logarithms on the grid, where it is `measured`:
//             its lanes take turns at the two extremes
//   encode    a word that holds the code in byte `at`, so that four words are put together by three instructions; or,
//             where there are `cells`, what `cell` finds a lane by, whose word is added
//   fraction  which 16 bits of two words are below the point of their codes; within `margin` of 0 a code is in doubt
#pragma once
#include "log_codecs.h"
#include "pack.h"

namespace shardopt {

constexpr u32 calm_least = 0x21800000u, calm_most = 0x5d800000u;  // bits of 2^-60 and 2^60

// The range of many numbers, by their bits; zeros are left out.
struct Range {
  u32 most = 0, fewest = ~0u;  // fewest: less 1, which makes a 0 the largest of all
  HD void add(u32 x) { most = larger(most, x), fewest = smaller(fewest, x - 1); }
  HD bool calm(u32 low = calm_least, u32 high = calm_most) const { return most <= high && fewest >= low - 1; }
};

// Smallest distance of eight fractions of 16 bits from an integer, less `margin` below: small where in doubt.
struct Doubt {
  u32 nearest = ~0u;
  HD void add(u32 first, u32 second, u32 selector, u32 margin) {
    nearest = smaller_sums(pick_bytes(first, second, selector), margin * 0x10001u, nearest);
  }
  HD bool found(u32 margin) const { return (nearest - 2 * margin * 0x10001u & ~nearest & 0x80008000u) != 0; }
};

struct Unlike {  // what most formats do not do
  static constexpr bool doubts = true, looks = false, cells = false, measured = false;
  HD static u32 settle(u32 word, float) { return word; }
  HD static u32 finish(u32 word) { return word; }
};

template <class C>
struct Calm : Unlike {
  static constexpr bool doubts = false, is_signed = true;
};

template <int BLOCK>
struct Calm<Sqrt8<BLOCK>> : Unlike {
  using C = Sqrt8<BLOCK>;
  using Scale = typename C::Scale;
  static constexpr bool is_signed = true;
  static constexpr int at = 2;
  static constexpr u32 margin = 8, fraction = 0x5410u;
  HD static float decode(const Pack<C>& codes, int i, Scale s, u32) { return C::decode(codes.signed_byte(i), s); }
  HD static float close(u32 most, u32, float* stored) {
    stored[0] = from_bits(most);
    return 127.0f * rsqrt_near(from_bits(larger(most, calm_least)));
  }
  HD static u32 encode(float x, float scale, u32) {
    return bits(fused(with_sign(sqrt_near(size(x)), x), scale, 384.5f)) * 2;
  }
  HD static u32 finish(u32 word) { return word ^ 0x80808080u; }
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Calm<Root4<BLOCK, STOCHASTIC, STREAM>> : Unlike {
  using C = Root4<BLOCK, STOCHASTIC, STREAM>;
  using Scale = typename C::Scale;
  static constexpr bool is_signed = false;
  static constexpr int at = 3;
  static constexpr u32 margin = 16, fraction = 0x6521u;
  HD static float decode(const Pack<C>& codes, int i, Scale s, u32 two23) {
    float t = byte_times(codes.word[i / 4], i % 4, (float)(1.0 / 255), two23);
    t = t * t;
    return t * t * s.scale;
  }
  HD static float close(u32 most, u32, float* stored) {
    stored[0] = from_bits(most);
    return 255.0f * 0x1p24f * rsqrt_near(sqrt_near(from_bits(larger(most, calm_least))));
  }
  HD static u32 encode(float x, float scale, u32 noise) {
    const u32 t = (u32)(sqrt_near(sqrt_near(x)) * scale);
    if constexpr (!STOCHASTIC) return t + 0x800000u;
    const u32 above = opaque(t + (t >> 20));
    return smaller(t + t - above + 0xffffffu, larger(t + (noise >> 8), above));
  }
  HD static u32 settle(u32 word, float x) { return larger_where_positive(x, word, 0x1000000u); }
};

// A search that is looked up: the signed root of x / most lies in one of 32 cells, each of which has at most one
// midpoint. What a lane knows of the cell takes that away and leaves the code above the point.
template <int BLOCK, class Table>
struct Calm<Dyn4<BLOCK, Table>> : Unlike {
  using C = Dyn4<BLOCK, Table>;
  static constexpr bool doubts = BLOCK >= 128, is_signed = true, looks = true, cells = true;
  static constexpr int at = 3;
  static constexpr u32 margin = 1, fraction = 0x6521u;
  HD static float entry(u32 code, float scale, float) { return Table::entry((int)smaller(code, 14)) * scale; }
  HD static float close(u32 most, u32, float* stored) {
    stored[0] = from_bits(most);
    return Table::reach * rsqrt_near(from_bits(larger(most, calm_least)));
  }
  HD static u32 encode(float x, float scale, u32) { return bits(fused(with_sign(sqrt_near(size(x)), x), scale, 3.0f)); }
  HD static u32 cell(u32 word) { return word >> 18; }
  HD static u32 cell_of(u32 lane) { return Table::cell((int)lane); }
  HD static u32 placed(u32 word, u32 cell) { return (word << 6) + cell; }
};

// Octaves above the power of two at or below the smallest, by an approximate logarithm. A value's code is at least 1:
// what is 0 has minus infinite octaves, and the least code.
template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Calm<Log4<BLOCK, STOCHASTIC, STREAM>> : Unlike {
  using C = Log4<BLOCK, STOCHASTIC, STREAM>;
  static constexpr bool doubts = BLOCK >= 128, is_signed = false, looks = true, measured = true;
  static constexpr int at = 2;
  static constexpr u32 margin = 5, fraction = 0x5410u;
  struct Encoder {
    float gain, rate, first;  // codes are counted from 128 on, where floats have 16 bits after the point
  };
  // Infinite, which is not calm, where the rounding of its 2^y to float32 could differ from that of C::decode.
  HD static float entry(u32 code, float lo, float range) {
    const double y = fused((double)((int)code - 1), (double)range * (1.0 / 14), (double)lo);
    const double near = y + 0x1.8p52, v = pow2_of_fraction(y - (near - 0x1.8p52));
    const u32 left = low_word(v) << 3, value = bits((float)v) + (low_word(near) << 23);
    const bool sure = left - (0x80000000u - (2048u << 3)) >= 4096u << 3 && size(y) <= 125;
    return from_bits(code == 0 ? 0 : sure ? value : inf_bits);
  }
  HD static bool calm(u32 most, u32 fewest) {  // normal numbers within 120 octaves; or none, where `fewest` is infinite
    return fewest >= 0x00800000u && fewest + (120u << 23) >= most;
  }
  HD static i32 measure(u32 extreme) {  // octaves on the grid of 2^-20: log_codecs.h's `on_grid`
    return (i32)low_word(fused(log2_of(split_normal(from_bits(extreme))), 0x1p20, 0x1.8p52));
  }
  HD static Encoder close(u32 most, u32 fewest, float* stored, i32 hi, i32 lo) {
    const float first = (float)(lo < hi - 0x100000 ? lo : hi - 0x100000);
    const float range = (float)(hi - (i32)first) * 0x1p-20f;
    stored[0] = most == 0 ? 0.0f : first * 0x1p-20f, stored[1] = most == 0 ? 0.0f : range;
    const float rate = 14.0f * reciprocal_near(range);
    const i32 whole = (i32)((fewest >> 23) - 127);
    return {from_bits(0x7f000000u - (fewest & inf_bits)), rate, fused((float)whole - first * 0x1p-20f, rate, 129.0f)};
  }
  HD static u32 encode(float x, Encoder e, u32 noise) {
    const float t = at_least(fused(log2_near(x * e.gain), e.rate, e.first), 128.0f);
    return bits(t) + ((STOCHASTIC ? noise : 0x80000000u) >> 16);
  }
};

}  // namespace shardopt
