// Rounding float32 to fewer bits, to nearest or stochastically: shardopt/codecs/rounding.py.
#pragma once
#include "noise.h"

namespace shardopt {

// floor(t + u) in exact arithmetic, t >= 0; the nearest integer where t is within `tolerance` of it.
template <class T>
HD T dither(T t, T u, T tolerance) {
  T low = floor_of(t), near = nearest_of(t);
  T up = u >= T(1) - (t - low) ? T(1) : T(0);
  return size(t - near) <= tolerance ? near : low + up;
}

// The same in fixed point: t has 23 bits after the point, as a float of at least 1 has at most, and so has u, the top
// bits of the noise. To keep u away from 0 and from 1 by the tolerance, which is in units of 2^-23, is to round to the
// nearest integer where t is that near to one.
constexpr float fixed_one = 0x1p23f;
HD u32 to_fixed(float t) { return (u32)(i32)t; }  // of t times fixed_one; NaN becomes 0 or 2^31, whose code is 0
HD u32 nearest_fixed(u32 t) { return (t + 0x3fffffu + ((t >> 23) & 1u)) >> 23; }
HD u32 dither(u32 t, u32 noise, u32 tolerance) {
  u32 u = larger(noise >> 9, tolerance);
  return (t + smaller(u, 0x7fffffu - tolerance)) >> 23;
}

// A floating-point format: bits of the fraction, exponent of the smallest normal number, largest number.
template <int FRACTION, int LOWEST>
struct Grid {
  // The spacing of the format at |x|, and its inverse: powers of two.
  HD static u32 exponent(float x) {
    u32 e = (bits(x) >> 23) & 0xffu;
    return larger(e, (u32)(LOWEST + 127));
  }
  HD static float nearest(float x) {
    u32 e = exponent(x);
    float ulp = from_bits((e - FRACTION) << 23), inverse = from_bits((254u + FRACTION - e) << 23);
    return copy_sign(nearest_of(size(x) * inverse) * ulp, x);
  }
  // One of the two neighbours; numbers of the format (also when off by `tolerance`, relatively) are unchanged.
  HD static float stochastic(float x, u32 noise, float tolerance, float largest) {
    u32 e = exponent(x);
    float ulp = from_bits((e - FRACTION) << 23), inverse = from_bits((254u + FRACTION - e) << 23);
    float t = size(x) * inverse;
    float y = dither(t, uniform(noise), t * tolerance) * ulp;
    y = y > largest ? largest : y;
    return (bits(x) & inf_bits) == inf_bits ? x : copy_sign(y, x);
  }
};

// The 16-bit floats -------------------------------------------------------------------------------------------------

struct Bfloat16 {
  static constexpr u32 largest = 0x7f7f0000u;  // bits of the largest number, as float32

  HD static float load(u16 x) { return from_bits((u32)x << 16); }
  HD static u16 nearest(float x) {
    u32 b = bits(x);
    u32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (u16)((b & 0x7fffffffu) > inf_bits ? 0x7fc0u : rounded);
  }
  HD static u16 stochastic(float x, u32 noise) {
    u32 b = bits(x), magnitude = b & 0x7fffffffu;
    u32 up = smaller(magnitude + (noise & 0xffffu), larger(magnitude, 0x7f7fffffu));  // Inf and quiet NaN stay
    return (u16)((up | (b & 0x80000000u)) >> 16);
  }
};

struct Float16 {
  static constexpr u32 largest = 0x477fe000u;

  HD static float load(u16 h) {
    u32 magnitude = (u32)(h & 0x7fffu) << 13;
    float scaled = from_bits(magnitude) * 0x1p112f;  // exact, subnormal numbers included
    u32 special = magnitude | inf_bits;
    u32 y = (h & 0x7c00u) == 0x7c00u ? special : bits(scaled);
    return from_bits(y | ((u32)(h & 0x8000u) << 16));
  }
  HD static u16 nearest(float x) {  // ties to even; beyond 65520 infinite
    u32 b = bits(x), magnitude = b & 0x7fffffffu, signed_bit = (b >> 16) & 0x8000u;
    u32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    u32 tiny = bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to steps of 2^-24
    u32 y = magnitude < 0x38800000u ? tiny : normal;
    y = magnitude >= 0x477ff000u ? 0x7c00u : y;
    y = magnitude > inf_bits ? 0x7e00u : y;
    return (u16)(y | signed_bit);
  }
  HD static u16 stochastic(float x, u32 noise) { return nearest(Grid<10, -14>::stochastic(x, noise, 0.0f, 65504.0f)); }
};

// To nearest; a finite value beyond the largest number becomes that number.
template <class Float>
HD u16 saturated(float x) {
  u32 b = bits(x), magnitude = b & 0x7fffffffu;
  u32 within = smaller(magnitude, Float::largest) | (b & 0x80000000u);
  return Float::nearest(magnitude >= inf_bits ? x : from_bits(within));
}

// float8 E4M3 ---------------------------------------------------------------------------------------------------

HD float fp8_to_float(u8 q) {
  u32 magnitude = (u32)(q & 0x7fu) << 20;
  float scaled = from_bits(magnitude) * 0x1p120f;
  u32 y = (q & 0x7fu) == 0x7fu ? 0x7fc00000u : bits(scaled);
  return from_bits(y | ((u32)(q & 0x80u) << 24));
}

HD u32 number_to_fp8(float y) {  // y: a number of the format, or NaN
  u32 b = bits(y), magnitude = b & 0x7fffffffu;
  u32 normal = (magnitude - 0x3c000000u) >> 20;  // 2^-6 becomes 8, exponent 1
  u32 tiny = (u32)(i32)(from_bits(magnitude) * 0x1p9f);
  u32 q = magnitude < 0x3c800000u ? tiny : normal;
  q = magnitude > inf_bits ? 0x7fu : q;
  return q | ((b >> 24) & 0x80u);
}

HD u32 to_fp8(float x) {
  float y = Grid<3, -6>::nearest(clamp(x, -448.0f, 448.0f));
  return number_to_fp8(x == x ? y : x);
}

HD u32 to_fp8_stochastic(float x, u32 noise, float tolerance) {
  return number_to_fp8(Grid<3, -6>::stochastic(x, noise, tolerance, 448.0f));
}

}  // namespace shardopt
