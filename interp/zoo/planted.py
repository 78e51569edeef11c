"""Set heads and neurons by hand.

They read and write named channels of the residual stream. The residual stream is divided into channels (token,
position, …) with one dimension per token or position, so that a planted head's scores and values are exact: there is no
interference to average out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.model.native import native_bridge, plain_module
from interp.zoo.tokenizer import SPECIALS, word_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from interp.model.native import TransformerBridge

# Scores, in nats, of the key that a planted head looks for, and of <bos>, to which it attends without a match.
# Each is 60 or more above the next best; a key diluted to half (the mean of two) loses to the sink.
MATCH = 400.0
SINK = 0.85 * MATCH
LOGIT = 20.0  # logit that a planted head gives to the token it copies
# The same with smaller scores: off by e^-10, but with gradients through the softmax well above rounding.
SOFT_MATCH = 40.0
SOFT_SINK = 30.0


class Planted:
    """A model under construction: zero except for planted parts.

    It has MLPs (ReLU) if ``d_mlp`` is set. ``channels`` maps channel names to widths. ``tok`` and ``pos`` hold the
    embeddings; the unembedding reads ``out``; inert heads and MLPs write to ``junk``, which no part that matters reads.
    ``shift``, if it exists, is added to every logit alike: inert parts write there too, and it changes no probability.
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
        n_kv_heads: int | None = None,
        d_mlp: int | None = None,
    ) -> None:
        import torch

        self.dtype = dtype or torch.float32
        self.n_heads, self.d_head, self.n_layers = n_heads, d_head, n_layers
        self.group = n_heads // (n_kv_heads or n_heads)
        self.d_mlp = d_mlp
        self.planted: set[tuple[int, int]] = set()
        self.ids = {word: i for i, word in enumerate((*SPECIALS, *words))}
        starts = [0]
        for width in channels.values():
            starts.append(starts[-1] + width)
        self.channels = {c: slice(a, b) for c, a, b in zip(channels, starts, starts[1:], strict=False)}
        self.d_model = starts[-1]
        config = {
            "d_model": self.d_model, "d_head": d_head, "n_heads": n_heads, "n_layers": n_layers,
            "n_ctx": channels["pos"], "d_vocab": len(self.ids), "positional_embedding_type": "standard",
            "attn_only": d_mlp is None, "normalization_type": None, "init_weights": False,
        }  # fmt: skip
        if d_mlp is not None:
            config |= {"d_mlp": d_mlp, "act_fn": "relu"}
        if n_kv_heads is not None:
            config["n_key_value_heads"] = n_kv_heads
        self.bridge = word_level_bridge(name, config, words, self.dtype)
        self._embed(n_ctx=channels["pos"])

    def _embed(self, n_ctx: int) -> None:
        import torch

        model: Any = self.bridge.original_model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            n = len(self.ids)
            plain_module(model.tok_embed).weight[:, self.channels["tok"]] = torch.eye(n, dtype=self.dtype)
            plain_module(model.pos).weight[:, self.channels["pos"]] = torch.eye(n_ctx, dtype=self.dtype)
            unembed = LOGIT * torch.eye(n, dtype=self.dtype)
            unembed[: len(SPECIALS)] = 0  # the model never predicts a special token
            plain_module(model.head).weight[:, self.channels["out"]] = unembed
            if "shift" in self.channels:
                plain_module(model.head).weight[:, self.channels["shift"]] = 1.0

    def _weights(self, layer: int, head: int) -> dict[str, Tensor]:
        """Views of one head's weights.

        They are q, k, v [d_head, d_model], o [d_model, d_head] and q_bias [d_head]. Heads of one group of grouped
        queries share k and v.
        """
        model: Any = self.bridge.original_model
        attn = plain_module(plain_module(model.layers[layer]).attn)
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        shared = slice(head // self.group * self.d_head, (head // self.group + 1) * self.d_head)
        weights = {name: plain_module(getattr(attn, name)).weight[rows if name == "q" else shared] for name in "qkv"}
        weights["o"] = plain_module(attn.o).weight[:, rows]
        weights["q_bias"] = plain_module(attn.q).bias[rows]
        return weights

    def plant(self, layer: int, head: int, *, q: Mapping[str, Tensor], k: Mapping[str, Tensor],
              v: Mapping[str, Tensor], o: Mapping[str, Tensor],
              q_bias: Tensor | None = None) -> None:  # fmt: skip
        """Set one head from matrices by channel.

        Each mapping has, per channel, the matrix [≤d_head, channel width] that reads it (``o``: that writes it).
        Attention scores are then exactly (q·x_i + q_bias)·(k·x_j).
        """
        import torch

        self.planted.add((layer, head))
        weights = self._weights(layer, head)
        with torch.no_grad():
            for name, reads in (("q", q), ("k", k), ("v", v)):
                for channel, matrix in reads.items():
                    weights[name][: matrix.shape[0], self.channels[channel]] = matrix.to(self.dtype)
            for channel, matrix in o.items():
                weights["o"][self.channels[channel], : matrix.shape[0]] = matrix.T.to(self.dtype)
            if q_bias is not None:
                weights["q_bias"][: q_bias.shape[0]] = q_bias.to(self.dtype)
            # The model divides scores by sqrt(d_head); this undoes it, so that MATCH and SINK are in nats.
            weights["q"].mul_(math.sqrt(self.d_head))
            weights["q_bias"].mul_(math.sqrt(self.d_head))

    def plant_neurons(self, layer: int, first: int, *, reads: Mapping[str, Tensor], bias: Tensor,
                      writes: Mapping[str, Tensor]) -> None:  # fmt: skip
        """Set neurons ``first``, ``first`` + 1, … of an MLP, and their outputs.

        They compute relu(Σ reads·x + bias). Matrices are [neurons, channel width], ``bias`` [neurons].
        """
        import torch

        fc_in, fc_out = self._mlp(layer)
        rows = slice(first, first + len(bias))
        with torch.no_grad():
            for channel, matrix in reads.items():
                fc_in.weight[rows, self.channels[channel]] = matrix.to(self.dtype)
            fc_in.bias[rows] = bias.to(self.dtype)
            for channel, matrix in writes.items():
                fc_out.weight[self.channels[channel], rows] = matrix.T.to(self.dtype)

    def fill(self, neurons: Mapping[int, int] | None = None) -> None:
        """Make all heads that are not planted inert, and neurons too.

        Neurons of MLPs from number ``neurons[layer]`` on (default: all). Inert parts read everything and are active,
        but write only where nothing reads.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                if (layer, head) not in self.planted:
                    self.plant_inert(layer, head, generator)
            if self.d_mlp is not None:
                self._inert_neurons(layer, (neurons or {}).get(layer, 0), generator)

    def plant_inert(self, layer: int, head: int, generator: torch.Generator) -> None:
        """Set a head that attends and moves information at random.

        It writes only into the channels ``junk`` and ``shift``. If a planted head of its group has set keys and values,
        it reads those.
        """
        import torch

        first = head // self.group * self.group
        owned = any((layer, mate) in self.planted for mate in range(first, first + self.group))
        weights = self._weights(layer, head)
        with torch.no_grad():
            for name in "q" if owned else "qkv":
                weights[name].copy_(self._draw(generator, self.d_head, self.d_model) / math.sqrt(2.0))
            self._write_junk(weights["o"], generator)

    def _inert_neurons(self, layer: int, first: int, generator: torch.Generator) -> None:
        import torch

        fc_in, fc_out = self._mlp(layer)
        with torch.no_grad():
            fc_in.weight[first:] = self._draw(generator, fc_in.weight.shape[0] - first, self.d_model) / math.sqrt(2.0)
            self._write_junk(fc_out.weight[:, first:], generator)

    def _write_junk(self, matrix: Tensor, generator: torch.Generator) -> None:
        """Fill an output matrix [d_model, inputs] at random.

        Its vectors have norm about 1, like an embedding.
        """
        for channel in ("junk", "shift"):
            if channel in self.channels:
                rows = self.channels[channel]
                width = rows.stop - rows.start
                matrix[rows] = self._draw(generator, width, matrix.shape[1]) / math.sqrt(width * matrix.shape[1])

    def _draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        import torch

        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def _mlp(self, layer: int) -> tuple[Any, Any]:
        model: Any = self.bridge.original_model
        mlp = plain_module(plain_module(model.layers[layer]).mlp)
        return plain_module(mlp.fc_in), plain_module(mlp.fc_out)


def word_level_bridge(
    name: str, config: dict[str, Any], words: Sequence[str], dtype: torch.dtype | None
) -> TransformerBridge:
    """Build a native TransformerLens model with a word-level tokenizer.

    It needs no hub and no download.
    """
    import torch

    return native_bridge(config, name=f"zoo.{name}", tokenizer=word_tokenizer(words), dtype=dtype or torch.float32)
