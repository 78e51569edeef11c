// The row pass: attention and the statistics of queries. A worker takes some queries of all heads that share keys, and
// loops over the keys in blocks. It computes products, softmax and sums of one block while the block is in cache.
#pragma once
#include <atomic>
#include <memory>

#include "finish.h"

namespace {

constexpr int64_t BLOCK = 512;  // keys at a time; a multiple of every PANEL
constexpr int64_t DEEP = 128;   // keys in one step of the product with values, so that they stay in the L1 cache
constexpr int64_t FEW = 4;      // up to this many rows, keys are not packed; at most a TILE
constexpr int64_t ROWS = 192;   // rows of a task, if the call has that many

inline int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A reusable array, uninitialised.
template <class T>
struct Space {
  std::unique_ptr<T[]> at;
  int64_t size = 0;
  T* need(int64_t count) {
    if (count > size) at.reset(new T[size = count]);
    return at.get();
  }
};

// Contiguous keys and values: a prefix shared by a run of batch rows, or a batch row's own.
template <class T>
struct Region {
  Matrix<T> k, v;
  int64_t first, count;  // position among all keys
  int64_t b;             // a batch row that reads them
  const T *panels = nullptr, *values = nullptr;  // packed beforehand for all keys, or null
};

template <class T>
struct Plan {
  const Call& c;
  int64_t groups, extra;         // query heads per key head; columns next to the values
  int64_t z_row, v_width;        // width of a row of z, and of its values, in whole vectors
  int64_t batch, queries;        // batch rows and queries of a task
  int64_t batches, blocks;       // numbers of tasks along these axes
  Space<T> panels, values;       // all keys and values, if several tasks read each

  explicit Plan(const Call& call) : c(call) {
    groups = c.H / c.Hk;
    extra = ((c.segments ? 1 : 0) + (c.segment_value_norms ? 1 : 0)) * c.n_segments +
            (c.key_features ? c.n_features : 0);
    z_row = rounded(c.Dv + extra, WIDTH<T>), v_width = rounded(c.Dv, WIDTH<T>);
    const int64_t run = c.prefixed ? c.B / c.runs : 1;
    // Rows of a run share a prefix, unless the columns next to the values differ between them.
    const bool by_segment = c.segments || c.segment_value_norms || c.segment_outputs;
    const bool alike = !(by_segment && c.k_segments_b) && !(c.key_features && c.features_b);
    batch = alike ? std::min(run, std::max(int64_t(1), ROWS / (groups * c.M))) : 1;
    while (run % batch) batch--;
    queries = std::min(c.M, std::max(TILE, ROWS / (groups * batch) / TILE * TILE));
    batches = c.B / batch, blocks = (c.M + queries - 1) / queries;
  }

  int64_t tasks() const { return batches * c.Hk * blocks; }
  bool packed() const { return blocks > 1; }
  int64_t panel_size(int64_t count) const { return rounded(count, PANEL<T>) * c.D; }

  static Matrix<T> matrix(const Call& c, const void* at, int64_t offset, int64_t row, int64_t column) {
    return {at, offset, row, column, c.dtype};
  }

  Region<T> own(int64_t b, int64_t h) const {
    const int64_t n = c.N - c.prefixed;
    Region<T> r{matrix(c, c.k, b * c.k_b + h * c.k_h, c.k_m, c.k_d),
                matrix(c, c.v, b * c.v_b + h * c.v_h, c.v_m, c.v_d), c.prefixed, n, b};
    if (packed()) {
      r.panels = panels.at.get() + (b * c.Hk + h) * panel_size(n);
      r.values = values.size ? values.at.get() + (b * c.Hk + h) * n * z_row : nullptr;
    }
    return r;
  }

  Region<T> prefix(int64_t b, int64_t h) const {
    const int64_t g = b / (c.B / c.runs);
    return {matrix(c, c.prefix_k, g * c.prefix_k_b + h * c.prefix_k_h, c.prefix_k_m, c.prefix_k_d),
            matrix(c, c.prefix_v, g * c.prefix_v_b + h * c.prefix_v_h, c.prefix_v_m, c.prefix_v_d), 0, c.prefixed, b};
  }

