// What changes once nobody needs the old values: rows and columns of factored slots, numbers of blocks on several ranks.
#pragma once
#include "passes.h"

namespace shardopt {

// The recurrences of factored slots: 1024 rows or columns a CTA.
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
    cta.warps([&](int warp, auto& team) {
      team.lanes([&](auto&, int lane) {
        const i64 first = (block - s.tile0) * 1024, last = first + 1024 < s.count ? first + 1024 : s.count;
        for (i64 i = first + warp * 32 + lane; i < last; i += warps * 32)
          s.part[i] = Factored::moved(s.part, s.means, cta.shared.decay, i);
      });
    });
  }
};

// The numbers of blocks that lie on several ranks: 1024 a CTA.
template <class K>
struct Closing {
  struct Member {};
  struct Shared {};
  template <class Cta>
  HD static void run(Cta& cta, const Packed& a, i64 block) {
    if (skipped(a.taken)) return;
    block += told(a).first;
    const Close& s = row_of<Close>(a, block);
    cta.warps([&](int warp, auto& team) {
      team.lanes([&](auto&, int lane) {
        const i64 first = (block - s.tile0) * 1024, last = first + 1024 < s.count ? first + 1024 : s.count;
        for (i64 i = first + warp * 32 + lane; i < last; i += warps * 32) K::close(s, i);
      });
    });
  }
};

}  // namespace shardopt
