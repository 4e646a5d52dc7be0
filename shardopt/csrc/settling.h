// What changes once nobody needs the old values: rows and columns of factored slots, numbers of blocks on several ranks.
#pragma once
#include "passes.h"

namespace shardopt {

// f(i) for the 1024 entries of a row that a CTA takes.
template <class Cta, class Row, class F>
HD void shared_out(Cta& cta, const Row& s, i64 block, F&& f) {
  cta.warps([&](int warp, auto& team) {
    team.lanes([&](auto&, int lane) {
      const i64 first = (block - s.tile0) * 1024, last = first + 1024 < s.count ? first + 1024 : s.count;
      for (i64 i = first + warp * 32 + lane; i < last; i += warps * 32) f(i);
    });
  });
}

// The recurrences of factored slots.
template <class K>
struct Settling {
  struct Member {};
  struct Shared {
    float decay;
  };
  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    block += told(a).first;
    const Settle& s = row_of<Settle>(a, block);
    cta.once([&] {
      Numbers<K> numbers(a, s.group);
      cta.shared.decay = (float)K::Rule::decay(numbers.n, (double)*s.step + 1);
    });
    shared_out(cta, s, block, [&](i64 i) { s.part[i] = Factored::moved(s.part, s.means, cta.shared.decay, i); });
  }
};

// The numbers of blocks that lie on several ranks.
template <class K>
struct Closing {
  struct Member {};
  struct Shared {};
  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    block += told(a).first;
    const Close& s = row_of<Close>(a, block);
    shared_out(cta, s, block, [&](i64 i) { K::close(s, i); });
  }
};

}  // namespace shardopt
