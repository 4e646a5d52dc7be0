// What differs between a CPU compiler and NVRTC, and the few operations whose rounding both must share.
// Includes nothing on the device: NVRTC sees no headers of the host.
#pragma once

#ifdef __CUDACC_RTC__
#define HD __host__ __device__ __forceinline__
#define INLINE  // of a lambda; the device's are anyway
#define UNROLL _Pragma("unroll")
#define IVDEP UNROLL
#define SHARDOPT_REGISTERS  // see tile.h
#define CONSTANTS static const float  // global memory, which L1 caches
#define COEFFICIENTS __constant__  // memory whose numbers are operands
#else
extern "C" double pow(double, double), sqrt(double), atan2(double, double);  // <math.h> is a third of a compilation
#define HD inline __attribute__((always_inline))
#define INLINE __attribute__((always_inline))
#define UNROLL
#define CONSTANTS static const float  // a table in memory, not on the stack
#define COEFFICIENTS constexpr
#if defined(__clang__)
#define IVDEP _Pragma("clang loop vectorize(enable) interleave(enable)")
#else
#define IVDEP _Pragma("GCC ivdep")
#endif
#endif

namespace shardopt {

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr float least = 0x1p-149f;  // the smallest positive float32
constexpr u32 inf_bits = 0x7f800000u;

#ifdef __CUDACC_RTC__
// Of a number that several teams have something to say to: the order in which they do makes no difference.
HD void raise(u32* at, u32 x) { atomicMax(at, x); }
HD void lower(u32* at, u32 x) { atomicMin(at, x); }
constexpr bool early_roots = false;  // see below: here it would need registers
HD u32 bits(float x) { return __float_as_uint(x); }
HD float from_bits(u32 x) { return __uint_as_float(x); }
HD float rsqrt_near(float x) {  // within 2 ulp
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HD float sqrt_near(float x) {  // within 2 ulp; 0 of a subnormal x
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// IEEE's square root of 0 and of 2^-100 <= x < inf, as the compiler's fast path computes it, without its branch.
HD float root_of_normal(float x) {
  float y = rsqrt_near(fmaxf(x, 0x1p-100f)), g = x * y;
  return __fmaf_rn(__fmaf_rn(-g, g, x), y * 0.5f, g);
}
HD float root(float x) {  // of any x >= 0: the remainder of a tiny one would underflow
  bool tiny = x < 0x1p-100f;
  float r = root_of_normal(tiny ? x * 0x1p64f : x);
  return bits(x) == inf_bits ? x : tiny ? r * 0x1p-32f : r;
}
HD float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
HD double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
// Of |x| <= 2^22, by the addition's rounding: four times as fast as the conversion unit. -0 becomes 0.
HD float nearest_of(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
HD float floor_of(float x) {
  float near = nearest_of(x);
  return near > x ? near - 1.0f : near;
}
HD double floor_of(double x) { return floor(x); }
HD double nearest_of(double x) { return rint(x); }
HD float size(float x) { return fabsf(x); }
HD double size(double x) { return fabs(x); }
HD double bits_to_double(u64 x) { return __longlong_as_double((i64)x); }
#ifdef SHARDOPT_FAST
HD float over(float a, float b) {  // within 2 ulp for normal b and 1 / b, which root(v) + eps always has
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return a * y;
}
// The root that a direction is made of, and a b + c there.
HD float root_near(float x) {
  const bool tiny = x < 0x1p-126f;
  const float y = sqrt_near(tiny ? x * 0x1p64f : x);
  return tiny ? y * 0x1p-32f : y;
}
// The same, and a quotient, where all numbers are calm: see `Calmly`.
HD float root_calm(float x) { return sqrt_near(x); }
HD float over_calm(float a, float b) { return over(a, b); }
constexpr bool calm_checked = false;  // whether they must be looked at
HD float multiply_add(float a, float b, float c) { return fused(a, b, c); }
HD float decayed(bool acts, float p, float decay, float lr, float delta) {
  return acts ? fused(p, decay * lr, delta) : delta;
}
#else
HD float over(float a, float b) { return a / b; }
HD float root_near(float x) { return root(x); }
HD float root_calm(float x) { return root_of_normal(x); }
HD float over_calm(float a, float b) {  // the compiler's own way through a division, without its branch
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = __fmaf_rn(__fmaf_rn(-b, y, 1.0f), y, y);
  const float q = a * y;
  return __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
}
constexpr bool calm_checked = true;
HD float multiply_add(float a, float b, float c) { return a * b + c; }
HD float decayed(bool acts, float p, float decay, float lr, float delta) {
  return acts ? delta + p * decay * lr : delta;
}
#endif
constexpr bool widens = false;
#else
HD float multiply_add(float a, float b, float c) { return a * b + c; }
HD float decayed(bool acts, float p, float decay, float lr, float delta) {
  return acts ? delta + p * decay * lr : delta;
}
HD void replace(u32* at, u32 x, bool (*better)(u32, u32)) {
  u32 now = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (better(x, now) && !__atomic_compare_exchange_n(at, &now, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
}
HD void raise(u32* at, u32 x) {
  replace(at, x, [](u32 a, u32 b) { return a > b; });
}
HD void lower(u32* at, u32 x) {
  replace(at, x, [](u32 a, u32 b) { return a < b; });
}
constexpr bool early_roots = true;  // a root that only a code needs is taken with the step, where it hides
HD float over(float a, float b) { return a / b; }
HD u32 bits(float x) {
  u32 y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
HD float from_bits(u32 x) {
  float y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
HD double bits_to_double(u64 x) {
  double y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
HD float root(float x) { return __builtin_sqrtf(x); }
HD float root_near(float x) { return root(x); }
HD float root_calm(float x) { return root(x); }
HD float over_calm(float a, float b) { return a / b; }
constexpr bool calm_checked = true;
HD float root_of_normal(float x) { return root(x); }
HD float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
HD double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
HD float floor_of(float x) { return __builtin_floorf(x); }
HD double floor_of(double x) { return __builtin_floor(x); }
HD float nearest_of(float x) { return __builtin_rintf(x); }
HD double nearest_of(double x) { return __builtin_rint(x); }
HD float size(float x) { return __builtin_fabsf(x); }
HD double size(double x) { return __builtin_fabs(x); }
// out[i] = bytes[i]: a loop that has bytes in it works on as many elements at a time as a register holds bytes, four
// times as many as it can work on. Only where one instruction does 16.
#if defined(__GNUC__) && defined(__AVX512F__)
constexpr bool widens = true;
template <class T>
HD void widen(const T* bytes, int* out, int n) {
  typedef T Bytes __attribute__((vector_size(16), aligned(1), may_alias));
  typedef int Ints __attribute__((vector_size(64)));
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    Ints some;
    if constexpr (T(-1) < T(0))
      asm("vpmovsxbd %1, %0" : "=v"(some) : "m"(*(const Bytes*)(bytes + i)));
    else
      asm("vpmovzxbd %1, %0" : "=v"(some) : "m"(*(const Bytes*)(bytes + i)));
    __builtin_memcpy(out + i, &some, sizeof some);
  }
  for (; i < n; i++) out[i] = bytes[i];
}
#else
constexpr bool widens = false;
template <class T>
HD void widen(const T*, int*, int) {}
#endif
// out[i] = table[nibble i], of 16 entries; the low nibble of a byte comes first; n even.
HD void look_up(const float* table, const u8* bytes, float* out, int n) {
  int i = 0;
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
  typedef float Floats __attribute__((vector_size(64)));
  typedef int Ints __attribute__((vector_size(64)));
  typedef u64 Words __attribute__((vector_size(64)));
  const Ints halves = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const Ints shifts = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  Floats all;
  __builtin_memcpy(&all, table, sizeof all);
  for (; i + 16 <= n; i += 16) {
    u64 word;
    __builtin_memcpy(&word, bytes + i / 2, sizeof word);
    Ints nibbles = __builtin_shuffle((Ints)(Words{} + word), halves) >> shifts;
    Floats found = __builtin_shuffle(all, nibbles);  // it reads the low 4 bits of each
    __builtin_memcpy(out + i, &found, sizeof found);
  }
#elif defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
  typedef float Floats __attribute__((vector_size(32)));
  typedef i32 Ints __attribute__((vector_size(32)));
  const Ints shifts = {0, 4, 8, 12, 16, 20, 24, 28};
  Floats low, high;
  __builtin_memcpy(&low, table, sizeof low);
  __builtin_memcpy(&high, table + 8, sizeof high);
  for (; i + 8 <= n; i += 8) {
    i32 word;
    __builtin_memcpy(&word, bytes + i / 2, sizeof word);
    Floats found = __builtin_shuffle(low, high, (Ints{} + word) >> shifts);
    __builtin_memcpy(out + i, &found, sizeof found);
  }
#endif
  for (; i < n; i += 2) out[i] = table[bytes[i / 2] & 15], out[i + 1] = table[bytes[i / 2] >> 4];
}
#endif

// The low byte of the nearest integer to x, |x| < 2^22, plus an even number: the addition's rounding leaves it in the
// last bits. NaN: 0.
HD u8 nearest_byte(float x, float even = 0) { return (u8)bits(x + (0x1.8p23f + even)); }

// Not finite, or so large (2^64) that its square is not: a second moment in codes would be NaN. `LARGEST` of item.py.
HD bool wild(float x) { return (bits(x) & 0x7fffffffu) >= 0x5f800000u; }

HD float copy_sign(float x, float sign) { return from_bits((bits(x) & 0x7fffffffu) | (bits(sign) & 0x80000000u)); }
HD float clamp(float x, float low, float high) {  // NaN stays NaN, as torch.clamp
  x = x < low ? low : x;
  return x > high ? high : x;
}
HD u32 larger(u32 a, u32 b) { return a > b ? a : b; }
HD u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// sign(x) as torch.sign: 0 for 0; NaN gives 0
HD float sign(float x) { return size(x) > 0.0f ? copy_sign(1.0f, x) : 0.0f; }

// A compile-time number as an argument, and a loop over such numbers.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int... I>
struct Seq {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Seq<I...>;
};
template <class F, int... I>
HD void each(F&& f, Seq<I...>) {
  (f(Index<I>{}), ...);
}
template <int N, class F>
HD void each(F&& f) {
  each(f, typename Count<N>::type{});
}

template <int I, class First, class... Rest>
struct At : At<I - 1, Rest...> {};
template <class First, class... Rest>
struct At<0, First, Rest...> {
  using type = First;
};

}  // namespace shardopt