  // Whether values can be read in place.
  bool plain(const Region<T>& r) const { return z_row == c.Dv && r.v.plain(0); }

  // Copies values j0 ... j0 + count of a region, and next to them the other numbers that are averaged: membership in
  // each segment, the value's norm in the column of its segment, features.
  void pack_values(const Region<T>& r, int64_t j0, int64_t count, T* to) const {
    for (int64_t j = j0; j < j0 + count; j++, to += z_row) {
      r.v.copy(to, j, c.Dv, 1);
      std::fill(to + c.Dv, to + z_row, T(0));
      T* next = to + c.Dv;
      const int32_t s = c.k_segments ? row_of<int32_t>(c.k_segments, r.b * c.k_segments_b)[r.first + j] : 0;
      if (c.segments) {
        if (s > 0) next[s - 1] = 1;
        next += c.n_segments;
      }
      if (c.segment_value_norms) {
        double square = 0;
        for (int64_t d = 0; d < c.Dv; d++) square += double(to[d]) * to[d];
        if (s > 0) next[s - 1] = T(std::sqrt(square));
        next += c.n_segments;
      }
      if (c.key_features)
        std::copy_n(row_of<T>(c.features, r.b * c.features_b) + (r.first + j) * c.n_features, c.n_features, next);
    }
  }

  // Packs the keys and values of all batch rows, before tasks that read them repeatedly.
  void pack_all(int64_t part, int64_t parts) {
    const int64_t n = c.N - c.prefixed, chunks = (n + BLOCK - 1) / BLOCK;
    for (int64_t i = part; i < c.B * c.Hk * chunks; i += parts) {
      const Region<T> r = own(i / chunks / c.Hk, i / chunks % c.Hk);
      const int64_t j0 = i % chunks * BLOCK, count = std::min(BLOCK, n - j0);
      pack_keys(r.k, j0, count, c.D, const_cast<T*>(r.panels) + j0 * c.D);
      if (r.values) pack_values(r, j0, count, const_cast<T*>(r.values) + j0 * z_row);
    }
  }

  void make_room() {
    if (!packed()) return;
    const int64_t n = c.N - c.prefixed;
    panels.need(c.B * c.Hk * panel_size(n));
    if (!plain(own(0, 0))) values.need(c.B * c.Hk * n * z_row);
  }
};

// The state of one worker.
template <class T>
struct Worker {
  const Plan<T>& plan;
  const Call& c;
  Space<T> q_space, x_space, z_space, outputs_space, k_space, v_space, top_space, target_space;
  Space<int64_t> at_space;
  std::vector<Row<T>> rows;
  std::vector<int64_t> from, to;  // columns of the block that each tile of rows may see
  T *q, *x, *z, *outputs;

  explicit Worker(const Plan<T>& p) : plan(p), c(p.c) {}

  Kept<T> kept(int64_t r) {
    return {top_space.at.get() + r * c.topk_count, at_space.at.get() + r * c.topk_count,
            target_space.at.get() + r * c.n_targets};
  }

  void run(int64_t task) {
    const int64_t last = plan.blocks - 1;
    const int64_t block = c.causal ? last - task / (plan.batches * c.Hk) : task / (plan.batches * c.Hk);
    const int64_t b = task / c.Hk % plan.batches * plan.batch, h = task % c.Hk;
    const int64_t i0 = block * plan.queries, i1 = std::min(c.M, i0 + plan.queries);
    gather(b, h, i0, i1);
    const int64_t of_one = rows.size() / plan.batch;
    if (c.prefixed) visit(plan.prefix(b, h), 0, rows.size());
    for (int64_t i = 0; i < plan.batch; i++) visit(plan.own(b + i, h), i * of_one, (i + 1) * of_one);
    for (size_t r = 0; r < rows.size(); r++) {
      write_row(c, rows[r], kept(r), z + r * plan.z_row);
      write_outputs(c, rows[r], outputs + r * outputs_row(), plan.v_width);
    }
  }

