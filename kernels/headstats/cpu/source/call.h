// One call, as Python passes it. Python also builds its structure from this list of fields.
#pragma once
#include <cstdint>

// I: an integer, R: a real number, P: an address (null: not given, or not requested). Strides count elements and are 0
// if an axis only broadcasts. Arrays without strides are contiguous.
#define HEADSTATS_ROWS(I, P, x) P(x) I(x##_b) I(x##_h) I(x##_m)
#define HEADSTATS_FULL(I, P, x) HEADSTATS_ROWS(I, P, x) I(x##_d)
#define HEADSTATS_FIELDS(I, R, P)                                                                             \
  I(dtype) /* of q, k, v: see load.h */                                                                       \
  I(B) I(H) I(Hk) I(M) I(N) I(D) I(Dv) I(prefixed) I(runs) /* N includes the `prefixed` keys of a prefix */     \
  HEADSTATS_FULL(I, P, q) HEADSTATS_FULL(I, P, k) HEADSTATS_FULL(I, P, v)                                     \
  HEADSTATS_FULL(I, P, prefix_k) HEADSTATS_FULL(I, P, prefix_v)                                               \
  I(causal) I(window) R(softcap) R(scale) /* window, softcap: 0 = none */                                     \
  HEADSTATS_FULL(I, P, bias) R(bias_hides) P(alibi) P(sinks)                                                  \
  P(key_padding) P(query_padding) /* bytes [B, N], [B, M] */                                                  \
  P(q_segments) I(q_segments_b) P(k_segments) I(k_segments_b) /* int32, 0 = no segment, as in tables */       \
  HEADSTATS_ROWS(I, P, segment_mask) HEADSTATS_ROWS(I, P, segment_open) HEADSTATS_ROWS(I, P, knockout)        \
  HEADSTATS_ROWS(I, P, edit_bias) /* tables: their last axis has stride 1 */                                  \
  P(edit_q_segments) I(edit_q_segments_b) /* rows of an edit's tables: knockout, edit_bias, and these */ \
  HEADSTATS_ROWS(I, P, logit_factor) HEADSTATS_ROWS(I, P, logit_raise) HEADSTATS_ROWS(I, P, log2_gain)        \
  I(layout) P(levels) P(tops) P(states) /* see logits.h; [B, H, M] and uint32 [B, H] */                     \
  I(after) I(within) /* whether log2_gain and layout act after the softmax, or before it */                      \
  HEADSTATS_ROWS(I, P, temperature) HEADSTATS_ROWS(I, P, gate) HEADSTATS_FULL(I, P, replacement)              \
  P(out) P(norm) /* norm: [2, B, H, M], see finish.h; float for half-precision and float inputs, else double */  \
  P(entropy) P(entropy_normalised) P(max_prob) P(argmax) P(participation) P(effective_keys) P(distance)       \
  P(distance_var) P(waad) I(waad_at) P(diagonal) P(previous) P(local) I(local_at) P(value_norm)               \
  P(topk_values) P(topk_indices) I(topk_count)                                                                \
  P(sink) P(sink_keys) I(sink_keys_b) I(sink_count) /* the first real keys, -1 = fewer */                     \
  P(segments) P(segment_value_norms) P(segment_outputs) I(n_segments) P(targets) P(target_keys) I(target_keys_b) I(n_targets)   \
  P(key_features) P(features) I(features_b) I(n_features)                                                     \
  P(received) P(received_max) P(column_norm) P(fai) I(fai_near) I(fai_far)

#define HEADSTATS_INT(x) int64_t x;
#define HEADSTATS_REAL(x) double x;
#define HEADSTATS_AT(x) void* x;
struct Call {
  HEADSTATS_FIELDS(HEADSTATS_INT, HEADSTATS_REAL, HEADSTATS_AT)
};

// Runs work(state, worker) once for each of `workers` workers, in parallel.
using Parallel = void (*)(int64_t workers, void (*work)(void* state), void* state);

// One function for each instruction set; it uses at most `threads` workers.
using Attend = void (*)(const Call&, Parallel, int64_t threads);
