"""What attribution holds at one time: tokens × d_model × layers, not × nodes; and chunks change no score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.circuits import attribute_edges
from interp.circuits.evaluation.evaluator import Evaluator
from interp.doctor.memory import PeakMemory
from interp.errors import ModelError

D_MODEL, LAYERS = 64, 4


def model(word_tokenizer, n_heads: int) -> interp.Model:
    """Llama of one width, whatever the number of heads; half as many KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=n_heads, num_key_value_heads=n_heads // 2,
        intermediate_size=D_MODEL, vocab_size=100, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return interp.load(LlamaForCausalLM(config).eval(), tokenizer=word_tokenizer)


def peak(model: interp.Model, tokens: int) -> int:
    """Bytes, for one batch of prompts of 16 tokens: short, so that attention's own tiles are small."""
    words = [f"w{i % 90}" for i in range(15)]
    pair = interp.PromptPair(" ".join(words), " ".join(["w95", *words[1:]]), "w1", "w2")
    with PeakMemory([*model.bridge.parameters(), *model.bridge.buffers()]) as meter:
        attribute_edges(model, [pair] * (tokens // 16), steps=1, show_progress=False)
    return meter.peak


def test_memory_grows_with_tokens_and_width_and_not_with_nodes(word_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("interp.circuits.attribution.contraction.CHUNK_BYTES", 2**20)
    few, many = model(word_tokenizer, 2), model(word_tokenizer, 16)
    unit = 4 * D_MODEL * LAYERS  # bytes of one vector of d_model numbers per token and layer
    nodes = 16 + 1 + 2 * 16 + 1  # of a layer with 16 heads
    less, more, bare = peak(many, 256), peak(many, 512), peak(few, 512)
    # what enters blocks (1), what senders send (2), the streams that norms read (2), gradients at q, k, v and the MLP
    # (3), and one block's graph, a fraction of some thirty tensors
    assert (more - less) / 256 < 15 * unit < nodes * unit / 3
    assert more < 1.5 * bare  # six times the nodes: what grows are attention's tiles, and a chunk of bounded size


def test_chunks_change_nothing(tiny, monkeypatch) -> None:
    kind = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w9 w3 w7 w5 w6 w7", "w95", "w96")
    whole = attribute_edges(kind, pair, steps=2).matrix
    evaluate = Evaluator(kind, pair, interp.logit_diff, "counterfactual", engine="naive")
    mask = np.random.default_rng(0).random(evaluate.graph.allowed.shape) < 0.5
    held = evaluate(mask & evaluate.graph.allowed)
    for name, size in (("WAITING_BYTES", 1), ("CHUNK_BYTES", 1), ("LAYERS", 1)):
        monkeypatch.setattr(f"interp.circuits.attribution.contraction.{name}", size)
        # sums of the same float64 products in another order
        np.testing.assert_allclose(attribute_edges(kind, pair, steps=2).matrix, whole, atol=1e-9)
    monkeypatch.setattr("interp.circuits.evaluation.ablated_forward.HELD_BYTES", 0)
    np.testing.assert_allclose(evaluate(mask & evaluate.graph.allowed), held, atol=1e-9)


def test_a_block_that_answers_otherwise_the_second_time_is_refused(tiny) -> None:
    """As with dropout: its gradient would be that of another function."""
    kind = tiny("gpt2")
    noise = torch.Generator().manual_seed(0)
    mlp = kind.bridge.blocks[1].mlp.original_component
    handle = mlp.register_forward_hook(lambda m, args, out: out + torch.randn(out.shape, generator=noise))
    try:
        with pytest.raises(ModelError, match="layer 1: computed again, its output differs"):
            attribute_edges(kind, interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w5", "w6"))
    finally:
        handle.remove()
