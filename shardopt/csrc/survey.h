// One look at all gradients in front of a step: how many elements are wild, and the sum of squares in float64.
#pragma once
#include "write.h"

namespace shardopt {

// Made by shardopt/kernels/survey.py; 8 bytes a field. dtype: 0 float32, 1 bfloat16, 2 float16.
struct Gradient {
  const void* data;
  i64 elements, dtype, piece0;  // pieces of all gradients before this one
};
struct Found {
  double nonfinite, squares;
};

constexpr i64 piece_of_survey = 1 << 14;

// Sums of fixed stretches in fixed lanes: the same for any number of threads.
template <class G>
Found survey(const typename G::T* g, i64 n, float scale, bool zero, bool squares) {
  constexpr int lanes = 64;
  double sum[lanes] = {};
  u32 bad[lanes] = {};
  auto look = [&](i64 i, int lane, auto summed) {
    float x = G::load(g[i]) / scale;
    const bool spoils = wild(x);
    bad[lane] += spoils ? 1u : 0u;
    if constexpr (decltype(summed)::value) {
      x = zero && spoils ? 0.0f : x;
      sum[lane] += (double)x * (double)x;
    }
  };
  auto all = [&](auto summed) {
    i64 i = 0;
    for (; i + lanes <= n; i += lanes)
      IVDEP for (int lane = 0; lane < lanes; lane++) look(i + lane, lane, summed);
    for (int lane = 0; i + lane < n; lane++) look(i + lane, lane, summed);
  };
  squares ? all(Index<1>{}) : all(Index<0>{});
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half], bad[lane] += bad[lane + half];
  return {(double)bad[0], sum[0]};
}

inline Found survey(const Gradient& g, i64 piece, float scale, bool zero, bool squares) {
  const i64 first = (piece - g.piece0) * piece_of_survey;
  const i64 left = g.elements - first, n = left < piece_of_survey ? left : piece_of_survey;
  if (g.dtype == 0) return survey<F32>((const float*)g.data + first, n, scale, zero, squares);
  if (g.dtype == 1) return survey<BF16>((const u16*)g.data + first, n, scale, zero, squares);
  return survey<F16>((const u16*)g.data + first, n, scale, zero, squares);
}

}  // namespace shardopt

// found: room for every piece; of a gradient, the first of its pieces becomes what all of them found.
extern "C" void shardopt_survey(const shardopt::Gradient* gradients, const long long* owners, long long pieces,
                                shardopt::Found* found, float scale, int zero, int squares, int threads) {
  using namespace shardopt;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 1)
  for (i64 i = 0; i < pieces; i++) found[i] = survey(gradients[owners[i]], i, scale, zero != 0, squares != 0);
  for (i64 i = 1; i < pieces; i++) {
    Found& all = found[gradients[owners[i]].piece0];
    if (&all != found + i) all.nonfinite += found[i].nonfinite, all.squares += found[i].squares;
  }
}
