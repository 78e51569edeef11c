// Turns products of queries and keys into logits, and into logarithms of weights.
#pragma once
#include "row.h"

namespace {

// Replaces the logits of visible cells, which end before `valid`, by the formula of `lowering.LoweredCall`.
template <class T>
void replace_logits(const Call& c, const Row<T>& r, T* x, int64_t j0, int64_t from, int64_t valid) {
  const auto each = [&](auto&& instead) {
    for (int64_t at = from; at < valid; at++)
      if (x[at] > T(LOWEST)) x[at] = instead(at);
  };
  const T least = (sizeof(T) == 4 ? T(1e-6) : T(1e-14)) * (1 + std::abs(r.high));  // smaller differences are rounding
  if (c.layout == UNIFORM) each([&](int64_t) { return r.level; });
  if (c.layout == IDENTITY) each([&](int64_t at) { return j0 + at == r.at ? r.level : T(ZERO); });
  if (c.layout == REVERSED)
    each([&](int64_t at) {
      const T below = r.high - x[at];
      return below > least ? r.level + r.high + std::log2(1 - std::exp2(-below)) : T(ZERO);
    });
  if (c.layout == RANDOM)
    each([&](int64_t at) {
      const uint32_t word = mix(mix(uint32_t(j0 + at)) ^ r.state);
      return r.level + std::log2((T(word >> 9) + T(0.5)) / T(1 << 23));
    });
}

// Turns logits into logarithms of the weights that remain after edits behind the softmax. x[c] belongs to key j0 + c.
template <class T>
void reweigh(const Call& c, const Row<T>& r, T* x, int64_t j0, int64_t from, int64_t valid) {
  if (r.level < T(ALONE)) replace_logits(c, r, x, j0, from, valid);
  if (r.late)
    for (int64_t at = from; at < valid; at++) {
      const T y = x[at] + r.late[r.segments[j0 + at]];
      x[at] = y > T(LOWEST) ? std::max(y, T(ZERO)) : y;  // all weights of 0 get the same logarithm
    }
}

// Turns scaled products x[from ... to) into logits: x[c] belongs to key j0 + c. Products end at `valid`, x at `to`.
template <class T>
void shape_logits(const Call& c, const Row<T>& r, T* x, int64_t j0, int64_t from, int64_t to, int64_t valid) {
  constexpr int64_t n = WIDTH<T>;
  valid = std::min(valid, to);
  if (c.softcap > 0)
    for (int64_t at = from; at < to; at += n) store(x + at, tanh_all(load(x + at)) * T(c.softcap * LOG2E));
  const int32_t* segments = r.segments + j0;
  if (r.factor)
    for (int64_t at = from; at < valid; at++) x[at] *= r.factor[segments[at]];
  if (r.raise)
    for (int64_t at = from; at < valid; at++) x[at] += r.raise[segments[at]] * std::abs(x[at]);
  if (c.alibi)
    for (int64_t at = from; at < valid; at++) x[at] -= r.slope * T(std::abs(r.at - j0 - at));
  if (r.bias)
    for (int64_t at = from; at < valid; at++) x[at] += r.bias[(j0 + at) * c.bias_d] * T(LOG2E);
  if (c.temperature)
    for (int64_t at = from; at < valid; at++) x[at] *= r.cool;
  if (r.gain)
    for (int64_t at = from; at < valid; at++) x[at] += r.gain[segments[at]] * T(LOG2E);
  if (r.open) {
    for (int64_t at = from; at < valid; at++)
      if ((j0 + at < r.near || j0 + at >= r.beyond) && !r.open[segments[at]]) x[at] = T(HIDDEN);
  } else {
    for (int64_t at = from; at < std::min(valid, r.near - j0); at++) x[at] = T(HIDDEN);
    for (int64_t at = std::max(from, r.beyond - j0); at < valid; at++) x[at] = T(HIDDEN);
  }
  for (int64_t at = std::max(from, valid); at < to; at++) x[at] = T(HIDDEN);
  if (r.real)
    for (int64_t at = from; at < valid; at++) x[at] = r.real[j0 + at] ? x[at] : T(HIDDEN);
  if (r.bias)
    for (int64_t at = from; at < valid; at++)
      x[at] = r.bias[(j0 + at) * c.bias_d] <= T(c.bias_hides) ? T(HIDDEN) : x[at];
  if (r.mask)
    for (int64_t at = from; at < valid; at++) x[at] = r.mask[segments[at]] ? x[at] : T(HIDDEN);
  if (r.cut)
    for (int64_t at = from; at < valid; at++) x[at] = r.cut[segments[at]] ? T(HIDDEN) : x[at];
  if (c.within) reweigh(c, r, x, j0, from, valid);
}

}  // namespace
