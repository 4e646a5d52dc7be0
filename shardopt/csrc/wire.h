// A codec as the format of messages: whole rows of float32 to codes and blocks' numbers, and back; on CPUs. Blocks lie at
// GLOBAL columns; shardopt/kernels/wire.py says of which pieces this works. The GPU's side: wire_warp.h.
#pragma once
#include "codecs.h"

namespace shardopt {

template <class C>
struct Wire {
  using Code = typename C::Code;
  static constexpr bool blocked = C::block > 0;
  static constexpr int block = blocked ? C::block : 256, per = C::packed;
  static_assert(C::numbers <= 1 && C::stream == 0 && !C::least, "not sent");

  // One block, or with FULL == false what there is of it.
  template <bool FULL>
  static void encode(const float* x, Code* codes, float* number, int most_there) {
    const int n = FULL ? block : most_there;
    if constexpr (!blocked) {
      IVDEP for (int e = 0; e < n; e++) codes[e] = C::encode(x[e], 0);
    } else {
      u32 most = 0;
      for (int e = 0; e < n; e++) most = larger(most, bits(x[e]) & 0x7fffffffu);
      const auto scale = C::close(most, inf_bits, number);
      alignas(64) Code loose[block + 1];
      Code* to = per == 2 ? loose : codes;
      IVDEP for (int e = 0; e < n; e++) to[e] = (Code)C::encode(C::prepare(x[e]), scale, 0);
      if constexpr (per == 2) {
        if (!FULL && n % 2) loose[n] = C::zero;
        IVDEP for (int e = 0; e < (n + 1) / 2; e++) codes[e] = (Code)(loose[2 * e] | loose[2 * e + 1] << 4);
      }
    }
  }

  template <bool FULL>
  static void decode(const Code* codes, const float* number, float* x, int most_there) {
    const int n = FULL ? block : most_there;
    if constexpr (!blocked) {
      IVDEP for (int e = 0; e < n; e++) x[e] = C::decode(codes[e]);
    } else {
      const auto scale = C::open(number, number);
      if constexpr (per == 2) {
        float values[16];
        IVDEP for (int q = 0; q < 16; q++) values[q] = C::decode(q, scale);
        look_up(values, codes, x, n / 2 * 2);
        if (!FULL && n % 2) x[n - 1] = values[codes[n / 2] & 15];
      } else if constexpr (FULL && widens && sizeof(Code) == 1) {
        int wide[block];
        widen(codes, wide, block);
        IVDEP for (int e = 0; e < block; e++) x[e] = C::decode(wide[e], scale);
      } else {
        IVDEP for (int e = 0; e < n; e++) x[e] = C::decode(codes[e], scale);
      }
    }
  }

  // work(first, n, number): every block of a row whose first column is the `into`-th of one.
  template <class F>
  static void blocks(i64 cols, i64 into, F&& work) {
    i64 number = 0;
    for (i64 first = 0, n; first < cols; first += n, number++) {
      const i64 room = block - (number ? 0 : into);
      n = room < cols - first ? room : cols - first;
      work(first, (int)n, number);
    }
  }

  static void encode_row(const float* x, i64 cols, Code* codes, float* numbers) {
    blocks(cols, 0, [&](i64 first, int n, i64 b) {
      Code* to = codes + first / per;
      n == block ? encode<true>(x + first, to, numbers + b, n) : encode<false>(x + first, to, numbers + b, n);
    });
  }
  static void decode_row(const Code* codes, const float* numbers, i64 cols, i64 into, float* x) {
    blocks(cols, into, [&](i64 first, int n, i64 b) {
      const Code* from = codes + first / per;
      n == block ? decode<true>(from, numbers + b, x + first, n) : decode<false>(from, numbers + b, x + first, n);
    });
  }
};

constexpr i64 worth_threads = 1 << 15;  // elements

template <class C>
void encode_rows(const float* x, i64 rows, i64 cols, void* codes, float* numbers, int threads) {
  using W = Wire<C>;
  const i64 wide = (cols + W::per - 1) / W::per, blocks = (cols + W::block - 1) / W::block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * cols > worth_threads)
  for (i64 i = 0; i < rows; i++)
    W::encode_row(x + i * cols, cols, (typename W::Code*)codes + i * wide, numbers + i * blocks);
}

// into: columns of a block that lie before the first.
template <class C>
void decode_rows(const void* codes, const float* numbers, i64 rows, i64 cols, i64 into, float* x, int threads) {
  using W = Wire<C>;
  const i64 wide = (cols + W::per - 1) / W::per, blocks = (into + cols + W::block - 1) / W::block;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * cols > worth_threads)
  for (i64 i = 0; i < rows; i++)
    W::decode_row((const typename W::Code*)codes + i * wide, numbers + i * blocks, cols, into, x + i * cols);
}

}  // namespace shardopt

#define SHARDOPT_WIRE(C)                                                                                        \
  extern "C" void shardopt_encode(const float* x, long long rows, long long cols, void* codes, float* numbers,  \
                                  int threads) {                                                                \
    shardopt::encode_rows<C>(x, rows, cols, codes, numbers, threads);                                           \
  }                                                                                                             \
  extern "C" void shardopt_decode(const void* codes, const float* numbers, long long rows, long long cols,      \
                                  long long into, float* x, int threads) {                                      \
    shardopt::decode_rows<C>(codes, numbers, rows, cols, into, x, threads);                                     \
  }
