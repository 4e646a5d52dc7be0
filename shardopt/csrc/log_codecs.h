// Logarithmic codes of non-negative values: the twins of shardopt/codecs/log.py.
#pragma once
#include "codecs.h"

namespace shardopt {

HD double on_grid(double octaves) { return nearest_of(octaves * 0x1p20) * 0x1p-20; }

// What encodes a value with a logarithm of 16 bits, and of 8 or 4: codes an octave, and a tolerance in codes.
struct Precise {
  double lo, rate;
  float tolerance;
  template <int LAST, bool STOCHASTIC>
  HD int code(float x, u32 noise) const {
    float t = (float)((log2_of(x) - lo) * rate);
    t = STOCHASTIC ? dither(t, uniform(noise), tolerance) : nearest_of(t);
    t = t > 0 ? t : 0.0f;  // NaN too
    t = t < LAST ? t : (float)LAST;
    return x == 0 ? 0 : (int)t + 1;
  }
};
struct Quick {  // in fixed point; `gain` lifts a block of tiny values off the subnormal numbers
  float lo, rate, gain;
  u32 tolerance;
  template <int LAST, bool STOCHASTIC>
  HD u32 code(float x, u32 noise) const {
    int t = (int)to_fixed(octaves_from(x * gain, lo) * rate);
    t = t > 0 ? t : 0;  // NaN too, and a subnormal number: no block's lo is below it
    t = t < LAST << 23 ? t : LAST << 23;
    return (STOCHASTIC ? dither((u32)t, noise, tolerance) : nearest_fixed((u32)t)) + smaller(bits(x), 1u);
  }
};

template <int BLOCK, int LEVELS, bool STOCHASTIC, u32 STREAM>
struct Log {
  static constexpr int block = BLOCK, numbers = 2;
  static constexpr bool is_signed = false, least = true, across = false, precise = LEVELS > 255;
  static constexpr u32 stream = STOCHASTIC ? STREAM : 0;
  struct Scale {
    double lo, step;  // octaves
  };
  using Encoder = typename At<precise ? 0 : 1, Precise, Quick>::type;
  HD static Scale open(const float* lo, const float* range) { return {*lo, (double)*range / (LEVELS - 1)}; }
  HD static float decode(int q, Scale s) {
    double y = s.lo + (double)(q - 1) * s.step;
    y = y < -149 ? -149 : (y > 128 ? 128 : y);
    double v = pow2_of(y);
    v = v > (double)0x1.fffffep127f ? (double)0x1.fffffep127f : v;
    return q == 0 ? 0.0f : (float)v;
  }
  HD static float prepare(float x) { return x; }
  HD static Encoder close(u32 most, u32 fewest, float* stored) {
    double hi = on_grid(log2_of(from_bits(most))), lo = on_grid(log2_of(from_bits(fewest)));
    hi = most < inf_bits ? hi : (double)from_bits(most);  // infinite or NaN: so is the range
    lo = lo < -126 ? -126 : lo;
    lo = lo < hi - 1 ? lo : hi - 1;
    bool empty = most == 0;
    stored[0] = empty ? 0.0f : (float)lo;
    stored[1] = empty ? 0.0f : (float)(hi - (double)(float)lo);
    double rate = empty ? 0.0 : (LEVELS - 1) / (double)stored[1];
    double tolerance = rate * 0x1p-19 + (LEVELS - 1) * 0x1p-22;
    if constexpr (precise) {
      return {(double)stored[0], rate, (float)tolerance};
    } else {
      const bool tiny = hi < -64;
      return {stored[0] + (tiny ? 64.0f : 0.0f), (float)rate * fixed_one, tiny ? 0x1p64f : 1.0f,
              tolerance < 1 ? (u32)(i32)(tolerance * fixed_one) : 0u};
    }
  }
  HD static u32 encode(float x, Encoder e, u32 noise) { return e.template code<LEVELS - 1, STOCHASTIC>(x, noise); }
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Log8 : Log<BLOCK, 255, STOCHASTIC, STREAM> {
  using Code = u8;
  static constexpr int packed = 1;
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Log16 : Log<BLOCK, 65535, STOCHASTIC, STREAM> {
  using Code = u16;
  static constexpr int packed = 1;
};

template <int BLOCK, bool STOCHASTIC, u32 STREAM>
struct Log4 : Log<BLOCK, 15, STOCHASTIC, STREAM> {
  using Code = u8;
  static constexpr int packed = 2, zero = 0;
  struct Scale {
    double least, step, step2, step4, step8;  // the value of code 1, and powers of the ratio of two codes
  };
  HD static Scale open(const float* lo, const float* range) {
    double step = pow2_of((double)*range / 14), step2 = step * step, step4 = step2 * step2;
    return {pow2_of(*lo + 0.0 * *range), step, step2, step4, step4 * step4};  // infinite range: code 1 is NaN
  }
  HD static float decode(int q, Scale s) {
    int k = q - 1;
    double v = s.least * (k & 1 ? s.step : 1.0) * (k & 2 ? s.step2 : 1.0);
    v = v * (k & 4 ? s.step4 : 1.0) * (k & 8 ? s.step8 : 1.0);
    v = v < (double)shardopt::least ? (double)shardopt::least : v;
    v = v > (double)0x1.fffffep127f ? (double)0x1.fffffep127f : v;
    return q == 0 ? 0.0f : (float)v;
  }
};

}  // namespace shardopt
