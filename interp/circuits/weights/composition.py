"""Weight circuits: heads as matrices on the residual stream, without prompts.

For a query head and its key/value head (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits), with
row vectors, and x̂ the normalised stream before the norm's weight is applied:

* OV = W_V W_O [d_model, d_model]: attention to a token adds x̂ · OV (and a constant) to the stream;
* QK = W_Q W_Kᵀ / √d_head [d_model, d_model]: the score of query i and key j is x̂_i · QK · x̂_jᵀ (and terms of biases).

The norm's weight is folded into W_Q, W_K and W_V, and so is the centring of a LayerNorm. The norm's bias is folded into
their biases. The norm's scale, which is not linear, is left out. Learned or ALiBi positions are not part of QK. If
queries and keys are rotated (RoPE), QK depends on the distance from key to query, and needs an ``offset``; the rotation
is measured on the model itself (`Rotations`). Models that norm queries and keys after their projections have no QK in
this sense.

Both are TransformerLens FactoredMatrix objects, with ``.svd()``, ``.eigenvalues``, ``.norm()`` and products, so no
d_model × d_model matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.weights.rotations import Rotations
from interp.circuits.wiring import Wiring, module_behind
from interp.errors import ModelError, SiteError
from interp.model.model import Model
from interp.model.session import in_session
from interp.model.transformer_lens_tools import FactoredMatrix

KINDS = ("q", "k", "v")


class FoldedNorm:
    """A norm as x ↦ x̂ · γ + β, with γ and β in at least float32.

    x̂ is centred first if ``centred`` (LayerNorm). The kind of norm is determined by running the module, whatever its
    class. Raises ModelError unless it is a LayerNorm, an RMS norm or the identity.
    """

    def __init__(self, norm: Any, like: Tensor, where: str):
        d = like.shape[-1]
        self.eps = float(
            next((getattr(norm, n) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, n)), 0.0)
        )
        wide = torch.promote_types(like.dtype, torch.float32)
        signs = torch.ones(d, device=like.device, dtype=like.dtype)
        signs[1::2] = -1
        drawn = torch.randn(d, generator=torch.Generator().manual_seed(0)).to(like) * 100
        with torch.no_grad():
            apply = (lambda x: x) if norm is None else (lambda x: norm(x[None, None])[0, 0])
            self.beta = apply(torch.zeros_like(signs)).to(wide)
            at_signs, at_drawn = (apply(x).to(wide) - self.beta for x in (100 * signs, drawn))
        for kind in ("none", "rms", "layer"):
            self.kind = kind
            self.gamma = at_signs / self.scaled(100 * signs.to(wide))
            gap = (self.scaled(drawn.to(wide)) * self.gamma - at_drawn).abs().max()
            tolerance = 1e-3 if wide == like.dtype else 5e-2
            if float(gap) <= tolerance * float(at_drawn.abs().max()):
                return
        raise ModelError(f"{where}: its norm ({type(norm).__name__}) is neither a LayerNorm nor an RMS norm")

    @property
    def centred(self) -> bool:
        """Whether the mean over d_model is subtracted first."""
        return self.kind == "layer"

    def scaled(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """x̂: x divided by its root mean square (``rms``), after centring (``layer``)."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / self.scale(x)

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """The divisor of x: √(mean square + the norm's small constant).

        For a LayerNorm, it is that of the centred x.
        """
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def fold(
        self, matrix: Float[Tensor, "d_head d_model"], bias: Float[Tensor, " d_head"] | None
    ) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """W and b such that x̂ W + b = matrix · norm(x) + bias; centring is part of W."""
        wide = matrix.to(self.gamma.dtype)
        folded = self.gamma[:, None] * wide.T
        if self.centred:
            folded = folded - folded.mean(0)
        from_beta = wide @ self.beta
        return folded, from_beta if bias is None else from_beta + bias.to(from_beta)


