// Second moments as the product of a row and a column: the twin of shardopt/codecs/factored.py.
//
// The recurrence acts on the means of rows and columns, which are asked: row <- decay row + rows, col <- decay col +
// cols. They are worked out anew wherever they are used, since nothing is written before all have read the old ones.
#pragma once
#include "asking.h"

namespace shardopt {

struct Factored {
  using Code = float;  // parts: row, col
  static constexpr int block = 0, packed = 1, numbers = 1, rounds = 1;
  static constexpr bool least = false, across = false;
  static constexpr u32 stream = 0;
  HD static constexpr Wants wants(int) { return {0, true, true}; }
  enum { ROWS, COLS, MEAN, OLD_MEAN };  // what is answered; means of a stack are float32, one a matrix

  // What a span of one matrix needs, and one row of it. col, cols: of the span's first column.
  struct Line {
    const float *col, *cols;
    float decay, mean;  // mean: the new mean(row)
    float relative;     // the new row_i / mean
    HD float column(i64 j) const { return moved(col, cols, decay, j); }
    HD float value(i64 j) const { return relative * column(j); }
  };

  HD static float mean(Answers a, double decay, double floor, i64 matrix) {
    if (matrix >= 0) {
      float x = ((const float*)a[OLD_MEAN])[matrix] * (float)decay + ((const float*)a[MEAN])[matrix];
      return x < (float)floor ? (float)floor : x;
    }
    double x = *(const double*)a[OLD_MEAN] * decay + *(const double*)a[MEAN];
    return (float)(x < floor ? floor : x);
  }
  HD static float moved(const float* part, const float* means, float decay, i64 i) {
    return part[i] * decay + means[i];
  }
};

template <class C>
struct IsFactored {
  static constexpr bool value = false;
};
template <>
struct IsFactored<Factored> {
  static constexpr bool value = true;
};

}  // namespace shardopt
