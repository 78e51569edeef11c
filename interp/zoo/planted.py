"""Setting attention heads by hand: named channels of the residual stream, and what a head reads and writes.

The residual stream is cut into channels (token, position, …) with one dimension per token or position, so
that a planted head's scores and values are exact: there is no interference to average out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.zoo.tokenizer import SPECIALS, word_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

# Scores, in nats, of the key that a planted head looks for, and of <bos>, where it looks if there is none.
# Each lies 60 or more above the next best; a key diluted to half (the mean of two) loses to the sink.
MATCH = 400.0
SINK = 0.85 * MATCH
LOGIT = 20.0  # logit that a planted head gives to the token it copies


class Planted:
    """An attention-only model under construction: zero everywhere, except what is planted.

    ``channels`` maps channel names to widths; ``tok`` and ``pos`` hold the embeddings, ``out`` is what the
    unembedding reads, ``junk`` is where inert heads write: nothing that matters reads it.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        channels: Mapping[str, int],
        *,
        n_layers: int,
        n_heads: int,
        d_head: int,
        dtype: torch.dtype | None,
    ) -> None:
        import torch

        self.dtype = dtype or torch.float32
        self.n_heads, self.d_head = n_heads, d_head
        self.ids = {word: i for i, word in enumerate((*SPECIALS, *words))}
        starts = [0]
        for width in channels.values():
            starts.append(starts[-1] + width)
        self.where = {c: slice(a, b) for c, a, b in zip(channels, starts, starts[1:], strict=False)}
        self.d_model = starts[-1]
        config = {
            "d_model": self.d_model, "d_head": d_head, "n_heads": n_heads, "n_layers": n_layers,
            "n_ctx": channels["pos"], "d_vocab": len(self.ids), "positional_embedding_type": "standard",
            "attn_only": True, "normalization_type": None, "init_weights": False,
        }  # fmt: skip
        self.bridge = boot(name, config, words, self.dtype)
        self._embed(n_ctx=channels["pos"])

    def _embed(self, n_ctx: int) -> None:
        import torch

        model: Any = self.bridge.original_model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            n = len(self.ids)
            part(model.tok_embed).weight[:, self.where["tok"]] = torch.eye(n, dtype=self.dtype)
            part(model.pos).weight[:, self.where["pos"]] = torch.eye(n_ctx, dtype=self.dtype)
            unembed = LOGIT * torch.eye(n, dtype=self.dtype)
            unembed[: len(SPECIALS)] = 0  # the model never says a special token
            part(model.head).weight[:, self.where["out"]] = unembed

    def _weights(self, layer: int, head: int) -> dict[str, Tensor]:
        """Views of one head's weights: q, k, v [d_head, d_model], o [d_model, d_head], q_bias [d_head]."""
        model: Any = self.bridge.original_model
        attn = part(part(model.layers[layer]).attn)
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        weights = {name: part(getattr(attn, name)).weight[rows] for name in "qkv"}
        weights["o"] = part(attn.o).weight[:, rows]
        weights["q_bias"] = part(attn.q).bias[rows]
        return weights

    def plant(self, layer: int, head: int, *, q: Mapping[str, Tensor], k: Mapping[str, Tensor],
              v: Mapping[str, Tensor], o: Mapping[str, Tensor],
              q_bias: Tensor | None = None) -> None:  # fmt: skip
        """Set one head. Each mapping says, per channel, the matrix [≤d_head, channel width] that reads it
        (``o``: that writes it). Attention scores are then exactly (q·x_i + q_bias)·(k·x_j).
        """
        import torch

        weights = self._weights(layer, head)
        with torch.no_grad():
            for name, reads in (("q", q), ("k", k), ("v", v)):
                for channel, matrix in reads.items():
                    weights[name][: matrix.shape[0], self.where[channel]] = matrix.to(self.dtype)
            for channel, matrix in o.items():
                weights["o"][self.where[channel], : matrix.shape[0]] = matrix.T.to(self.dtype)
            if q_bias is not None:
                weights["q_bias"][: q_bias.shape[0]] = q_bias.to(self.dtype)
            # The model divides scores by sqrt(d_head); take that back, so that MATCH and SINK are in nats.
            weights["q"].mul_(math.sqrt(self.d_head))
            weights["q_bias"].mul_(math.sqrt(self.d_head))

    def plant_inert(self, layer: int, head: int, generator: torch.Generator) -> None:
        """A head that attends and moves information at random, but only into the junk channel."""
        import torch

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        weights = self._weights(layer, head)
        with torch.no_grad():
            for name in "qkv":
                weights[name].copy_(draw(self.d_head, self.d_model) / math.sqrt(2.0))
            junk = self.where["junk"]
            width = junk.stop - junk.start  # scaled to write vectors of norm about 1, like an embedding
            weights["o"][junk] = draw(width, self.d_head) / math.sqrt(width * self.d_head)


def boot(name: str, config: dict[str, Any], words: Sequence[str], dtype: torch.dtype | None) -> TransformerBridge:
    """A native TransformerLens model (no hub, no download) with a word-level tokenizer."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import native  # noqa: F401  (attaches boot_native)

    boot_native: Any = TransformerBridge.boot_native  # type: ignore[attr-defined]
    # Construction draws default weights from the global generator; a caller's seed must survive us.
    with torch.random.fork_rng(devices=[]):
        bridge = boot_native(
            config, tokenizer=word_tokenizer(words), dtype=dtype or torch.float32, model_name=f"zoo.{name}"
        )
    return bridge.eval()


def part(module: Any) -> Any:
    """The plain torch module behind a bridge component (or the module itself)."""
    original = module._modules.get("_original_component")
    return module if original is None else original
