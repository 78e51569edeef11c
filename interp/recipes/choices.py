"""The words that options take, kept once; importing this module is light."""

from __future__ import annotations

MODES = {
    "denoise": "write clean activations into the corrupt run",
    "noise": "write corrupt activations into the clean run",
}
ALIGNMENTS = ("position", "span")  # how positions of two prompts correspond
ABLATIONS = {
    "zero": "activation set to 0",
    "mean": "activation set to its mean over all tokens of all clean prompts of the set",
    "position_mean": "activation set to its mean over tokens at the same place in clean prompts of the same length",
    "cama": "activation set to its mean over the same token at the same place in clean prompts of the same length",
    "other_heads": "a head's z set to the mean z of the layer's other heads, at the same tokens of the same run",
    "resample": "activation taken, position by position from the last token back, from another example's clean prompt",
}
DTYPES = ("float32", "float64", "bfloat16", "float16")  # of a model that is loaded by name
SCHEDULES = ("each", "cumulative", "all but one")
TRACED_WINDOWS = {"resid_post": 1, "mlp_out": 10, "attn_out": 10}  # component: published window, in layers
SEVERED = {"mlp": "mlp_out", "attn": "attn_out"}
PATH_MLPS = ("frozen", "recomputed")
PATH_ABLATIONS = ("patch", "zero", "mean")
LOGITS = "logits"  # the receiver of paths that end at the unembedding
EDITED_ALONE = ("layer", "head")  # what an attention edit changes alone
PEEK_CONTEXTS = ("mean", "keep")
