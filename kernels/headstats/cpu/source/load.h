// Reads q, k and v of any dtype and stride, and packs them for the products.
#pragma once
#include "call.h"
#include "product.h"

namespace {

enum Dtype { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Bfloat16 {
  uint16_t bits;
  operator float() const { return from_bits(uint32_t(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | 0x7f800000 | rest);  // infinity, NaN
    return from_bits(sign) + (sign ? -1 : 1) * from_bits(rest) * 0x1p112f;  // corrects the exponent bias
  }
};

// The rows of one head of a tensor.
template <class T>
struct Matrix {
  const void* at;
  int64_t offset, row, column;  // in elements
  int64_t dtype;

  template <class S>
  const S* from(int64_t i) const {
    return static_cast<const S*>(at) + offset + i * row;
  }

  // A pointer to row i if it can be read in place, else null.
  const T* plain(int64_t i) const {
    return dtype == (sizeof(T) == 8 ? FLOAT64 : FLOAT32) && column == 1 ? from<T>(i) : nullptr;
  }

  template <class S>
  void copy_as(T* to, int64_t i, int64_t count, int64_t step) const {
    const S* p = from<S>(i);
    if (column == 1 && step == 1) {
      for (int64_t d = 0; d < count; d++) to[d] = T(p[d]);
    } else {
      for (int64_t d = 0; d < count; d++) to[d * step] = T(p[d * column]);
    }
  }

  // Writes row i to to[0], to[step], ...
  void copy(T* to, int64_t i, int64_t count, int64_t step) const {
    if (dtype == BFLOAT16) return copy_as<Bfloat16>(to, i, count, step);
    if (dtype == FLOAT16) return copy_as<Float16>(to, i, count, step);
    return copy_as<T>(to, i, count, step);
  }
};

#if defined(__clang__)
#define HEADSTATS_SHUFFLE(a, b, mask) shuffled(a, b, mask)
template <class V, class I>
HEADSTATS_INLINE V shuffled(V a, V b, I mask) {
  V x;
  constexpr int n = sizeof(V) / sizeof(a[0]);
  for (int i = 0; i < n; i++) x[i] = mask[i] < n ? a[mask[i]] : b[mask[i] - n];
  return x;
}
#else
#define HEADSTATS_SHUFFLE(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

// Transposes WIDTH rows of WIDTH numbers: rows a and a + step exchange blocks, for step 1, 2, 4, ...
template <class T>
HEADSTATS_INLINE void transpose(const T* const* from, int64_t at, T* to, int64_t to_row) {
  constexpr int n = WIDTH<T>;
  Vec<T> x[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) x[i] = load(from[i] + at);
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    typename Lanes<T>::I low, high;
    for (int i = 0; i < n; i++) {
      low[i] = i & step ? n + (i ^ step) : i;
      high[i] = i & step ? n + i : i ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) {
      if (i & step) continue;
      const Vec<T> a = x[i], b = x[i + step];
      x[i] = HEADSTATS_SHUFFLE(a, b, low);
      x[i + step] = HEADSTATS_SHUFFLE(a, b, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) store(to + i * to_row, x[i]);
}

// c[j] = factor * a . key j, for j0 <= j < j1. Reads each key once, in order: for so few rows that packing keys would
// cost more. `depth` must be a multiple of WIDTH, and keys must be readable in place.
template <class T>
void dot_products(int64_t rows, const T* a, int64_t a_row, const Matrix<T>& keys, int64_t first, int64_t j0, int64_t j1,
                  T* c, int64_t c_row, int64_t depth, T factor) {
  for (int64_t j = j0; j < j1; j++) {
    const T* key = keys.plain(first + j);
    for (int64_t r = 0; r < rows; r++) {
      Vec<T> total{};
      for (int64_t d = 0; d < depth; d += WIDTH<T>) total += load(a + r * a_row + d) * load(key + d);
      c[r * c_row + j] = sum<T>(total) * factor;
    }
  }
}

// Packs keys [j0, j0 + count) as panels: [panel][d][column], with zeros in columns beyond `count`.
template <class T>
void pack_keys(const Matrix<T>& keys, int64_t j0, int64_t count, int64_t depth, T* to) {
  constexpr int64_t n = WIDTH<T>;
  for (int64_t j = 0; j < count; j += PANEL<T>, to += depth * PANEL<T>)
    for (int64_t c = 0; c < PANEL<T>; c += n) {
      const int64_t here = std::min(n, count - j - c);
      int64_t d = 0;
      if (here == n && keys.plain(j0)) {
        const T* rows[n];
        for (int64_t i = 0; i < n; i++) rows[i] = keys.plain(j0 + j + c + i);
        for (; d + n <= depth; d += n) transpose(rows, d, to + d * PANEL<T> + c, PANEL<T>);
        for (; d < depth; d++)
          for (int64_t i = 0; i < n; i++) to[d * PANEL<T> + c + i] = rows[i][d];
        continue;
      }
      for (int64_t i = 0; i < n; i++) {
        if (i < here) keys.copy(to + c + i, j0 + j + c + i, depth, PANEL<T>);
        else
          for (d = 0; d < depth; d++) to[d * PANEL<T> + c + i] = 0;
      }
    }
}

}  // namespace
