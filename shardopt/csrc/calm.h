// Codecs as a whole tile in a GPU's registers uses them: the bits of codecs.h in fewer instructions, where the block is
// calm. What codecs.h rounds correctly is approximated here, and the result is in doubt where the error may decide: the
// lane then encodes exactly. docs/tiles.md has the bounds.
//
//   decode    element i of a pack of codes
//   calm      whether the numbers that a block was stored with, or its new extremes, allow what is left out here
//   close     the stored numbers, and what encode needs
//   encode    a word that holds the code in byte `at`, so that four words are put together by three instructions
//   doubt     grows where a result is in doubt, over all elements of a lane
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

template <class C>
struct Calm {
  static constexpr bool doubts = false, is_signed = true;
  static constexpr int at = 0;
};

template <int BLOCK>
struct Calm<Sqrt8<BLOCK>> {
  using C = Sqrt8<BLOCK>;
  using Scale = typename C::Scale;
  static constexpr bool doubts = true, is_signed = true;
  static constexpr int at = 2;
  static constexpr u32 margin = 8, fraction = 0x5410u;
  HD static float decode(const Pack<C>& codes, int i, Scale s, u32) { return C::decode(codes.signed_byte(i), s); }
  HD static float number(u32 most) { return from_bits(most); }
  HD static float close(u32 most) { return 127.0f * rsqrt_near(from_bits(larger(most, calm_least))); }
  HD static u32 encode(float x, float scale, u32) {
    return bits(fused(with_sign(sqrt_near(size(x)), x), scale, 384.5f)) * 2;
  }
  HD static u32 settle(u32 word, float) { return word; }
  HD static u32 finish(u32 word) { return word ^ 0x80808080u; }
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Calm<Root4<BLOCK, STOCHASTIC, STREAM>> {
  using C = Root4<BLOCK, STOCHASTIC, STREAM>;
  using Scale = typename C::Scale;
  static constexpr bool doubts = true, is_signed = false;
  static constexpr int at = 3;
  static constexpr u32 margin = 16, fraction = 0x6521u;
  HD static float decode(const Pack<C>& codes, int i, Scale s, u32 two23) {
    float t = byte_times(codes.word[i / 4], i % 4, (float)(1.0 / 255), two23);
    t = t * t;
    return t * t * s.scale;
  }
  HD static float number(u32 most) { return from_bits(most); }
  HD static float close(u32 most) {
    return 255.0f * 0x1p24f * rsqrt_near(sqrt_near(from_bits(larger(most, calm_least))));
  }
  HD static u32 encode(float x, float scale, u32 noise) {
    const u32 t = (u32)(sqrt_near(sqrt_near(x)) * scale);
    if constexpr (!STOCHASTIC) return t + 0x800000u;
    const u32 above = opaque(t + (t >> 20));
    return smaller(t + t - above + 0xffffffu, larger(t + (noise >> 8), above));
  }
  HD static u32 settle(u32 word, float x) { return larger_where_positive(x, word, 0x1000000u); }
  HD static u32 finish(u32 word) { return word; }
};

}  // namespace shardopt
