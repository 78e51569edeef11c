// Vectors as wide as the registers of the target, by the compiler's vector types. The same source serves AVX-512, AVX2,
// SSE2 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define HEADSTATS_BYTES 64
#define HEADSTATS_REGISTERS 32
#elif defined(__AVX2__)
#define HEADSTATS_BYTES 32
#define HEADSTATS_REGISTERS 16
#elif defined(__aarch64__)
#define HEADSTATS_BYTES 16
#define HEADSTATS_REGISTERS 32
#else
#define HEADSTATS_BYTES 16
#define HEADSTATS_REGISTERS 16
#endif
#define HEADSTATS_INLINE inline __attribute__((always_inline))

namespace {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  typedef float V __attribute__((vector_size(HEADSTATS_BYTES)));
  typedef int32_t I __attribute__((vector_size(HEADSTATS_BYTES)));
  typedef float Loose __attribute__((vector_size(HEADSTATS_BYTES), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  using Int = int64_t;
  typedef double V __attribute__((vector_size(HEADSTATS_BYTES)));
  typedef int64_t I __attribute__((vector_size(HEADSTATS_BYTES)));
  typedef double Loose __attribute__((vector_size(HEADSTATS_BYTES), aligned(8), may_alias));
};
template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
constexpr int64_t WIDTH = HEADSTATS_BYTES / sizeof(T);

template <class T>
HEADSTATS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Loose*>(p);
}

template <class T>
HEADSTATS_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Lanes<T>::Loose*>(p) = x;
}

template <class T>
HEADSTATS_INLINE Vec<T> fill(T x) {
  return x - Vec<T>{};  // compilers broadcast scalars in arithmetic; subtraction keeps the sign of -0
}

template <class T>
HEADSTATS_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
HEADSTATS_INLINE T sum(Vec<T> x) {
  T a[WIDTH<T>];
  std::memcpy(a, &x, sizeof a);
  for (int64_t half = WIDTH<T> / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}

template <class T>
HEADSTATS_INLINE T largest(Vec<T> x) {
  T a[WIDTH<T>];
  std::memcpy(a, &x, sizeof a);
  for (int64_t half = WIDTH<T> / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

// 0, 1, 2, ...
template <class T>
HEADSTATS_INLINE Vec<T> counting() {
  Vec<T> x;
  for (int64_t i = 0; i < WIDTH<T>; i++) x[i] = T(i);
  return x;
}

// 2^f for -1/2 <= f <= 1/2, exactly 1 for 0. float: least relative error of degree 5, 9.1e-8; double: Taylor, 4e-18.
template <class V>
HEADSTATS_INLINE V power_of_part(V f, float) {
  V p = 1.3264726843650442e-3f * f + 9.67151266614742e-3f;
  p = p * f + 5.550733744426117e-2f;
  p = p * f + 2.4022242084797518e-1f;
  p = p * f + 6.9314697759835e-1f;
  return p * f + 1.0f;
}
template <class V>
HEADSTATS_INLINE V power_of_part(V f, double) {
  const double ln2 = 0.693147180559945309417232121458;
  V p = f * (ln2 / 13) + 1.0;
  for (int k = 12; k >= 1; k--) p = p * f * (ln2 / k) + 1.0;
  return p;
}

// 2^x for x <= 0, exactly 0 where the result would be subnormal, NaN for NaN.
template <class T>
HEADSTATS_INLINE Vec<T> exp2_below(Vec<T> x) {
  using I = typename Lanes<T>::I;
  constexpr bool single = std::is_same<T, float>::value;
  constexpr int bits = single ? 23 : 52;
  constexpr T lowest = single ? T(-126) : T(-1022);
  // Adding 1.5 * 2^bits leaves x, rounded to an integer, in the lowest bits of the sum.
  const Vec<T> magic = fill<T>(T(1.5) * T(int64_t(1) << bits));
  const Vec<T> shifted = x + magic;
  const Vec<T> part = x - (shifted - magic);
  const I exponent = ((I)shifted - (I)magic) << bits;
  const Vec<T> y = (Vec<T>)((I)power_of_part(part, T(0)) + exponent);
  return x < lowest ? Vec<T>{} : x == x ? y : x;  // arithmetic on the bits of NaN may give a number
}

template <class T>
inline T exp2_one(T x) {
  return x < (sizeof(T) == 4 ? T(-126) : T(-1022)) ? T(0) : std::exp2(x);
}

HEADSTATS_INLINE Vec<float> tanh_all(Vec<float> y) {
  const Vec<float> size = y < 0.0f ? -y : y;
  const Vec<float> t = exp2_below<float>(size * -2.8853900817779268f);  // exp(-2 |y|)
  const Vec<float> far = (1.0f - t) / (1.0f + t);
  const Vec<float> u = y * y;  // near 0 the quotient would lose digits; |y| < 0.6: relative error 1.1e-8
  Vec<float> p = -6.276370788705188e-3f * u + 2.1116200347477944e-2f;
  p = p * u - 5.3875134518507624e-2f;
  p = p * u + 1.33329239226736e-1f;
  p = p * u - 3.333333043035252e-1f;
  const Vec<float> near = y + y * u * p;
  return size < 0.6f ? near : (y < 0.0f ? -far : far);
}

HEADSTATS_INLINE Vec<double> tanh_all(Vec<double> y) {
  for (int64_t i = 0; i < WIDTH<double>; i++) y[i] = std::tanh(y[i]);
  return y;
}

}  // namespace