class WeightCircuits:
    """The QK and OV circuits of a model's heads.

    Raises ModelError unless blocks read and write by a norm and matrices.
    """

    @in_session
    def __init__(self, model: Model):
        self.model, self.wiring = model, Wiring(model)
        self.graph = self.wiring.graph
        vocab = int(model.bridge.cfg.d_vocab)
        self.wiring.check([i % vocab for i in (3, 1, 4, 1, 5)][: model.n_ctx])
        self.rotations = Rotations(model)
        like = self.wiring.reads(0, "q")
        self.norms = [
            FoldedNorm(self.wiring.norm(i, "attn"), like, f"{model.name}, layer {i}") for i in range(model.n_layers)
        ]

    # ------------------------------------------------------------ one head

    def read(
        self, component: str, layer: int, head: int
    ) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """W and b such that a query head's q, k or v is x̂ W + b.

        k and v are those of the KV head that it shares.
        """
        self._check(layer, head)
        index = head if component == "q" else head // (self.graph.n_heads // self.graph.n_kv_heads)
        bias = self.wiring.bias(layer, component)
        matrix = self.wiring.reads(layer, component)[index]
        return self.norms[layer].fold(matrix, None if bias is None else bias[index].detach())

    def written(self, layer: int, head: int) -> Float[Tensor, "d_head d_model"]:
        """W_O of a head, which adds z · W_O to the stream."""
        self._check(layer, head)
        out = self.wiring.writes(layer)[head].T
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def ov(self, layer: int, head: int) -> FactoredMatrix:
        """Map from x̂ of a token to what attention to it alone adds to the stream.

        The constant of the value's bias is left out.
        """
        return FactoredMatrix(self.read("v", layer, head)[0], self.written(layer, head))

    def qk(self, layer: int, head: int, offset: int | None = None) -> FactoredMatrix:
        """Bilinear form from x̂ of query and key to their score.

        Bias terms are left out. The key lies ``offset`` positions before the query. ``offset`` is required if the layer
        rotates queries and keys, and has no effect if it does not.
        """
        w_q, w_k = self.rotated(layer, head, offset)
        return FactoredMatrix(w_q[0], w_k[0].T)

    def rotated(self, layer: int, head: int, offset: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(W_Q, b_Q) and (W_K, b_K) whose plain product is the score.

        Scale and rotation over ``offset`` are included.
        """
        self._check(layer, head)
        if offset is None and self.rotations.rotates(layer):
            raise SiteError(
                f"layer {layer} of {self.model.name} rotates queries and keys (RoPE), so their product depends on "
                "their distance: pass offset= (0: the token itself, 1: the one before it, …)"
            )
        (w_q, b_q), (w_k, b_k) = (self.read(c, layer, head) for c in "qk")
        turn_q, turn_k = self.rotations.at(layer, offset or 0)
        scale = self.rotations.scale(layer)
        turn_q, turn_k = scale * turn_q.to(w_q), turn_k.to(w_k)
        return (w_q @ turn_q, b_q @ turn_q), (w_k @ turn_k, b_k @ turn_k)

    def _check(self, layer: int, head: int) -> None:
        if not (0 <= layer < self.graph.n_layers and 0 <= head < self.graph.n_heads):
            raise SiteError(f"no head {head} in layer {layer}: {self.model.name} has {self.graph.describe()}")

    # ------------------------------------------------------------ pairs of heads

    def composition(
        self, kinds: Iterable[str] = KINDS, *, offset: int = 0, layers: Iterable[int] | None = None
    ) -> pd.DataFrame:
        """Score how much of an earlier head's output a later head reads.

        The table has all pairs of heads and the later head's q, k and v, strongest first. One row per pair and kind.
        ``score`` = ‖OV₁ · X₂‖ / (‖OV₁‖ ‖X₂‖) in Frobenius norms, where X₂ is QK for ``q``, QKᵀ for ``k`` and OV for
        ``v`` (Elhage et al. 2021). ``baseline`` = 1/√d_model is its root mean square if the singular vectors of OV₁ on
        the residual stream are rotated at random (exactly, for any singular values). ``excess`` = score − baseline.
        ``z``: how many standard deviations score² lies above its mean under such a rotation (exact moments for a
        Haar-random rotation). If layers rotate queries and keys, ``offset`` is the distance at which QK is computed.
        ``layers``: those of the later head; default all. Norms weigh all directions alike: a composition that is only a
        small part of what a head reads (inhibition → name mover in `interp.zoo.ioi`) does not stand out.
        """
        kinds, d = tuple(kinds), self.model.d_model
        if not kinds or set(kinds) - set(KINDS):
            raise SiteError(f"kinds={kinds!r}: expected one or more of 'q', 'k' and 'v'")
        outputs = [self._output_factors(layer) for layer in range(self.graph.n_layers)]
        tables = []
        for layer in range(self.graph.n_layers) if layers is None else list(layers):
            for kind in kinds:
                inputs = torch.stack([self._input_factor(kind, layer, h, offset) for h in range(self.graph.n_heads)])
                for sender in range(layer):
                    scores = _pair_scores(outputs[sender], inputs, d)
                    tables.append(scores.assign(layer=layer, sender_layer=sender, kind=kind))
        if not tables:
            raise SiteError("there are no pairs of heads in different layers, so nothing can compose")
        order = ["layer", "head", "sender_layer", "sender_head", "kind", "score", "baseline", "excess", "z"]
        table: Any = pd.concat(tables)
        return table[order].sort_values("z", ascending=False, kind="stable").reset_index(drop=True)

    def _output_factors(self, layer: int) -> Float[Tensor, "heads d_head d_model"]:
        """OV of each head without the orthogonal factor on its left.

        That factor does not affect norms of products.
        """
        matrices = [self.ov(layer, h) for h in range(self.graph.n_heads)]
        return torch.stack([torch.linalg.qr(m.A, mode="r")[1] @ m.B for m in matrices])

    def _input_factor(self, kind: str, layer: int, head: int, offset: int) -> Float[Tensor, "d_model d_head"]:
        """QK, QKᵀ or OV without the orthogonal factor on its right."""
        matrix = self.ov(layer, head) if kind == "v" else self.qk(layer, head, offset)
        matrix = matrix.T if kind == "k" else matrix
        return matrix.A @ torch.linalg.qr(matrix.B.T, mode="r")[1].T

    # ------------------------------------------------------------ tokens

    @cached_property
    def _unembed_embed(self) -> Float[Tensor, "d_model d_model"]:
        """W_U W_E with the final norm's weight.

        It maps from the stream to logits, and from tokens back to the stream.
        """
        bridge: Any = self.model.bridge
        embed, unembed = (module_behind(getattr(bridge, name, None)) for name in ("embed", "unembed"))
        d = self.model.d_model
        weights: list[Any] = [getattr(m, "weight", None) for m in (embed, unembed)]
        if any(w is None or w.ndim != 2 or w.shape[1] != d for w in weights):
            raise ModelError(
                f"{self.model.name}: embedding and unembedding are not plain [vocabulary, d_model] matrices"
            )
        norm = FoldedNorm(module_behind(getattr(bridge, "ln_final", None)), self.wiring.reads(0, "q"), self.model.name)
        w_e, w_u = (w.detach().to(norm.gamma.dtype) for w in weights)
        product = norm.gamma[:, None] * (w_u.T @ w_e)
        return product - product.mean(0) if norm.centred else product

    def copying(self) -> pd.DataFrame:
        """Score by OV circuits whether heads raise the logit of the attended token.

        One row per head: ``copying`` = Σ Re λ / Σ |λ| over the eigenvalues of the token-to-token matrix W_E · OV · W_U
        (Elhage et al. 2021). It is 1 if the head only copies, −1 if it only lowers the attended token, and near 0 for a
        random matrix. It uses token embeddings, without the changes that MLPs make to them. Norms' weights are folded
        in, and their scales left out.
        """
        rows = []
        for layer in range(self.graph.n_layers):
            for head in range(self.graph.n_heads):
                ov = self.ov(layer, head)
                # the cyclic product has the nonzero eigenvalues of the token-to-token matrix
                eigenvalues = torch.linalg.eigvals(ov.B @ self._unembed_embed @ ov.A)
                size = float(eigenvalues.abs().sum())
                rows.append((layer, head, float(eigenvalues.real.sum()) / size if size else float("nan")))
        return pd.DataFrame(rows, columns=["layer", "head", "copying"])


def _pair_scores(
    outputs: Float[Tensor, "senders d_head d_model"], inputs: Float[Tensor, "heads d_model d_head"], d: int
) -> pd.DataFrame:
    """Scores of every sender with every reader, with moments under random rotation."""
    squares = torch.stack([(s @ inputs).double().pow(2).sum((1, 2)) for s in outputs])  # one sender at a time
    sent, read = outputs.double(), inputs.double()
    norms = [x.pow(2).sum((1, 2)) for x in (sent, read)]  # tr P and tr Q of the Gram matrices on the stream
    fourth = [(sent @ sent.mT).pow(2).sum((1, 2)), (read.mT @ read).pow(2).sum((1, 2))]  # tr P², tr Q²
    size = norms[0][:, None] * norms[1]
    # E tr(P U Q Uᵀ) = tr P tr Q / d; Var = 2 (tr P² − (tr P)²/d) (tr Q² − (tr Q)²/d) / ((d − 1)(d + 2))
    spread = [f - n.pow(2) / d for f, n in zip(fourth, norms, strict=True)]
    deviation = (2 * spread[0][:, None] * spread[1] / ((d - 1) * (d + 2))).clamp(min=0).sqrt()
    score = (squares / size).sqrt().cpu().numpy()
    z = ((squares - size / d) / deviation).cpu().numpy()
    sender, head = np.meshgrid(range(len(outputs)), range(len(inputs)), indexing="ij")
    columns = {"sender_head": sender, "head": head, "score": score, "excess": score - d**-0.5, "z": z}
    return pd.DataFrame({name: x.ravel() for name, x in columns.items()}).assign(baseline=d**-0.5)