  // Collects the rows of a task: all queries of all its heads and batch rows.
  void gather(int64_t b0, int64_t hk, int64_t i0, int64_t i1) {
    rows.clear();
    for (int64_t b = b0; b < b0 + plan.batch; b++)
      for (int64_t h = hk * plan.groups; h < (hk + 1) * plan.groups; h++)
        for (int64_t i = i0; i < i1; i++) rows.push_back(make_row<T>(c, b, h, i));
    const int64_t count = rows.size();
    q = q_space.need(count * c.D);
    x = x_space.need(count * BLOCK);
    z = z_space.need(count * plan.z_row);
    std::fill_n(z, count * plan.z_row, T(0));
    outputs = outputs_space.need(count * outputs_row());
    std::fill_n(outputs, count * outputs_row(), T(0));
    std::fill_n(top_space.need(count * c.topk_count), count * c.topk_count, T(HIDDEN));
    at_space.need(count * c.topk_count);
    std::fill_n(target_space.need(count * c.n_targets), count * c.n_targets, T(HIDDEN));
    for (int64_t r = 0; r < count; r++)
      Plan<T>::matrix(c, c.q, rows[r].b * c.q_b + rows[r].h * c.q_h, c.q_m, c.q_d).copy(q + r * c.D, rows[r].i, c.D, 1);
  }

  // Adds the keys of a region to the rows r0 ... r1.
  void visit(const Region<T>& region, int64_t r0, int64_t r1) {
    int64_t first = region.first + region.count, stop = region.first;
    for (int64_t r = r0; r < r1; r++) {
      if (rows[r].first >= rows[r].stop) continue;
      first = std::min(first, rows[r].first), stop = std::max(stop, rows[r].stop);
    }
    first = std::max(first - region.first, int64_t(0)) / BLOCK * BLOCK;
    stop = std::min(stop - region.first, region.count);
    for (int64_t j = first; j < stop; j += BLOCK) visit_block(region, j, std::min(BLOCK, region.count - j), r0, r1);
  }

  void visit_block(const Region<T>& region, int64_t j, int64_t valid, int64_t r0, int64_t r1) {
    const int64_t start = region.first + j;
    const T* values = region.values ? region.values + j * plan.z_row : region.v.plain(j);
    int64_t v_row = region.values ? plan.z_row : region.v.row;
    if (!region.values && !plan.plain(region)) {
      plan.pack_values(region, j, valid, v_space.need(BLOCK * plan.z_row));
      values = v_space.at.get(), v_row = plan.z_row;
    }
    limits(start, valid, r0, r1);
    multiply_keys(region, j, valid, r0, r1);
    for (int64_t r = r0; r < r1; r++) weigh_row(r, start, from[(r - r0) / TILE], to[(r - r0) / TILE], valid);
    for (int64_t d = 0; d < valid; d += DEEP)
      multiply_values(values, v_row, z, plan.z_row, plan.z_row, d, std::min(valid, d + DEEP), r0, r1);
    if (!c.segment_outputs) return;
    const int32_t* segments = row_of<int32_t>(c.k_segments, region.b * c.k_segments_b) + start;
    for (int64_t d = 0, end; d < valid; d = end) {  // keys of one segment are mostly contiguous
      for (end = d + 1; end < valid && segments[end] == segments[d];) end++;
      if (segments[d] > 0)
        multiply_values(values, v_row, outputs + (segments[d] - 1) * plan.v_width, outputs_row(), plan.v_width, d, end,
                        r0, r1);
    }
  }

  // Adds weights times values of the block's keys d0 ... d1.
  void multiply_values(const T* values, int64_t v_row, T* sums, int64_t sums_row, int64_t columns, int64_t d0,
                       int64_t d1, int64_t r0, int64_t r1) {
    for (int64_t r = r0, t = 0; r < r1; r += TILE, t++) {
      const int64_t a = std::max(from[t], d0), e = std::min(to[t], d1);
      if (a < e)
        add_product(std::min(TILE, r1 - r), x + r * BLOCK + a, BLOCK, values + a * v_row, v_row, sums + r * sums_row,
                    sums_row, e - a, columns);
    }
  }

