// Short cuts of calm.h beside the formats themselves, where errors decide: for tests/test_calm_codecs.py.
#include "emulated.h"

namespace shardopt {

struct Draws {
  u64 state;
  u64 next() { return mix64(state += golden); }
  double uniform() { return (double)(next() >> 11) * 0x1p-53; }
  double between(double low, double high) { return low + (high - low) * uniform(); }
};

struct Found {
  long long doubts = 0, wrong = 0;
  template <class Q>
  void add(u32 word, u32 code) {
    Doubt doubt;
    doubt.add(word, word, Q::fraction, Q::margin);
    if (doubt.found(Q::margin))
      doubts++;
    else
      wrong += (word >> 8 * Q::at & 15u) != code;
  }
};

// Signed values within some 2^-16 of what parts two codes, and others.
template <class C>
Found dyn4(long long n, u64 seed) {
  using Q = Calm<C>;
  Draws draws{seed};
  Found found;
  for (long long i = 0; i < n; i++) {
    const float most = (float)pow(2.0, draws.between(-59, 59));
    const double part = Dynamic4::midpoint((int)(draws.next() % 14));
    const double near = draws.between(-1, 1) * pow(2.0, draws.between(-24, -15));
    const double ratio = i % 4 ? part * (1 + near) : draws.between(-1, 1);
    const float x = i % 1000 ? (float)(ratio * most) : i % 2000 ? 0.0f : -0.0f;
    float stored[2];
    const u32 word = Q::encode(x, Q::close(bits(most), 0, stored), 0);
    const auto encoder = C::close(bits(most), 0, stored);
    found.add<Q>(Q::placed(word, Q::cell_of(Q::cell(word) % 32)), (u32)C::encode(C::prepare(x), encoder, 0));
  }
  return found;
}

// Blocks of one octave up to 100; values and noise whose sum is near a whole number of codes, and others.
template <class C>
Found log4(long long n, u64 seed) {
  using Q = Calm<C>;
  Draws draws{seed};
  Found found;
  for (long long i = 0; i < n; i++) {
    const double octaves = i % 3 ? pow(2.0, draws.between(-2, 6.6)) : 1, low = draws.between(-59, 59 - octaves);
    const float fewest = (float)pow(2.0, low), most = (float)pow(2.0, low + octaves);
    float stored[2], exact[2];
    const auto encoder = C::close(bits(most), bits(fewest), exact);
    const auto quick = Q::close(bits(most), bits(fewest), stored, Q::measure(bits(most)), Q::measure(bits(fewest)));
    found.wrong += !Q::calm(bits(most), bits(fewest));
    found.wrong += bits(stored[0]) != bits(exact[0]) || bits(stored[1]) != bits(exact[1]);
    u32 noise = (u32)draws.next();
    if (i % 4 == 1) noise = i % 8 == 1 ? noise >> 15 : ~(noise >> 15);  // near 0 and 1, where the tolerance decides
    double t = draws.between(0, 14);
    const double near = draws.between(-1, 1) * pow(2.0, draws.between(-20, -13));
    if (i % 4) t = nearest_of(t) - (C::stream ? noise * 0x1p-32 : 0.5) + near;
    float x = (float)pow(2.0, exact[0] + t * exact[1] / 14);
    x = x < fewest ? fewest : x > most ? most : x;
    x = i % 1000 ? x : 0.0f;
    found.add<Q>(Q::encode(x, quick, noise), (u32)C::encode(C::prepare(x), encoder, noise));
  }
  return found;
}

// The values of all codes of stored blocks; those that calm tiles do without are in doubt.
template <class C>
Found entries(long long n, u64 seed) {
  using Q = Calm<C>;
  Draws draws{seed};
  Found found;
  const float close[3][2] = {  // a value each that lies between two float32, within some 1e-15 of its own size
      {-0x1.0d8ad8p+5f, 0x1.e31272p+3f}, {-0x1.d78b74p+5f, 0x1.31011p+2f}, {-0x1.72e754p+5f, 0x1.e54234p+3f}};
  for (long long i = 0; i < n; i++) {
    float lo = (float)(nearest_of(draws.between(-90, 50) * 0x1p20) * 0x1p-20);
    float range = (float)(nearest_of(draws.between(1, 60) * 0x1p20) * 0x1p-20);
    if (i < 3) lo = close[i][0], range = close[i][1];
    range = i % 100 == 7 ? from_bits(inf_bits + (u32)(i & 1)) : range;
    const auto scale = C::open(&lo, &range);
    for (u32 q = 0; q < 16; q++) {
      const float y = Q::entry(q, lo, range), z = C::decode((int)q, scale);
      if (bits(y) >= inf_bits)
        found.doubts += range == range && bits(range) < inf_bits && z < 0x1p125f;
      else
        found.wrong += bits(y) != bits(z);
    }
  }
  return found;
}

}  // namespace shardopt

extern "C" long long probe(int what, long long n, unsigned long long seed, long long* doubts) {
  using namespace shardopt;
  const Found found = what == 0   ? dyn4<Dyn4<128, Dynamic4>>(n, seed)
                      : what == 1 ? log4<Log4<256, true, 5u>>(n, seed)
                      : what == 2 ? log4<Log4<256, false, 0u>>(n, seed)
                                  : entries<Log4<256, true, 5u>>(n, seed);
  *doubts = found.doubts;
  return found.wrong;
}
