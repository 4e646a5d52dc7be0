// Elements and codes in memory or in registers: how a team reads and writes its share of a tile.
#pragma once
#include "platform.h"

namespace shardopt {

// In memory, a loop over elements ends at the last one and is vectorised. In registers, which have no addresses, it is
// unrolled: all E are worked out, and only those that exist are loaded, stored and counted.
#ifdef SHARDOPT_REGISTERS
#define ELEMENTS UNROLL
constexpr bool in_registers = true;
#else
#define ELEMENTS IVDEP
constexpr bool in_registers = false;
#endif

// E elements of memory: in place on a CPU; in registers on a GPU, moved 16 bytes at a time where all n == E exist and
// are aligned (`wide`).
template <class T, int E>
struct Window {
#ifdef SHARDOPT_REGISTERS
  alignas(16) T x[E];
  HD void load(const T* from, int n, bool wide) {
    if (wide)
      copy(x, from);
    else
      UNROLL for (int i = 0; i < E; i++) x[i] = i < n ? from[i] : T(0);
  }
  HD void store(T* to, int n, bool wide) {
    if (wide)
      copy(to, x);
    else
      UNROLL for (int i = 0; i < E; i++)
        if (i < n) to[i] = x[i];
  }
  HD static void copy(T* to, const T* from) {
    constexpr int bytes = E * sizeof(T), piece = bytes >= 16 ? 16 : bytes;
    UNROLL for (int i = 0; i < bytes / piece; i++) {
      if constexpr (piece == 16) ((uint4*)to)[i] = ((const uint4*)from)[i];
      if constexpr (piece == 8) ((uint2*)to)[i] = ((const uint2*)from)[i];
      if constexpr (piece == 4) ((uint1*)to)[i] = ((const uint1*)from)[i];
    }
  }
#else
  T* x;
  HD void load(const T* from, int, bool) { x = const_cast<T*>(from); }
  HD void store(T*, int, bool) {}
#endif
  HD T& operator[](int i) { return x[i]; }
};

// Codes of E elements; two of a byte are taken apart before the loop and put together after it. In memory, where a
// block's 16 values are a table, they are looked up before the loop, and bytes are widened before it.
template <class C, int E, bool FULL>
struct Codes {
  static constexpr bool all = FULL || in_registers;
  using T = typename C::Code;
  static constexpr bool widened = widens && !in_registers && C::block > 0 && C::packed == 1 && sizeof(T) == 1;
  Window<T, E / C::packed> bytes;
  u8 apart[C::packed == 2 ? E : 1];
  float values[C::packed == 2 && !in_registers ? E : 1];
  alignas(64) int ints[widened ? E : 1];
  HD void load(const T* from, int n, bool wide) {
    bytes.load(from, C::packed == 2 ? (n + 1) / 2 : n, wide);
    if constexpr (widened) widen(from, ints, FULL ? E : n);
    if constexpr (C::packed == 2 && in_registers) {
      ELEMENTS for (int i = 0; i < (all ? E : n + 1) / 2; i++) {
        apart[2 * i] = bytes[i] & 15;
        apart[2 * i + 1] = bytes[i] >> 4;
      }
    }
  }
  HD void look_up(const float* table, int n) {
    if constexpr (C::packed == 2 && !in_registers) shardopt::look_up(table, bytes.x, values, FULL ? E : (n + 1) & ~1);
  }
  HD void begin(T* to) {
    if constexpr (!in_registers) bytes.load(to, E, true);
  }
  HD auto get(int i) {
    if constexpr (C::packed == 2) {
      return (int)apart[i];
    } else if constexpr (widened) {
      return ints[i];
    } else {
      return bytes[i];
    }
  }
  template <class V>
  HD void put(int i, V code) {
    if constexpr (C::packed == 2) {
      apart[i] = (u8)code;
    } else {
      bytes[i] = (T)code;
    }
  }
  HD void store(T* to, int n, bool wide) {
    if constexpr (C::packed == 2) {
      ELEMENTS for (int i = 0; i < (all ? E : n + 1) / 2; i++) {
        u8 high = !FULL && 2 * i + 1 == n ? (u8)C::zero : apart[2 * i + 1];
        bytes[i] = (u8)(apart[2 * i] | (high << 4));
      }
    }
    bytes.store(to, C::packed == 2 ? (n + 1) / 2 : n, wide);
  }
};

}  // namespace shardopt
