// Counter-based noise of (key, step, stream, GLOBAL row, GLOBAL column): shardopt/codecs/noise.py, line by line.
#pragma once
#include "platform.h"

namespace shardopt {

constexpr u64 golden = 0x9E3779B97F4A7C15ull;
constexpr u64 golden_step = 0x5851F42Dull;

HD u64 mix64(u64 x) {  // finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

HD u32 mix32(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// What is the same for all elements of one parameter, step and stream.
HD u64 noise_base(i64 key, i64 step, u64 stream) {
  return mix64(mix64((u64)key + stream * golden_step) + (u64)step * golden);
}

HD u32 row_key(u64 base, i64 row) {
  u64 hashed = mix64((u64)row * golden + base);
  return (u32)(hashed ^ (hashed >> 32));
}

HD u32 noise_at(u32 row, u32 column) { return mix32(row ^ column); }

// The same for columns first + i, where `first` is a multiple of a power of two above i, at most 2^16: row ^ column is
// (row ^ first) ^ i, so that what the first xor-shift adds is the same for all of them.
HD u32 noise_from(u32 row, u32 first) { return (row ^ first) ^ ((row ^ first) >> 16); }
HD u32 noise_of_product(u32 x) {
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
HD u32 noise_product(u32 from) { return from * 0x7FEB352Du; }
HD u32 noise_near(u32 from, u32 i) { return noise_of_product(noise_product(from ^ i)); }

// The first product of noise_near for i below N by an addition: (from ^ i) * c is from * c + ((from ^ i) - from) * c, and
// what is added is the same wherever `from` ends in the same bits.
template <int N>
struct Differences {
  alignas(64) u32 by[N];
  u32 last = N;
  HD void settle(u32 from) {
    if (from % N == last) return;
    last = from % N;
    IVDEP for (int i = 0; i < N; i++) by[i] = noise_product((last ^ (u32)i) - last);
  }
};

// The first product of noise_near for i of 0 to 7 by additions: setting bit k of `from ^ i` adds product[k] or takes it
// away, the same for every `from` with the same low 3 bits.
struct Steps {
  u32 by[3];
  HD static Steps of(u32 from) {
    Steps found;
    UNROLL for (int k = 0; k < 3; k++) found.by[k] = (from >> k & 1u ? 0u - 0x7FEB352Du : 0x7FEB352Du) << k;
    return found;
  }
  HD void products(u32 from, u32 (&x)[8]) const {
    x[0] = from * 0x7FEB352Du;
    UNROLL for (int k = 0; k < 3; k++)
      UNROLL for (int i = 0; i < 1 << k; i++) x[i + (1 << k)] = x[i] + by[k];
  }
};

// float32 in [0, 1) from the top 24 bits; the signed conversion is the one that vectorises.
HD float uniform(u32 noise) { return (float)(i32)(noise >> 8) * 0x1p-24f; }

}  // namespace shardopt
