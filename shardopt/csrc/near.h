// What a GPU does in one instruction, near enough or several at once; with twins for the emulated GPU.
#pragma once
#include "log.h"

namespace shardopt {

#ifdef __CUDACC_RTC__
#define ROLLED _Pragma("unroll 1")
HD void forget() { asm volatile("" ::: "memory"); }  // what was read of memory: a loop that reads it anew has registers
template <class T>
HD T* in_memory(T* x) {  // not in shared memory, which a pointer that was kept there could be
  __builtin_assume(__isGlobal(x));
  return x;
}
HD float log2_near(float x) {  // within 2^-22, beyond [1/2, 2] within 2 ulp; -inf of a subnormal x
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HD float reciprocal_near(float x) {  // within 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HD float at_least(float x, float low) { return fmaxf(x, low); }  // of NaN: low
HD u32 low_word(double x) { return (u32)__double2loint(x); }
HD u32 pick_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
HD u32 smaller_sums(u32 a, u32 b, u32 c) { return __viaddmin_u16x2(a, b, c); }
HD u32 opaque(u32 x) {  // what the compiler may not see through
  asm("" : "+r"(x));
  return x;
}
HD u32 larger_where_positive(float x, u32 a, u32 b) {  // one instruction under a predicate
  asm("{.reg .pred p; setp.gt.f32 p, %1, 0f00000000; @p max.u32 %0, %0, %2;}" : "+r"(a) : "f"(x), "r"(b));
  return a;
}
HD u32 broken(u32 pair, u32 before) {  // not 0 in the lower 15 bits of a half where a bfloat16 is infinite or NaN
  u32 y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(pair), "r"(0), "r"(before));
  return y;
}
HD u32 signed_larger(u32 a, u32 b) { return (u32)max((i32)a, (i32)b); }
HD float peak(float most, float x) {
  float y;
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(most), "f"(fabsf(x)));
#else
  y = from_bits(larger(bits(most), bits(x) & 0x7fffffffu));
#endif
  return y;
}
#else
#define ROLLED
HD void forget() {}
template <class T>
HD T* in_memory(T* x) {
  return x;
}
HD float worst(float x) {  // off by up to 2 ulp, as what the GPU has may be
  return x > 0 ? from_bits(bits(x) + bits(x) * 0x9E3779B9u / 0x33333334u - 2) : x;
}
HD float sqrt_near(float x) { return x < 0x1p-126f ? 0.0f : worst(root(x)); }
HD float rsqrt_near(float x) { return worst(1.0f / root(x)); }
HD float log2_near(float x) {
  const double y = log2_of(x), error = (i32)(bits(x) * 0x9E3779B9u) * (0x1p-31 * 0x1p-22);
  return x < 0x1p-126f ? -from_bits(inf_bits) : x == x ? (float)(y + error * (y < -1 || y > 1 ? y : 1)) : x;
}
HD float reciprocal_near(float x) { return worst(1.0f / x); }
HD float at_least(float x, float low) { return x > low ? x : low; }
HD u32 low_word(double x) {
  u64 y;
  __builtin_memcpy(&y, &x, sizeof y);
  return (u32)y;
}
HD u32 pick_bytes(u32 low, u32 high, u32 selector) {
  const u64 both = (u64)high << 32 | low;
  u32 y = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = selector >> 4 * i, byte = (u32)(both >> 8 * (nibble & 7u) & 0xffu);
    y |= (nibble & 8u ? (byte >> 7) * 0xffu : byte) << 8 * i;  // 8: its sign
  }
  return y;
}
HD u32 smaller_sums(u32 a, u32 b, u32 c) {
  const u32 low = smaller(a + b & 0xffffu, c & 0xffffu), high = smaller((a >> 16) + (b >> 16) & 0xffffu, c >> 16);
  return high << 16 | low;
}
HD u32 opaque(u32 x) { return x; }
HD u32 larger_where_positive(float x, u32 a, u32 b) { return x > 0 ? larger(a, b) : a; }
HD u32 broken(u32 pair, u32 before) {
  const u32 low = (pair & 0x7f80u) == 0x7f80u, high = (pair >> 16 & 0x7f80u) == 0x7f80u;
  return before | low * 0x7fc0u | high * 0x7fc00000u;
}
HD u32 signed_larger(u32 a, u32 b) { return (i32)a > (i32)b ? a : b; }
HD float peak(float most, float x) { return from_bits(larger(bits(most), bits(x) & 0x7fffffffu)); }
#endif

// q c, rounded once, of byte i of a word: its bits are put into those of 2^23.
HD float byte_times(u32 word, int i, float c, u32 two23) {
  return fused(from_bits(pick_bytes(word, two23, 0x7440u + (u32)i)), c, -0x1p23f * c);
}
HD float with_sign(float magnitude, float x) { return from_bits(bits(magnitude) | (bits(x) & 0x80000000u)); }

}  // namespace shardopt
