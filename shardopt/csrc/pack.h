// Eight elements or codes as they lie in memory, in words: how a lane reads and writes its share of a tile.
#pragma once
#include "near.h"

namespace shardopt {

// As many bytes as an element has, as a number.
template <int BYTES>
struct Bits {
  using type = u32;
};
template <>
struct Bits<1> {
  using type = u8;
};
template <>
struct Bits<2> {
  using type = u16;
};

// C: a format, with its Code and how many of them are `packed` into one.
template <class C>
struct Pack {
  using Code = typename C::Code;
  using Entry = typename Bits<sizeof(Code)>::type;
  static constexpr int entries = 8 / C::packed, bytes = entries * sizeof(Code), words = bytes / 4, of = 4 / sizeof(Code);
  static constexpr int piece = bytes < 16 ? bytes : 16;
  alignas(piece) u32 word[words];

  HD auto get(int i) const {
    if constexpr (C::packed == 2)
      return (int)(word[0] >> 4 * i & 15u);
    else if constexpr (sizeof(Code) == 4)
      return from_bits(word[i]);
    else
      return (Code)(word[i / of] >> 8 * (int)sizeof(Code) * (i % of));
  }
  HD u32 nibbles_from(int i) const { return word[0] >> 4 * i; }
  HD int signed_byte(int i) const { return (int)pick_bytes(word[i / 4], 0, 0x8880u + 0x1111u * (u32)(i % 4)); }

  HD void set(const u32 (&codes)[8], int at = 0) {  // at: the first byte of a code in its word
    if constexpr (C::packed == 2) {
      const u32 *x = codes, pair = 0x40u + 0x11u * (u32)at;
      const u32 even = pick_bytes(pick_bytes(x[0], x[2], pair), pick_bytes(x[4], x[6], pair), 0x5410u);
      const u32 odd = pick_bytes(pick_bytes(x[1], x[3], pair), pick_bytes(x[5], x[7], pair), 0x5410u);
      word[0] = (even & 0x0f0f0f0fu) | (odd << 4 & 0xf0f0f0f0u);
    } else {
      UNROLL for (int i = 0; i < words; i++) {
        const u32 *x = codes + of * i, pair = 0x40u + 0x11u * (u32)at;  // that byte of the first, then of the second
        if constexpr (sizeof(Code) == 1)
          word[i] = pick_bytes(pick_bytes(x[0], x[1], pair), pick_bytes(x[2], x[3], pair), 0x5410u);
        else if constexpr (sizeof(Code) == 2)
          word[i] = pick_bytes(x[0], x[1], 0x5410u + 0x1111u * (u32)at);
        else
          word[i] = x[0];
      }
    }
  }

  // Drops element 0, moves the others up and appends one: a loop that is not unrolled can have registers only like this.
  HD void turn(u32 code) {
    constexpr int width = C::packed == 2 ? 4 : 8 * (int)sizeof(Code), last = words - 1;
    UNROLL for (int i = 0; i < words; i++)
      word[i] = (u32)((i < last ? (u64)word[i < last ? i + 1 : i] << 32 | word[i] : word[i]) >> width);
    word[last] |= code << (32 - width);
  }

  // Number `at` of an array's eights, which is whole and aligned.
  HD void load(const void* array, u32 at) { copy(word, (const u8*)in_memory(array) + (u64)at * bytes); }
  // Element i of an array; 0 where it does not exist.
  HD static auto one(const void* array, u32 i, bool exists) {
    const Code* from = (const Code*)in_memory(array);
    if constexpr (C::packed == 2)
      return exists ? from[i / 2] >> 4 * (i % 2) & 15 : 0;
    else
      return exists ? from[i] : Code(0);
  }
  // n: how many elements exist; wide: all, where 16 bytes can be moved at a time.
  HD void store(void* array, u32 at, int n = 8, bool wide = true) const {
    u8* to = (u8*)in_memory(array) + (u64)at * bytes;
    if (wide)
      copy(to, word);
    else
      UNROLL for (int i = 0; i < entries; i++)
        if (C::packed * i < n) ((Entry*)to)[i] = (Entry)(word[i / of] >> 8 * (int)sizeof(Code) * (i % of) % 32);
  }
  HD static void copy(void* to, const void* from) {
    UNROLL for (int i = 0; i < bytes / piece; i++) {
      if constexpr (piece == 16) ((uint4*)to)[i] = ((const uint4*)from)[i];
      if constexpr (piece == 8) ((uint2*)to)[i] = ((const uint2*)from)[i];
      if constexpr (piece == 4) ((uint1*)to)[i] = ((const uint1*)from)[i];
    }
  }
};

template <class Memory>
struct Unpacked {  // elements of parameters and gradients are packed as codes are
  using Code = typename Memory::T;
  static constexpr int packed = 1;
};
template <class Memory>
using Elements = Pack<Unpacked<Memory>>;

HD void turn(float (&x)[8], float last) {  // the same of numbers
  UNROLL for (int i = 0; i < 7; i++) x[i] = x[i + 1];
  x[7] = last;
}

HD u32 as_word(float x) { return bits(x); }
template <class T>
HD u32 as_word(T x) {
  return (u32)x;
}

}  // namespace shardopt
