// The functions that Python calls. Work is distributed over PyTorch's own threads.
#include <ATen/Parallel.h>

#include <exception>

#include "call.h"

#define HEADSTATS_NAME(x) "i " #x "\n"
#define HEADSTATS_REAL_NAME(x) "r " #x "\n"
#define HEADSTATS_AT_NAME(x) "p " #x "\n"

void headstats_portable(const Call&, Parallel, int64_t);
#ifdef HEADSTATS_X86
void headstats_avx2(const Call&, Parallel, int64_t);
void headstats_avx512(const Call&, Parallel, int64_t);
#endif

namespace {

void parallel(int64_t workers, void (*work)(void*), void* state) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) work(state);
  });
}

// 0: portable, 1: AVX2, 2: AVX-512.
Attend variant(int64_t level) {
#ifdef HEADSTATS_X86
  if (level == 2) return headstats_avx512;
  if (level == 1) return headstats_avx2;
#endif
  return level == 0 ? headstats_portable : nullptr;
}

}  // namespace

extern "C" {

// Kind and name of each field of Call, in order.
__attribute__((visibility("default"))) const char* headstats_fields() { return HEADSTATS_FIELDS(HEADSTATS_NAME, HEADSTATS_REAL_NAME, HEADSTATS_AT_NAME); }

// The best instruction set of this processor, numbered as in `variant`.
__attribute__((visibility("default"))) int64_t headstats_level() {
#ifdef HEADSTATS_X86
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return fma ? 1 : 0;
#else
  return 0;
#endif
}

// Returns 0, or 1 if memory ran out or the level is unknown.
__attribute__((visibility("default"))) int64_t headstats_attend(const Call* call, int64_t level, int64_t threads) {
  try {
    const Attend attend = variant(level);
    if (!attend) return 1;
    attend(*call, parallel, threads);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
