// Matrix products of small tiles.
#pragma once
#include <algorithm>

#include "vector.h"

namespace {

constexpr int64_t TILE = 6;  // rows whose sums stay in registers, together with SPAN vectors of columns
constexpr int64_t SPAN = HEADSTATS_REGISTERS >= 32 ? 4 : 2;
template <class T>
constexpr int64_t PANEL = SPAN * WIDTH<T>;  // columns

// c = factor * a b, or c += a b. a: [rows, depth]; b: [depth, columns]; all row by row.
template <class T, int R, int S, bool ADD>
HEADSTATS_INLINE void tile_product(
    const T* a, int64_t a_row, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth, T factor) {
  Vec<T> sums[R][S] = {};
  for (int64_t x = 0; x < depth; x++) {
    Vec<T> line[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) line[s] = load(b + x * b_row + s * WIDTH<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<T> one = fill(a[r * a_row + x]);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) sums[r][s] += one * line[s];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      T* to = c + r * c_row + s * WIDTH<T>;
      store(to, ADD ? load(to) + sums[r][s] : sums[r][s] * factor);
    }
}

template <class T, int S, bool ADD>
void rows_product(int64_t rows, const T* a, int64_t a_row, const T* b, int64_t b_row, T* c, int64_t c_row,
                  int64_t depth, T factor) {
  switch (rows) {
    case 1: return tile_product<T, 1, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
    case 2: return tile_product<T, 2, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
    case 3: return tile_product<T, 3, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
    case 4: return tile_product<T, 4, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
    case 5: return tile_product<T, 5, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
    default: return tile_product<T, 6, S, ADD>(a, a_row, b, b_row, c, c_row, depth, factor);
  }
}

// c = factor * a b for at least the first `columns` columns of one panel of b.
template <class T>
void panel_product(int64_t rows, const T* a, int64_t a_row, const T* b, T* c, int64_t c_row, int64_t depth,
                   int64_t columns, T factor) {
  if (columns > 2 * WIDTH<T>) return rows_product<T, SPAN, false>(rows, a, a_row, b, PANEL<T>, c, c_row, depth, factor);
  if (columns > WIDTH<T>) return rows_product<T, 2, false>(rows, a, a_row, b, PANEL<T>, c, c_row, depth, factor);
  rows_product<T, 1, false>(rows, a, a_row, b, PANEL<T>, c, c_row, depth, factor);
}

// c += a b for `columns` columns, a multiple of WIDTH.
template <class T>
void add_product(int64_t rows, const T* a, int64_t a_row, const T* b, int64_t b_row, T* c, int64_t c_row,
                 int64_t depth, int64_t columns) {
  int64_t at = 0;
  for (; at + PANEL<T> <= columns; at += PANEL<T>)
    rows_product<T, SPAN, true>(rows, a, a_row, b + at, b_row, c + at, c_row, depth, T(1));
  if (SPAN == 4 && at + 2 * WIDTH<T> <= columns) {
    rows_product<T, 2, true>(rows, a, a_row, b + at, b_row, c + at, c_row, depth, T(1));
    at += 2 * WIDTH<T>;
  }
  if (at < columns) rows_product<T, 1, true>(rows, a, a_row, b + at, b_row, c + at, c_row, depth, T(1));
}

}  // namespace
