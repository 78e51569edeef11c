"""Compile zoo.tracr_induction with Tracr, and convert it with TransformerLens.

Run: python experiments/compile_tracr.py [FOLDER] (default: interp/zoo/weights). It takes seconds. It needs Tracr
installed next to interp, in a separate environment: pip install tracr-pypi.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tracr.compiler import compiling
from tracr.rasp import rasp
from transformer_lens.utilities import tracr as converter

from interp.zoo import compiled, shipped
from interp.zoo.tokenizer import BOS, LETTERS, SPECIALS

OUTPUT = "induction"


def program() -> rasp.SOp:
    """Return the RASP program of induction.

    It outputs the token that followed the previous occurrence of the current token.
    """
    back = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1)
    previous = rasp.Aggregate(back, rasp.tokens, default=None).named("previous")
    same = rasp.Select(previous, rasp.tokens, rasp.Comparison.EQ)
    return rasp.Aggregate(same, rasp.tokens, default=None).named(OUTPUT)


def renumber(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Reorder embedding and output rows to the token ids of the zoo's tokenizer.

    These are special tokens, then letters.

    Only <bos> among the special tokens has a meaning for this model.
    """
    inputs, outputs = model.input_encoder.encoding_map, model.output_encoder.encoding_map
    embed, head = weights["tok_embed.weight"], weights["head.weight"]
    width = embed.shape[1]
    new = {name: torch.zeros(len(SPECIALS) + len(LETTERS), width) for name in ("tok_embed.weight", "head.weight")}
    new["tok_embed.weight"][SPECIALS.index(BOS)] = embed[inputs["BOS"]]
    for i, letter in enumerate(LETTERS, len(SPECIALS)):
        new["tok_embed.weight"][i] = embed[inputs[letter]]
        new["head.weight"][i] = head[outputs[letter]]
    return {**weights, **new, "pos.weight": weights["pos.weight"][: compiled.LENGTH + 1]}


def main(folder: Path) -> None:
    """Compile, convert, renumber and save; compare with the answers of Tracr's model."""
    model = compiling.compile_rasp_to_model(
        program(), vocab=set(LETTERS), max_seq_len=compiled.LENGTH, causal=True, compiler_bos="BOS"
    )
    labels = {label.rpartition(":")[0] for label in model.residual_labels}
    label = next(label for label in labels if label.startswith(OUTPUT))
    weights = renumber(converter.make_tracr_transformer_bridge_state_dict(model, label), model)
    layers, shape = model.model_config.num_layers, model.model_config
    config = {
        "d_model": weights["tok_embed.weight"].shape[1], "d_head": shape.key_size, "n_heads": shape.num_heads,
        "n_layers": layers, "d_mlp": shape.mlp_hidden_size, "act_fn": "relu", "n_ctx": compiled.LENGTH + 1,
        "d_vocab": len(SPECIALS) + len(LETTERS), "normalization_type": None, "positional_embedding_type": "standard",
    }  # fmt: skip
    path = folder / "tracr_induction.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    about = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "config": config}
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    zoo_model = compiled.tracr_induction(folder=folder)
    for pair in zoo_model.pairs(20):
        tracr_answer = model.apply(["BOS", *pair.clean.split()]).decoded[-1]
        logits = zoo_model.bridge(zoo_model.bridge.to_tokens(pair.clean))[0, -1]
        our_answer = zoo_model.bridge.tokenizer.decode([int(logits.argmax())])
        assert tracr_answer == our_answer == pair.answer.strip(), (pair, tracr_answer, our_answer)
    print(f"wrote {path}, which answers as Tracr's model does")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else shipped.WEIGHTS)
