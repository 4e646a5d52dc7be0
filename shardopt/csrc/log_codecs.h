// Logarithmic codes of non-negative values: the twins of shardopt/codecs/log.py.
#pragma once
#include "codecs.h"

namespace shardopt {

HD double on_grid(double octaves) { return nearest_of(octaves * 0x1p20) * 0x1p-20; }

template <int BLOCK, int LEVELS, bool STOCHASTIC, u32 STREAM>
struct Log {
  static constexpr int block = BLOCK, numbers = 2;
  static constexpr bool least = true;
  static constexpr u32 stream = STOCHASTIC ? STREAM : 0;
  struct Scale {
    double lo, step;  // octaves
  };
  struct Encoder {
    double lo, rate;  // octaves, codes an octave
    float tolerance;
  };
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
    double hi = on_grid(log2_of<true>(from_bits(most))), lo = on_grid(log2_of<true>(from_bits(fewest)));
    hi = most < inf_bits ? hi : (double)from_bits(most);  // infinite or NaN: so is the range
    lo = lo < -126 ? -126 : lo;
    lo = lo < hi - 1 ? lo : hi - 1;
    bool empty = most == 0;
    stored[0] = empty ? 0.0f : (float)lo;
    stored[1] = empty ? 0.0f : (float)(hi - (double)(float)lo);
    double rate = empty ? 0.0 : (LEVELS - 1) / (double)stored[1];
    return {(double)stored[0], rate, (float)(rate * 0x1p-19 + (LEVELS - 1) * 0x1p-23)};
  }
  HD static int encode(float x, Encoder e, u32 noise) {
    float t = (float)((log2_of<(LEVELS > 255)>(x) - e.lo) * e.rate);
    t = STOCHASTIC ? dither(t, uniform(noise), e.tolerance) : nearest_of(t);
    t = t > 0 ? t : 0.0f;  // NaN too
    t = t < LEVELS - 1 ? t : (float)(LEVELS - 1);
    return x == 0 ? 0 : (int)t + 1;
  }
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
  using Base = Log<BLOCK, 15, STOCHASTIC, STREAM>;
  using Code = u8;
  static constexpr int packed = 2, zero = 0;
#ifndef __CUDACC_RTC__
  // On a CPU the 16 values of a block are worked out once; a GPU would have to keep them in slow memory.
  struct Scale {
    float value[16];
  };
  HD static Scale open(const float* lo, const float* range) {
    Scale s;
    auto block = Base::open(lo, range);
    IVDEP for (int q = 0; q < 16; q++) s.value[q] = Base::decode(q, block);
    return s;
  }
  HD static float decode(int q, const Scale& s) { return s.value[q]; }
#endif
};

}  // namespace shardopt
