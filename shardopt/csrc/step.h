// A whole step as a type: rule, formats, add-ons and write policy composed; and the descriptor of what it works on.
#pragma once
#include "addons.h"
#include "log_codecs.h"
#include "rules.h"
#include "write.h"

namespace shardopt {

// One run of rows x one run of columns of one parameter's local view. Pointers are to its first element; `ld` counts
// the elements of a whole local row. Made by shardopt/kernels/spans.py: every field is 8 bytes.
template <int PARTS>
struct Span {
  void* p;
  const void* g;
  const float* step;  // steps taken so far
  const i64* key;     // of the noise; null where none is drawn
  i64 group;          // whose numbers
  i64 rows, cols, row0, col0, ld;
  i64 tile0;  // tiles of all spans before this one
  void* part[PARTS > 0 ? PARTS : 1];
};

// The last span that begins at or before a tile.
template <class Span>
HD i64 span_of(const Span* spans, i64 count, i64 tile) {
  i64 at = 0, beyond = count;
  while (beyond - at > 1) {
    i64 middle = (at + beyond) / 2;
    (spans[middle].tile0 <= tile ? at : beyond) = middle;
  }
  return at;
}

template <class... C>
struct Slots {
  static constexpr int count = sizeof...(C);
  template <int I>
  using at = typename At<I, C..., void>::type;
  static constexpr int parts = (0 + ... + (1 + C::numbers));

  static constexpr int widest() {
    int most = 0;
    ((most = C::block > most ? C::block : most), ...);
    return most;
  }
  static constexpr int narrowest() {  // of those that have blocks, at most 256
    int fewest = 256;
    ((fewest = C::block > 0 && C::block < fewest ? C::block : fewest), ...);
    return fewest;
  }
  static constexpr int part_of(int slot) {  // where its parts begin
    int counts[] = {(1 + C::numbers)..., 0}, first = 0;
    for (int i = 0; i < slot; i++) first += counts[i];
    return first;
  }
};

template <class P_, class G_, class Rule_, class Slots_, class Gradient_, class Direction_, class Decay_, class Write_>
struct Step {
  using P = P_;
  using G = G_;
  using Rule = Rule_;
  using Slots = Slots_;
  using Gradient = Gradient_;
  using Direction = Direction_;
  using Decay = Decay_;
  using Write = Write_;
  using Span = shardopt::Span<Slots::parts>;
  static constexpr int slots = Slots::count;
  static constexpr int tile = Slots::widest() > 256 ? Slots::widest() : 256;
  static constexpr int numbers = Rule::numbers + Gradient::numbers + Direction::numbers + Decay::numbers;

  HD static i64 across(const Span& s) { return (s.cols + tile - 1) / tile; }  // tiles of a row

  // What is the same for all elements of a parameter in a step; `n`: numbers of the rule, then of every add-on.
  struct Scalars {
    typename Rule::Scalars rule;
    float lr, gradient[Gradient::numbers + 1], direction[Direction::numbers + 1], decay[Decay::numbers + 1];
  };
  HD static Scalars derive(const double* n, double t) {
    Scalars h;
    h.rule = Rule::derive(n, t);
    h.lr = (float)n[0];
    n += Rule::numbers;
    for (int i = 0; i < Gradient::numbers; i++) h.gradient[i] = (float)*n++;
    for (int i = 0; i < Direction::numbers; i++) h.direction[i] = (float)*n++;
    for (int i = 0; i < Decay::numbers; i++) h.decay[i] = (float)*n++;
    return h;
  }

  // Noise of every stream: of the parameter, then of every slot.
  struct Noise {
    u64 base[slots + 1];
  };
  struct RowNoise {
    u32 key[slots + 1];
  };
  HD static Noise noise(const i64* key, i64 t) {
    Noise found{};
    if constexpr (Write::noisy && !P::exact) found.base[0] = noise_base(*key, t, 0);
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      constexpr u32 stream = Slots::template at<I>::stream;
      if constexpr (stream != 0) found.base[I + 1] = noise_base(*key, t, stream);
    });
    return found;
  }
  HD static RowNoise row_noise(const Noise& noise, i64 row) {
    RowNoise found{};
    if constexpr (Write::noisy && !P::exact) found.key[0] = row_key(noise.base[0], row);
    each<slots>([&](auto i) {
      constexpr int I = decltype(i)::value;
      if constexpr (Slots::template at<I>::stream != 0) found.key[I + 1] = row_key(noise.base[I + 1], row);
    });
    return found;
  }
};

}  // namespace shardopt
