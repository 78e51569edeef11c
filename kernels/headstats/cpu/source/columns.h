// The column pass: statistics of keys, in a second pass over the pattern, given norm, without values. A worker takes one
// block of keys of the heads that share them and loops over the queries, so each sum has one owner and one order.
#pragma once
#include "attend.h"

namespace {

constexpr int64_t QUERY_ROWS = 96;  // queries at a time
constexpr int64_t SUMS = 6;         // sums for each head and key

template <class T>
struct ColumnWorker {
  const Plan<T>& plan;
  const Call& c;
  Space<T> q_space, x_space, k_space, sums;

  explicit ColumnWorker(const Plan<T>& p) : plan(p), c(p.c) {}

  // For each head: sum, maximum and sum of squares of weights, number of cells; then sum and number of cells within
  // the horizon of fai.
  T* of_head(int64_t head, int64_t what) { return sums.at.get() + (head * SUMS + what) * BLOCK; }

  void run(const Region<T>& region, int64_t j, int64_t hk) {
    const int64_t valid = std::min(BLOCK, region.count - j), start = region.first + j;
    std::fill_n(sums.need(plan.groups * SUMS * BLOCK), plan.groups * SUMS * BLOCK, T(0));
    pack_keys(region.k, j, valid, c.D, k_space.need(BLOCK * c.D));
    for (int64_t g = 0; g < plan.groups; g++) {
      for (int64_t i = 0; i < c.M; i += QUERY_ROWS)
        visit(region.b, hk * plan.groups + g, g, i, std::min(c.M, i + QUERY_ROWS), start, valid);
      write(region.b, hk * plan.groups + g, g, start, valid);
    }
  }

  void visit(int64_t b, int64_t h, int64_t g, int64_t i0, int64_t i1, int64_t start, int64_t valid) {
    std::vector<Row<T>> rows;
    std::vector<T> shifts, logs;
    for (int64_t i = i0; i < i1; i++) {
      const Row<T> row = make_row<T>(c, b, h, i);
      const T shift = static_cast<const T*>(c.norm)[row.number];
      const T log = static_cast<const T*>(c.norm)[c.B * c.H * c.M + row.number];
      const uint8_t* real = row_of<uint8_t>(c.query_padding, b * c.M + i);
      const bool meets = row.first < start + valid && row.stop > start && row.first < row.stop;
      if (!meets || (real && !*real) || log == -std::numeric_limits<T>::infinity()) continue;
      rows.push_back(row), shifts.push_back(shift), logs.push_back(log);
    }
    const int64_t count = rows.size();
    T *q = q_space.need(QUERY_ROWS * c.D), *x = x_space.need(QUERY_ROWS * BLOCK);
    const Matrix<T> queries = Plan<T>::matrix(c, c.q, b * c.q_b + h * c.q_h, c.q_m, c.q_d);
    for (int64_t r = 0; r < count; r++) queries.copy(q + r * c.D, rows[r].i, c.D, 1);
    const T factor = T(c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E);
    const int64_t width = rounded(valid, WIDTH<T>);
    for (int64_t p = 0; p < width; p += PANEL<T>)
      for (int64_t r = 0; r < count; r += TILE)
        panel_product(std::min(TILE, count - r), q + r * c.D, c.D, k_space.at.get() + p * c.D, x + r * BLOCK + p, BLOCK,
                      c.D, width - p, factor);
    for (int64_t r = 0; r < count; r++) {
      shape_logits(c, rows[r], x + r * BLOCK, start, 0, width, valid);
      if (c.after) reweigh(c, rows[r], x + r * BLOCK, start, 0, valid);
      add(g, rows[r], x + r * BLOCK, shifts[r], logs[r], start, width);
    }
  }

  void add(int64_t g, const Row<T>& row, T* x, T shift, T log, int64_t start, int64_t width) {
    constexpr int64_t n = WIDTH<T>;
    T *total = of_head(g, 0), *high = of_head(g, 1), *squares = of_head(g, 2), *count = of_head(g, 3);
    T *soon = of_head(g, 4), *soon_count = of_head(g, 5);
    for (int64_t at = 0; at < width; at += n) {
      const Vec<T> y = load(x + at);
      const Vec<T> one = y <= T(LOWEST) ? Vec<T>{} : fill<T>(1);
      const Vec<T> p = y <= T(LOWEST) ? Vec<T>{} : exp2_below<T>((y - shift) - log);  // NaN of a visible cell stays
      store(x + at, p);
      store(total + at, load(total + at) + p);
      store(high + at, larger<T>(load(high + at), p));
      store(squares + at, load(squares + at) + p * p);
      store(count + at, load(count + at) + one);
      if (!c.fai) continue;
      const Vec<T> away = T(row.at - start - at) - counting<T>();
      const auto inside = [&](Vec<T> x) { return away < T(c.fai_near) ? Vec<T>{} : away > T(c.fai_far) ? Vec<T>{} : x; };
      store(soon + at, load(soon + at) + inside(p));
      store(soon_count + at, load(soon_count + at) + inside(one));
    }
  }

  void write(int64_t b, int64_t h, int64_t g, int64_t start, int64_t valid) {
    const auto mean = [](T total, T count) { return count > 0 ? total / count : T(0); };
    const int64_t to = (b * c.H + h) * c.N + start;
    for (int64_t j = 0; j < valid; j++) {
      put<T>(c.received, to + j, mean(of_head(g, 0)[j], of_head(g, 3)[j]));
      put<T>(c.received_max, to + j, std::isnan(of_head(g, 0)[j]) ? of_head(g, 0)[j] : of_head(g, 1)[j]);
      put<T>(c.column_norm, to + j, std::sqrt(of_head(g, 2)[j]));
      put<T>(c.fai, to + j, mean(of_head(g, 4)[j], of_head(g, 5)[j]));
    }
  }
};

template <class T>
struct ColumnPass {
  Plan<T> plan;
  std::atomic<int64_t> next{0};
  int64_t shared, own;  // blocks of keys of the prefix, and of a batch row's own keys

  ColumnPass(const Call& c, Parallel parallel, int64_t threads) : plan(c) {
    shared = (c.prefixed + BLOCK - 1) / BLOCK, own = (c.N - c.prefixed + BLOCK - 1) / BLOCK;
    plan.blocks = 1;  // nothing is packed beforehand
    const int64_t workers = std::min(threads, c.B * c.Hk * (shared + own));
    parallel(workers, [](void* me) { static_cast<ColumnPass*>(me)->work(); }, this);
  }

  void work() {
    const Call& c = plan.c;
    ColumnWorker<T> worker(plan);
    for (int64_t task; (task = next++) < c.B * c.Hk * (shared + own);) {
      const int64_t block = task / (c.B * c.Hk), b = task / c.Hk % c.B, h = task % c.Hk;
      if (block < shared) worker.run(plan.prefix(b, h), block * BLOCK, h);
      else
        worker.run(plan.own(b, h), (block - shared) * BLOCK, h);
    }
  }
};

}  // namespace
