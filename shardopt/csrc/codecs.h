// The storage formats, one struct each: the twins of shardopt/codecs/. docs/kernels.md says what a struct must have.
//
//   Code      type in memory; `packed` codes a byte
//   block     elements that share numbers, 0: none; then only decode and encode are used
//   is_signed of a block: whether values may be negative
//   open      numbers of a block -> what decode needs;  decode: a code -> float
//   prepare   what is kept of a fresh value until the block's extremes are known
//   close     bits of the block's largest |x| (and of its smallest positive) -> stored numbers and what encode needs
#pragma once
#include "log.h"
#include "rounding.h"

namespace shardopt {

// Every element by itself ------------------------------------------------------------------------------------------

struct Plain {
  static constexpr int block = 0, packed = 1, numbers = 0;
  static constexpr bool least = false;   // whether the smallest positive value of a block is needed
  static constexpr bool across = false;  // whether blocks lie on several ranks: see `Across`
};

struct Fp32 : Plain {
  using Code = float;
  static constexpr u32 stream = 0;
  HD static float decode(float x) { return x; }
  HD static float encode(float x, u32) { return x; }
};

// A format in blocks, some of which lie on several ranks: their extremes are asked, and every rank holds the numbers of
// all blocks of a row.
template <class C>
struct Across : C {
  static constexpr bool across = true;
};

template <class Float, bool SIGNED, bool STOCHASTIC, u32 STREAM>
struct Half : Plain {
  using Code = u16;
  static constexpr u32 stream = STOCHASTIC ? STREAM : 0;
  HD static float decode(u16 x) { return Float::load(x); }
  HD static u16 encode(float x, u32 noise) {
    u16 y = STOCHASTIC ? Float::stochastic(x, noise) : saturated<Float>(x);
    return !SIGNED && x > 0 && y < 1 ? (u16)1 : y;
  }
};
template <bool SIGNED, bool STOCHASTIC, u32 STREAM>
using Bf16 = Half<Bfloat16, SIGNED, STOCHASTIC, STREAM>;
template <bool SIGNED, bool STOCHASTIC, u32 STREAM>
using Fp16 = Half<Float16, SIGNED, STOCHASTIC, STREAM>;

// Codes of x relative to the block's largest magnitude ---------------------------------------------------------------

template <int BLOCK, bool SIGNED>
struct Absmax {
  static constexpr int block = BLOCK, packed = 1, numbers = 1;
  static constexpr bool is_signed = SIGNED;
  static constexpr bool least = false, across = false;
  static constexpr u32 stream = 0;
  struct Scale {
    float scale;
  };
  HD static Scale open(const float* scale, const float*) { return {*scale}; }
  HD static float scaled(float value, Scale s) {  // a positive value stays positive: at least the float of bits 1
    float y = value * s.scale;
    return SIGNED ? y : from_bits(larger(bits(y), smaller(bits(value), 1u)));
  }
  HD static float prepare(float x) { return x; }
  // the stored scale of a block whose largest magnitude has these bits: 0 only where the block is 0, NaN where it is
  HD static float scale_of(u32 most, float divisor) {
    float largest = from_bits(most), s = largest / divisor;
    s = s < shardopt::least ? shardopt::least : s;
    return largest > 0 ? s : largest;
  }
  HD static float ratio(float x, Scale e) { return x / e.scale; }
  HD static Scale close(u32 most, u32, float* stored, float divisor = 1.0f) {
    stored[0] = scale_of(most, divisor);
    return {stored[0] == 0 ? 1.0f : stored[0]};
  }
};

template <int BLOCK>
struct Int8 : Absmax<BLOCK, true> {
  using Base = Absmax<BLOCK, true>;
  using typename Base::Scale;
  using Code = i8;
  HD static float decode(int q, Scale s) { return Base::scaled((float)q, s); }
  HD static Scale close(u32 most, u32, float* stored) { return Base::close(most, 0, stored, 127.0f); }
  HD static u8 encode(float x, Scale e, u32) { return nearest_byte(clamp(Base::ratio(x, e), -127, 127)); }
};

template <int BLOCK>
struct Sqrt8 : Absmax<BLOCK, true> {
  using Base = Absmax<BLOCK, true>;
  using typename Base::Scale;
  using Code = i8;
  HD static float decode(int q, Scale s) {
    float t = (float)q * (float)(1.0 / 127);
    return Base::scaled(t * size(t), s);
  }
  HD static float signed_root(float x) {
    const u32 magnitude = bits(x) & 0x7fffffffu;  // of which the extremes are taken too
    return from_bits(bits(root(from_bits(magnitude))) | (bits(x) ^ magnitude));
  }
  HD static float prepare(float x) { return early_roots ? signed_root(x) : x; }
  HD static Scale close(u32 most, u32, float* stored) {
    return {1.0f / root(Base::close(most, 0, stored).scale) * 127.0f};
  }
  HD static u8 encode(float x, Scale e, u32) {
    return nearest_byte((early_roots ? x : signed_root(x)) * e.scale);  // at most 127 (1 + 3 ulp): no clamp
  }
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Root4 : Absmax<BLOCK, false> {
  using Base = Absmax<BLOCK, false>;
  using typename Base::Scale;
  using Code = u8;
  static constexpr u32 stream = STOCHASTIC ? STREAM : 0;
  HD static float decode(int q, Scale s) {
    float t = (float)q * (float)(1.0 / 255);
    t = t * t;
    return Base::scaled(t * t, s);
  }
  HD static float prepare(float x) { return root(x); }  // the step has taken this root already
  HD static Scale close(u32 most, u32, float* stored) {
    return {1.0f / root(root(Base::close(most, 0, stored).scale)) * 255.0f * fixed_one};
  }
  HD static u32 encode(float r, Scale e, u32 noise) {  // below 1, where the fixed point is not exact, it is 1 anyway
    u32 t = to_fixed(root_of_normal(r) * e.scale);  // at most 255, within the tolerance
    t = larger(t, smaller(bits(r), 1u << 23));  // a positive value has no code below 1
    return STOCHASTIC ? dither(t, noise, t >> 20) : nearest_fixed(t);
  }
};

template <int BLOCK, bool SIGNED, bool STOCHASTIC, u32 STREAM>
struct Fp8 : Absmax<BLOCK, SIGNED> {
  using Base = Absmax<BLOCK, SIGNED>;
  using typename Base::Scale;
  using Code = u8;
  static constexpr u32 stream = STOCHASTIC ? STREAM : 0;
  HD static float decode(int q, Scale s) { return Base::scaled(fp8_to_float((u8)q), s); }
  HD static Scale close(u32 most, u32, float* stored) { return Base::close(most, 0, stored, 448.0f); }
  HD static int encode(float x, Scale e, u32 noise) {
    float t = Base::ratio(x, e);
    t = !SIGNED && x > 0 && t < 0x1p-9f ? 0x1p-9f : t;
    return STOCHASTIC ? to_fp8_stochastic(t, noise, 0x1p-20f) : to_fp8(t);
  }
};

// Two codes a byte ---------------------------------------------------------------------------------------------------

template <int BLOCK>
struct Int4 : Absmax<BLOCK, true> {
  using Base = Absmax<BLOCK, true>;
  using typename Base::Scale;
  using Code = u8;
  static constexpr int packed = 2, zero = 8;
  HD static float decode(int q, Scale s) { return Base::scaled((float)(q - 8), s); }
  HD static Scale close(u32 most, u32, float* stored) { return Base::close(most, 0, stored, 7.0f); }
  HD static u8 encode(float x, Scale e, u32) { return nearest_byte(clamp(Base::ratio(x, e), -7, 7), zero); }
};

// Tables (Table: size, entries, and the midpoints that part them; written by shardopt/kernels/twins.py) --------------

// Signed, 15 entries mirrored around entry 7, which is 0. No look-up: entries are put together from masks, and the
// nearest is searched for with masks. On a midpoint the lower entry is the nearest.
template <int BLOCK, class Table>
struct Dyn4 : Absmax<BLOCK, true> {
  using Base = Absmax<BLOCK, true>;
  using typename Base::Scale;
  using Code = u8;
  static constexpr int packed = 2, zero = 7;
  HD static float decode(int q, Scale s) {
    int k = q < 7 ? 7 - q : q - 7;
    u32 y = q < 7 ? 0x80000000u : 0u;
    each<7>([&](auto i) {
      constexpr int at = decltype(i)::value;
      y ^= (u32)(at - k >> 31) & (bits(Table::entry(8 + at)) ^ (at > 0 ? bits(Table::entry(7 + at)) : 0u));
    });
    return Base::scaled(from_bits(y), s);
  }
  HD static Scale close(u32 most, u32, float* stored) { return Base::close(most, 0, stored); }
  HD static int encode(float x, Scale e, u32) {
    float r = Base::ratio(x, e);
    const int below = r < 0 ? -1 : 0, magnitude = (int)(bits(r) & 0x7fffffffu) - below;
    auto part = [](int i) { return (int)bits(Table::midpoint(7 + i)); };
    auto above = [&](int midpoint) { return midpoint - magnitude >> 31; };  // all bits or none
    auto either = [](int mask, int yes, int no) { return no ^ (mask & (yes ^ no)); };
    int half = above(part(3)), quarter = above(either(half, part(5), part(1)));
    int eighth = above(either(quarter, either(half, part(6), part(2)), either(half, part(4), part(0))));
    int k = (half & 4) | (quarter & 2) | (eighth & 1);
    return 7 + ((k ^ below) - below);
  }
};

template <class Table>
HD int nearest_entry(float x) {  // of 255 or 256 entries; NaN the last
  int q = 0;
  each<8>([&](auto k) {
    constexpr int half = 128 >> decltype(k)::value;
    int next = q + half, at = next < Table::size ? next - 1 : 0;
    q = next < Table::size && !(x <= Table::midpoint(at)) ? next : q;
  });
  return q;
}

template <int BLOCK, bool SIGNED, class Table>
struct Dyn8 : Absmax<BLOCK, SIGNED> {
  using Base = Absmax<BLOCK, SIGNED>;
  using typename Base::Scale;
  using Code = u8;
  HD static float decode(int q, Scale s) { return Base::scaled(Table::entry(q), s); }
  HD static Scale close(u32 most, u32, float* stored) { return Base::close(most, 0, stored); }
  HD static int encode(float x, Scale e, u32) {
    int q = nearest_entry<Table>(Base::ratio(x, e));
    return !SIGNED && x > 0 && q < 1 ? 1 : q;
  }
};

}  // namespace shardopt
