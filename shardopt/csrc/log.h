// log2 of a float32 and 2^y, straight-line and vectorisable: what the logarithmic codecs need beside the hardware.
// Minimax fits made for this file; errors in octaves, relative for pow2.
#pragma once
#include "platform.h"

namespace shardopt {

struct Parts2 {
  int exponent;
  float fraction;  // m - 1, m in [sqrt(1/2), sqrt(2))
};

HD Parts2 split_normal(float x) {  // of 0 and subnormal x: a logarithm between -127 and -126
  u32 b = bits(x);
  int e = (int)(b - 0x3f3504f3u) >> 23;  // sqrt(1/2)
  return {e, from_bits(b - ((u32)e << 23)) - 1.0f};
}
HD Parts2 split(float x) {  // x > 0
  bool tiny = x < 0x1p-126f;
  Parts2 s = split_normal(tiny ? x * 0x1p24f : x);
  return {s.exponent - (tiny ? 24 : 0), s.fraction};
}

// c[0] + c[1] x + ...; even and odd powers by themselves, which halves the latency.
template <class T, int N>
HD T polynomial(T x, const T (&c)[N]) {
  T square = x * x, high = c[N - 1], low = c[N - 2];
  each<(N - 1) / 2>([&](auto k) {
    constexpr int at = N - 3 - 2 * decltype(k)::value;
    high = fused(high, square, c[at]);
    if constexpr (at > 0) low = fused(low, square, c[at - 1]);
  });
  return N % 2 ? fused(low, x, high) : fused(high, x, low);
}

// log2 x - lo in float32, for codes wider than 1e-3 octaves; x normal. The fit is within 1e-7 octaves.
HD float octaves_from(float x, float lo) {
  constexpr float c[] = {0x1.715476p+0f,  -0x1.715470p-1f, 0x1.ec7094p-2f,  -0x1.715a76p-2f, 0x1.277e9ap-2f,
                         -0x1.eabd64p-3f, 0x1.a2f85ep-3f,  -0x1.87381ap-3f, 0x1.7d9132p-3f,  -0x1.c362c0p-4f};
  Parts2 s = split_normal(x);
  return fused(polynomial(s.fraction, c), s.fraction, (float)s.exponent - lo);
}

// Of 15 terms: a GPU reads them in its constant memory, where each would take two registers otherwise.
COEFFICIENTS double log2_terms[] = {
    0x1.71547652b89f4p+0,  -0x1.715476528dae2p-1, 0x1.ec709dbd14f68p-2,  -0x1.715476b3692fap-2, 0x1.2776c9480959cp-2,
    -0x1.ec70626b419f7p-3, 0x1.a61543ff0473ep-3,  -0x1.715b798a261b0p-3, 0x1.488d301e9b7fep-3,  -0x1.272d0f92924b0p-3,
    0x1.087be9aaf926bp-3,  -0x1.e9e2951d41a2cp-4, 0x1.0246bcbf6680ep-3,  -0x1.fa4c81592c3d1p-4, 0x1.0338c5f2efd1ap-4};
COEFFICIENTS double pow2_terms[] = {
    0x1.0000000000001p+0,  0x1.62e42fefa3a2cp-1,  0x1.ebfbdff82c49cp-3,  0x1.c6b08d703a5e4p-5,
    0x1.3b2ab6fbbf3c8p-7,  0x1.5d87fea162318p-10, 0x1.430912bf904b0p-13, 0x1.ffcb4a4505facp-17,
    0x1.62c06cd370252p-20, 0x1.b67e30af9669ep-24, 0x1.e52326a4a865ep-28};

// log2 x within 1e-12
HD double log2_of(Parts2 x) {
  const double r = x.fraction;
  return (double)x.exponent + polynomial(r, log2_terms) * r;
}
HD double log2_of(float x) { return log2_of(split(x)); }

// 2^f within 1e-15, -1/2 <= f <= 1/2; 2^y within 1e-15, -149 <= y <= 128
HD double pow2_of_fraction(double f) { return polynomial(f, pow2_terms); }
HD double pow2_of(double y) {
  const double whole = nearest_of(y);
  return pow2_of_fraction(y - whole) * bits_to_double((u64)(1023 + (i64)(int)whole) << 52);
}

}  // namespace shardopt
