// One query of one head: the keys it may see, the edits that act on it, and the running sums of its softmax.
//
// Logits are in base 2, x = logit * log2(e). Sums are relative to `top`, the largest x so far; when it rises, each
// term w = 2^(x - top) shrinks by alpha = 2^(old - new). Sums within a block of keys are
// computed in T, and added in double.
#pragma once
#include <limits>
#include <vector>

#include "load.h"

namespace {

constexpr double LOG2E = 1.44269504088896340735992468100, LN2 = 0.693147180559945309417232121458;
constexpr double HIDDEN = -1e36;    // logit of a hidden cell: -inf would give 0 * inf in the entropy
constexpr double LOWEST = -1.44e30;  // at or below it, cells are hidden; `top` starts here, so that 2^(HIDDEN - top) = 0
constexpr double ZERO = -1e28;       // logarithm of the weight of a visible cell with weight 0
constexpr double ALONE = -HIDDEN;     // the level of a row whose weights do not change
enum Layout { UNIFORM = 1, IDENTITY = 2, REVERSED = 3, RANDOM = 4 };

template <class T>
struct Row {
  int64_t b, h, i;       // batch row, head, query
  int64_t number;        // index of the row among B * H * M
  int64_t at;            // the query's position among keys
  int64_t near, beyond;  // causality and window allow the keys near <= j < beyond
  int64_t first, stop;   // keys that may be visible: the same, or all if a table opens cells
  T cool = 1;            // 1 / temperature
  T slope = 0;           // ALiBi
  const T* bias = nullptr;
  const uint8_t *mask = nullptr, *open = nullptr, *cut = nullptr, *real = nullptr;  // of its segment; of its keys
  const T *factor = nullptr, *raise = nullptr, *gain = nullptr, *late = nullptr;  // of the segment
  T level = T(ALONE), high = 0;  // numbers of the row for `replace_logits`
  uint32_t state = 0;
  const int32_t* segments = nullptr;  // segments of the keys

  T top = T(LOWEST);
  double mass = 0, entropy = 0, distance = 0, squares = 0;
  T all_top = T(LOWEST);  // before edits after the softmax, which do not change the norm
  double all_mass = 0;
  double sink = 0, local = 0, close = 0, spread = 0;
  int64_t argmax = -1, seen = 0;
  T diagonal = T(HIDDEN), previous = T(HIDDEN);
};

template <class T>
const T* row_of(const void* at, int64_t offset) {
  return at ? static_cast<const T*>(at) + offset : nullptr;
}

// `mix` of hash_noise.py.
inline uint32_t mix(uint32_t x) {
  x += 0x9E3779B9u;
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

template <class T>
void lay_out(const Call& c, Row<T>& r) {
  r.level = static_cast<const T*>(c.levels)[r.number];
  if (c.layout == REVERSED) r.high = static_cast<const T*>(c.tops)[r.number];
  if (c.layout == RANDOM) r.state = mix(uint32_t(r.at) ^ static_cast<const uint32_t*>(c.states)[r.b * c.H + r.h]);
}

template <class T>
Row<T> make_row(const Call& c, int64_t b, int64_t h, int64_t i) {
  Row<T> r;
  r.b = b, r.h = h, r.i = i;
  r.number = (b * c.H + h) * c.M + i;
  r.at = i + c.N - c.M;
  r.near = c.window ? r.at - c.window + 1 : 0;
  r.beyond = c.causal ? r.at + 1 : c.window ? r.at + c.window : c.N;
  r.near = std::min(std::max(r.near, int64_t(0)), c.N);
  r.beyond = std::max(std::min(r.beyond, c.N), r.near);
  r.first = c.segment_open ? 0 : r.near;
  r.stop = c.segment_open ? c.N : r.beyond;
  if (c.temperature)
    r.cool = T(1) / *row_of<T>(c.temperature, b * c.temperature_b + h * c.temperature_h + i * c.temperature_m);
  if (c.alibi) r.slope = static_cast<const T*>(c.alibi)[h] * T(LOG2E);
  r.bias = row_of<T>(c.bias, b * c.bias_b + h * c.bias_h + i * c.bias_m);
  r.real = row_of<uint8_t>(c.key_padding, b * c.N);
  if (c.layout) lay_out(c, r);
  r.segments = row_of<int32_t>(c.k_segments, b * c.k_segments_b);
  if (c.q_segments) {
    const int64_t s = static_cast<const int32_t*>(c.q_segments)[b * c.q_segments_b + i];
    r.mask = row_of<uint8_t>(c.segment_mask, b * c.segment_mask_b + h * c.segment_mask_h + s * c.segment_mask_m);
    r.open = row_of<uint8_t>(c.segment_open, b * c.segment_open_b + h * c.segment_open_h + s * c.segment_open_m);
  }
  if (c.edit_q_segments) {
    const int64_t s = static_cast<const int32_t*>(c.edit_q_segments)[b * c.edit_q_segments_b + i];
    r.cut = row_of<uint8_t>(c.knockout, b * c.knockout_b + h * c.knockout_h + s * c.knockout_m);
    r.factor = row_of<T>(c.logit_factor, b * c.logit_factor_b + h * c.logit_factor_h + s * c.logit_factor_m);
    r.raise = row_of<T>(c.logit_raise, b * c.logit_raise_b + h * c.logit_raise_h + s * c.logit_raise_m);
    r.gain = row_of<T>(c.edit_bias, b * c.edit_bias_b + h * c.edit_bias_h + s * c.edit_bias_m);
    r.late = row_of<T>(c.log2_gain, b * c.log2_gain_b + h * c.log2_gain_h + s * c.log2_gain_m);
  }
  return r;
}

}  // namespace
