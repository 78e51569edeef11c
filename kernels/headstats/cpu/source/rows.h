// Sums of a row over blocks of keys; `finish.h` writes the results.
#pragma once
#include "logits.h"

namespace {

template <class T>
T top_of(const T* x, int64_t from, int64_t to) {
  Vec<T> top = load(x + from);
  for (int64_t at = from + WIDTH<T>; at < to; at += WIDTH<T>) top = larger<T>(top, load(x + at));
  return largest<T>(top);
}

// The first place of the largest number, `top`.
template <class T>
int64_t place_of(const T* x, T top, int64_t from) {
  for (;; from += WIDTH<T>) {
    T found[WIDTH<T>];
    std::memcpy(found, x + from, sizeof found);
    for (int64_t i = 0; i < WIDTH<T>; i++)
      if (found[i] == top) return from + i;
  }
}

// Sums over one block of keys.
template <class T>
struct Sums {
  T mass, entropy, distance, squares;  // of w, w (x - top), w c, w^2, where c is the column
};

// Replaces x by w = 2^(x - top), and returns the sums.
template <class T, bool ENTROPY, bool DISTANCE, bool SQUARES>
Sums<T> weigh(T* x, T top, int64_t from, int64_t to) {
  constexpr int64_t n = WIDTH<T>;
  Vec<T> mass{}, entropy{}, distance{}, squares{}, column = counting<T>() + T(from);
  for (int64_t at = from; at < to; at += n) {
    const Vec<T> y = load(x + at) - top;
    const Vec<T> w = exp2_below<T>(y);
    store(x + at, w);
    mass += w;
    if (ENTROPY) entropy += w * (y < T(HIDDEN) ? fill<T>(T(HIDDEN)) : y);  // 0 for a logit of -inf
    if (DISTANCE) distance += w * column, column += T(n);
    if (SQUARES) squares += w * w;
  }
  return {sum<T>(mass), ENTROPY ? sum<T>(entropy) : T(0), DISTANCE ? sum<T>(distance) : T(0),
          SQUARES ? sum<T>(squares) : T(0)};
}

// Returns the sum of w (c - mean)^2.
template <class T>
T spread_about(const T* w, T mean, int64_t from, int64_t to) {
  Vec<T> total{}, column = counting<T>() + T(from) - mean;
  for (int64_t at = from; at < to; at += WIDTH<T>, column += T(WIDTH<T>)) total += load(w + at) * column * column;
  return sum<T>(total);
}

// Merges the variance of distance of a block with that of the keys before it.
template <class T>
void join_spread(Row<T>& r, const T* w, const Sums<T>& here, int64_t j0, int64_t from, int64_t to) {
  if (!(here.mass > 0)) return;
  const T column = here.distance / here.mass;
  double between = 0;
  if (r.mass > 0) {
    const double apart = r.distance / r.mass - (double(r.at - j0) - double(column));
    between = apart * apart * r.mass * here.mass / (r.mass + here.mass);
  }
  r.spread += spread_about(w, column, from, to) + between;
}

template <class T>
struct Kept {  // the largest logits of a row so far, largest first, and the logits of `targets`
  T* top;
  int64_t* top_at;
  T* targets;
};

template <class T>
void keep_largest(const Call& c, Kept<T> kept, const T* x, int64_t j0, int64_t from, int64_t to) {
  const int64_t last = c.topk_count - 1;
  for (int64_t at = from; at < to; at += WIDTH<T>) {
    if (!(largest<T>(load(x + at)) > kept.top[last])) continue;
    for (int64_t i = at; i < at + WIDTH<T>; i++) {
      if (!(x[i] > kept.top[last])) continue;  // of equal logits the earlier one stays
      int64_t place = last;
      for (; place > 0 && x[i] > kept.top[place - 1]; place--)
        kept.top[place] = kept.top[place - 1], kept.top_at[place] = kept.top_at[place - 1];
      kept.top[place] = x[i], kept.top_at[place] = j0 + i;
    }
  }
}

// Stores the logits of cells whose weights are reported individually.
template <class T>
void keep_cells(const Call& c, Row<T>& r, Kept<T> kept, const T* x, int64_t j0, int64_t from, int64_t to) {
  if (r.at >= j0 + from && r.at < j0 + to) r.diagonal = x[r.at - j0];
  if (r.at - 1 >= j0 + from && r.at - 1 < j0 + to) r.previous = x[r.at - 1 - j0];
  if (c.topk_values) keep_largest(c, kept, x, j0, from, to);
  if (!c.targets) return;
  const int64_t* wanted = row_of<int64_t>(c.target_keys, r.b * c.target_keys_b + r.i * c.n_targets);
  for (int64_t t = 0; t < c.n_targets; t++)
    if (wanted[t] >= j0 + from && wanted[t] < j0 + to) kept.targets[t] = x[wanted[t] - j0];
}

template <class T>
double sum_between(const T* w, int64_t from, int64_t to) {
  Vec<T> total{};
  for (; from + WIDTH<T> <= to; from += WIDTH<T>) total += load(w + from);
  double all = sum<T>(total);
  for (; from < to; from++) all += w[from];
  return all;
}

// Adds the sums over a few keys of the block. all: the sum of its weights.
template <class T>
void add_few(const Call& c, Row<T>& r, const T* w, T all, int64_t j0, int64_t from, int64_t to) {
  if (c.sink) {
    const int64_t* keys = row_of<int64_t>(c.sink_keys, r.b * c.sink_keys_b);
    for (int64_t s = 0; s < c.sink_count; s++)
      if (keys[s] >= j0 + from && keys[s] < j0 + to) r.sink += w[keys[s] - j0];
  }
  const auto within = [&](int64_t reach, auto&& each) {
    const int64_t start = std::min(std::max(from, r.at - reach + 1 - j0), to);
    const int64_t end = std::max(start, std::min(to, r.at + reach - j0));
    for (int64_t at = start; at < end; at++) each(w[at], std::abs(r.at - j0 - at));
    return start == end ? double(all) : sum_between(w, from, start) + sum_between(w, end, to);  // the other weights
  };
  if (c.local) within(c.local_at, [&](T one, int64_t) { r.local += one; });
  // No term is subtracted from another, which would lose digits for a large W.
  if (c.waad) r.close += double(c.waad_at) * within(c.waad_at, [&](T one, int64_t away) { r.close += double(one) * away; });
}

// Adds the logits x[from ... to) of the keys from j0 on to the row; x becomes weights. Returns the factor by which all
// sums so far, including those held elsewhere, must be multiplied.
template <class T>
T take_block(const Call& c, Row<T>& r, Kept<T> kept, T* x, int64_t j0, int64_t from, int64_t to, int64_t valid) {
  if (c.after) {
    const T all = std::max(r.all_top, top_of(x, from, to));
    Vec<T> mass{};
    for (int64_t at = from; at < to; at += WIDTH<T>) mass += exp2_below<T>(load(x + at) - all);
    r.all_mass = r.all_mass * exp2_one(r.all_top - all) + sum<T>(mass);
    r.all_top = all;
    reweigh(c, r, x, j0, from, std::min(valid, to));
  }
  const T here = top_of(x, from, to), before = r.top;
  if (c.entropy_normalised)
    for (int64_t at = from; at < to; at++) r.seen += x[at] > T(LOWEST);
  if (c.diagonal || c.previous || c.topk_values || c.targets) keep_cells(c, r, kept, x, j0, from, to);
  T alpha = 1;
  if (here > before) {
    if (c.argmax) r.argmax = j0 + place_of(x, here, from);
    r.top = here;
    alpha = exp2_one(before - here);
  }
  const bool entropy = c.entropy || c.entropy_normalised, squares = c.participation || c.effective_keys;
  const auto sums = [&] {
    if (squares) return weigh<T, true, true, true>(x, r.top, from, to);
    if (c.distance || c.distance_var)
      return entropy ? weigh<T, true, true, false>(x, r.top, from, to) : weigh<T, false, true, false>(x, r.top, from, to);
    return entropy ? weigh<T, true, false, false>(x, r.top, from, to)
                   : weigh<T, false, false, false>(x, r.top, from, to);
  }();
  if (alpha != 1) {
    r.entropy = alpha * (r.entropy + double(before - r.top) * r.mass);
    r.mass *= alpha, r.distance *= alpha, r.squares *= double(alpha) * alpha, r.spread *= alpha;
    r.sink *= alpha, r.local *= alpha, r.close *= alpha;
  }
  if (c.distance_var) join_spread(r, x, sums, j0, from, to);
  r.mass += sums.mass;
  r.entropy += sums.entropy;
  r.distance += double(r.at - j0) * sums.mass - sums.distance;
  r.squares += sums.squares;
  if (c.sink || c.local || c.waad) add_few(c, r, x, sums.mass, j0, from, to);
  return alpha;
}

}  // namespace
