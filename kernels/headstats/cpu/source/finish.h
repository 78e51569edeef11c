// Results that are written after a row has seen all its keys.
#pragma once
#include "rows.h"

namespace {

// The row's softmax denominator is 2^shift 2^log: kept apart, because beside a large logit the sum would be lost to
// rounding. log is -inf if the row sees no key, NaN if a logit is NaN.
struct Norm {
  double shift, log;
  bool empty() const { return log == -std::numeric_limits<double>::infinity(); }
  bool undefined() const { return std::isnan(log); }
  double weight(double x) const { return std::exp2((x - shift) - log); }  // of a logit
};

template <class T>
Norm norm_of(const Call& c, const Row<T>& r) {
  const double top = c.after ? r.all_top : r.top, mass = c.after ? r.all_mass : r.mass;
  if (std::isnan(mass)) return {0, mass};
  if (!(top > T(LOWEST))) return {0, -std::numeric_limits<double>::infinity()};
  if (!c.sinks) return {top, std::log2(mass)};
  const double sink = double(static_cast<const T*>(c.sinks)[r.h]) * LOG2E * r.cool, high = T(std::max(top, sink));
  return {high, std::log2(mass * std::exp2(top - high) + std::exp2(sink - high))};
}

template <class T>
void put(void* to, int64_t number, double value) {
  if (to) static_cast<T*>(to)[number] = T(value);
}

template <class T>
double weight_of(T x, const Norm& norm) {
  return x <= T(LOWEST) ? 0 : norm.weight(x);
}

template <class T>
void write_lists(const Call& c, const Row<T>& r, Kept<T> kept, const Norm& norm) {
  for (int64_t t = 0; c.targets && t < c.n_targets; t++)
    put<T>(c.targets, r.number * c.n_targets + t, weight_of(kept.targets[t], norm));
  for (int64_t t = 0; c.topk_values && t < c.topk_count; t++) {
    const bool some = kept.top[t] > T(LOWEST) && !norm.undefined();
    put<T>(c.topk_values, r.number * c.topk_count + t, norm.undefined() ? norm.log : weight_of(kept.top[t], norm));
    put<int64_t>(c.topk_indices, r.number * c.topk_count + t, some ? kept.top_at[t] : -1);
  }
}

template <class T>
void write_statistics(const Call& c, const Row<T>& r, Kept<T> kept, const Norm& norm, double unit) {
  const bool undefined = norm.undefined(), any = r.top > T(LOWEST);
  const bool some = r.mass > 0 && unit != 0;  // all weights may have become 0
  const auto if_defined = [&](double value) { return undefined ? norm.log : value; };
  double entropy = any ? -LN2 * unit * (r.entropy + ((double(r.top) - norm.shift) - norm.log) * r.mass) : 0;
  if (!c.after) entropy = std::max(entropy, 0.0);  // rounding; with a gain, weights may exceed 1
  put<T>(c.entropy, r.number, if_defined(entropy));
  put<T>(c.entropy_normalised, r.number, if_defined(r.seen > 1 ? entropy / std::log(double(r.seen)) : 0));
  put<T>(c.max_prob, r.number, unit);
  put<int64_t>(c.argmax, r.number, any && !undefined ? double(r.argmax) : -1);
  put<T>(c.participation, r.number, r.squares * unit * unit);
  put<T>(c.effective_keys, r.number, if_defined(some && r.squares > 0 ? r.mass * r.mass / r.squares : 0));
  put<T>(c.distance, r.number, r.distance * unit);
  put<T>(c.distance_var, r.number, if_defined(some ? r.spread / r.mass : 0));
  put<T>(c.waad, r.number, r.close * unit);
  put<T>(c.sink, r.number, r.sink * unit);
  put<T>(c.local, r.number, r.local * unit);
  put<T>(c.diagonal, r.number, weight_of(r.diagonal, norm));
  put<T>(c.previous, r.number, weight_of(r.previous, norm));
  write_lists(c, r, kept, norm);
}

template <class T>
T unit_of(const Row<T>& r, const Norm& norm) {
  return T(norm.undefined() ? norm.log : r.top > T(LOWEST) ? norm.weight(r.top) : 0);
}

// Writes the sums of weights times values for each segment.
template <class T>
void write_outputs(const Call& c, const Row<T>& r, const T* sums, int64_t v_width) {
  if (!c.segment_outputs) return;
  const T unit = unit_of(r, norm_of(c, r));
  for (int64_t s = 0; s < c.n_segments; s++)
    for (int64_t d = 0; d < c.Dv; d++)
      put<T>(c.segment_outputs, (r.number * c.n_segments + s) * c.Dv + d, sums[s * v_width + d] * unit);
}

// z: sum of weights times the numbers of each key that Plan::pack_values puts next to each other.
template <class T>
void write_row(const Call& c, const Row<T>& r, Kept<T> kept, const T* z) {
  const Norm norm = norm_of(c, r);
  const T unit = unit_of(r, norm);
  put<T>(c.norm, r.number, norm.shift);
  put<T>(c.norm, c.B * c.H * c.M + r.number, norm.log);
  write_statistics(c, r, kept, norm, unit);
  double square = 0;
  for (int64_t d = 0; c.value_norm && d < c.Dv; d++) square += double(z[d]) * z[d];
  put<T>(c.value_norm, r.number, std::sqrt(square) * unit);
  for (int64_t s = 0; c.segments && s < c.n_segments; s++)
    put<T>(c.segments, r.number * c.n_segments + s, z[c.Dv + s] * unit);
  const T* norms = z + c.Dv + (c.segments ? c.n_segments : 0);
  for (int64_t s = 0; c.segment_value_norms && s < c.n_segments; s++)
    put<T>(c.segment_value_norms, r.number * c.n_segments + s, norms[s] * unit);
  const T* features = norms + (c.segment_value_norms ? c.n_segments : 0);
  for (int64_t f = 0; c.key_features && f < c.n_features; f++)
    put<T>(c.key_features, r.number * c.n_features + f, features[f] * unit);

  T* out = static_cast<T*>(c.out) + r.number * c.Dv;
  const T gate = c.gate ? *row_of<T>(c.gate, r.b * c.gate_b + r.h * c.gate_h + r.i * c.gate_m) : T(1);
  for (int64_t d = 0; d < c.Dv; d++) out[d] = z[d] * unit * gate;
  if (!c.replacement) return;
  const T* instead = row_of<T>(
      c.replacement, r.b * c.replacement_b + r.h * c.replacement_h + r.i * c.replacement_m);
  for (int64_t d = 0; d < c.Dv; d++) out[d] += (1 - gate) * instead[d * c.replacement_d];
}

}  // namespace
