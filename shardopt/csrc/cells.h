// One element's slots and one chunk's blocks: what the body of a step hands to the rules.
#pragma once
#include "step.h"

namespace shardopt {

// The decoding numbers of a slot's block, or nothing.
template <class C, bool BLOCKED>
struct Opened {
  HD static Opened at(const float*, const float*) { return {}; }
  template <class V>
  HD float decode(V code) const {
    return C::decode(code);
  }
};
template <class C>
struct Opened<C, true> {
  typename C::Scale scale;
  HD static Opened at(const float* a, const float* b) { return {C::open(a, b)}; }
  template <class V>
  HD float decode(V code) const {
    return C::decode(code, scale);
  }
};

// What the blocks of several chunks are encoded with, or nothing.
template <class C, bool NEEDED, int CHUNKS>
struct Encoders {};
template <class C, int CHUNKS>
struct Encoders<C, true, CHUNKS> {
  decltype(C::close(0, 0, nullptr)) of[CHUNKS];
};

// The 16 values that a block's codes of 4 bits stand for, where a table is quicker than decoding every element.
template <class C, bool TABLED>
struct Table {
  HD void open(const float*, const float*) {}
};
template <class C>
struct Table<C, true> {
  float value[16];
  HD void open(const float* a, const float* b) {
    const auto scale = C::open(a, b);
    IVDEP for (int q = 0; q < 16; q++) value[q] = C::decode(q, scale);
  }
};

// A slot's things, by the slot's index.
template <int I, class T>
struct Leaf {
  T value;
};
template <class S, class... T>
struct Leaves;
template <int... I, class... T>
struct Leaves<Seq<I...>, T...> : Leaf<I, T>... {};
template <int I, class T>
HD T& pick(Leaf<I, T>& leaf) {
  return leaf.value;
}

// What a block will be read back as, once its extremes are known.
template <class C, bool NEEDED>
struct Storing {
  HD void settle(u32, u32) {}
};
template <class C>
struct Storing<C, true> {
  decltype(C::close(0, 0, nullptr)) encoder;
  typename C::Scale scale;
  HD void settle(u32 most, u32 fewest) {
    float numbers[2];
    encoder = C::close(most, fewest, numbers);
    scale = C::open(&numbers[0], &numbers[C::numbers - 1]);
  }
  HD float value(float x, u32 random) const { return C::decode((typename C::Code)C::encode(C::prepare(x), encoder, random), scale); }
};

// The slots of one element, as the rules see them: `recur` registers a value and returns the one that the step uses.
template <class K, int PASS, class Stored>
struct Cells {
  HD static float root(float x) { return root_near(x); }
  HD static float over(float a, float b) { return shardopt::over(a, b); }
  const float* old;
  float *fresh, *want;
  float factor;  // of the factored slot
  const Stored& stored;
  float answer = 0;  // to what the rule asked
  template <int I>
  HD float recur(float decay, float x) {
    if constexpr (I == K::factored) {
      if constexpr (PASS == K::from_slot) want[0] = x;
      return factor;
    } else {
      float y = fresh[I] = old[I] * decay + x;
      if constexpr (K::stored) y = stored(Index<I>{}, y);
      return y;
    }
  }
};

}  // namespace shardopt
