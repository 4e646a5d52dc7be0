// The formats of a step's slots, as one type.
#pragma once
#include "factored.h"

namespace shardopt {

template <class... C>
struct Slots {
  static constexpr int count = sizeof...(C);
  template <int I>
  using at = typename At<I, C..., void>::type;
  static constexpr int parts = (0 + ... + (1 + C::numbers));

  static constexpr bool tabled() { return (false || ... || (C::packed == 2)); }
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
  static constexpr int blocked() { return (0 + ... + (C::block > 0)); }
  static constexpr int asks_before(int slot) {  // the extremes that the slots before one ask
    int found = 0, i = 0;
    ((found += i++ < slot && C::across ? 1 + C::least : 0), ...);
    return found;
  }
  static constexpr int factored() {  // the slot that is, or -1
    int i = 0, found = -1;
    ((found = IsFactored<C>::value ? i : found, i++), ...);
    return found;
  }
  static constexpr int part_of(int slot) {  // where its parts begin
    int counts[] = {(1 + C::numbers)..., 0}, first = 0;
    for (int i = 0; i < slot; i++) first += counts[i];
    return first;
  }
};

struct Nothing {};
template <bool YES, class T>
struct Only {
  using type = T;
};
template <class T>
struct Only<false, T> {
  using type = Nothing;
};

}  // namespace shardopt
