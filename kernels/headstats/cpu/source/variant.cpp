// Compiled once for each instruction set, with the function name HEADSTATS_VARIANT.
#include "columns.h"

namespace {

template <class T>
void attend(const Call& c, Parallel parallel, int64_t threads) {
  RowPass<T>(c, parallel, threads);
  if (c.received || c.received_max || c.column_norm || c.fai) ColumnPass<T>(c, parallel, threads);
}

}  // namespace

void HEADSTATS_VARIANT(const Call& c, Parallel parallel, int64_t threads) {
  if (c.dtype == FLOAT64) attend<double>(c, parallel, threads);
  else
    attend<float>(c, parallel, threads);
}