  int64_t outputs_row() const { return c.segment_outputs ? c.n_segments * plan.v_width : 0; }

  void weigh_row(int64_t r, int64_t start, int64_t a, int64_t e, int64_t valid) {
    if (a >= e) return;
    T* line = x + r * BLOCK;
    shape_logits(c, rows[r], line, start, a, e, valid);
    const T alpha = take_block(c, rows[r], kept(r), line, start, a, e, valid);
    if (alpha == 1) return;
    multiply(z + r * plan.z_row, plan.z_row, alpha);
    multiply(outputs + r * outputs_row(), outputs_row(), alpha);
  }

  static void multiply(T* p, int64_t count, T alpha) {
    for (int64_t d = 0; d < count; d += WIDTH<T>) store(p + d, load(p + d) * alpha);
  }

  // The columns that any row of a tile may see, rounded out to the start of a panel and to a whole vector.
  void limits(int64_t start, int64_t valid, int64_t r0, int64_t r1) {
    from.clear(), to.clear();
    for (int64_t r = r0; r < r1; r += TILE) {
      int64_t a = valid, e = 0;
      for (int64_t i = r; i < std::min(r + TILE, r1); i++) {
        if (rows[i].first >= rows[i].stop) continue;
        a = std::min(a, rows[i].first - start), e = std::max(e, rows[i].stop - start);
      }
      from.push_back(std::max(a, int64_t(0)) / PANEL<T> * PANEL<T>);
      to.push_back(rounded(std::max(std::min(e, valid), int64_t(0)), WIDTH<T>));
    }
  }

  void multiply_keys(const Region<T>& region, int64_t j, int64_t valid, int64_t r0, int64_t r1) {
    const T factor = T(c.softcap > 0 ? c.scale / c.softcap : c.scale * LOG2E);
    // The column pass must find the same logits to the last bit, and multiplies panels.
    const bool columns = c.received || c.received_max || c.column_norm || c.fai;
    if (!columns && !region.panels && r1 - r0 <= FEW && c.D % WIDTH<T> == 0 && region.k.plain(j))
      return dot_products(r1 - r0, q + r0 * c.D, c.D, region.k, j, from[0], std::min(to[0], valid), x + r0 * BLOCK,
                          BLOCK, c.D, factor);
    const T* panels = region.panels ? region.panels + j * c.D : k_space.need(BLOCK * c.D);
    if (!region.panels) pack_keys(region.k, j, valid, c.D, k_space.at.get());
    for (int64_t p = 0; p < BLOCK; p += PANEL<T>, panels += c.D * PANEL<T>)
      for (int64_t r = r0, t = 0; r < r1; r += TILE, t++)
        if (p >= from[t] && p < to[t])
          panel_product(std::min(TILE, r1 - r), q + r * c.D, c.D, panels, x + r * BLOCK + p, BLOCK, c.D,
                        to[t] - p, factor);
  }
};

template <class T>
struct RowPass {
  Plan<T> plan;
  std::atomic<int64_t> next{0}, part{0};
  int64_t workers;

  RowPass(const Call& c, Parallel parallel, int64_t threads) : plan(c) {
    workers = std::min(threads, plan.tasks());
    plan.make_room();
    if (plan.packed())
      parallel(workers, [](void* me) { auto& s = *static_cast<RowPass*>(me); s.plan.pack_all(s.part++, s.workers); },
               this);
    parallel(workers, [](void* me) { static_cast<RowPass*>(me)->work(); }, this);
  }

  // Workers take the longest tasks first. No two tasks write the same results, so results do not depend on threads.
  void work() {
    Worker<T> worker(plan);
    for (int64_t task; (task = next++) < plan.tasks();) worker.run(task);
  }
};

}  // namespace
