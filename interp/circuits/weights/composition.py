"""Weight circuits: what heads compute, as matrices on the residual stream, without any prompt.

Of a query head and its key/value head (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits), in row
vectors and with x̂ what the norm makes of the stream before its weight:

* OV = W_V W_O [d_model, d_model]: attention to a token adds x̂ · OV (and a constant) to the stream;
* QK = W_Q W_Kᵀ / √d_head [d_model, d_model]: the score of query i and key j is x̂_i · QK · x̂_jᵀ (and terms of biases).

The norm's weight is folded into W_Q, W_K and W_V, and so is the centring of a LayerNorm; its bias goes into theirs, and
its scale, which is not linear, is left out. Learned or ALiBi positions are no part of QK. Where queries and keys are
rotated (RoPE), QK depends on how far the key lies behind the query, and must be asked for at an ``offset``: the
rotation is read off the model itself (`Rotations`). Models that norm queries and keys behind their projections have no
QK in this sense.

Both are TransformerLens FactoredMatrix objects, so that no d_model × d_model matrix is made: ``.svd()``,
``.eigenvalues``, ``.norm()``, products.
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
from interp.model.transformer_lens_tools import FactoredMatrix

KINDS = ("q", "k", "v")


class FoldedNorm:
    """A norm as x ↦ x̂ · γ + β, with x̂ centred first if ``centred`` (LayerNorm). γ and β in at least float32.

    Found by trying the module, whatever it is called. ModelError if it is neither LayerNorm, RMS norm, nor nothing.
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
        raise ModelError(f"{where}: its norm ({type(norm).__name__}) is neither LayerNorm nor RMS norm")

    @property
    def centred(self) -> bool:
        """Whether the mean over d_model is taken off first."""
        return self.kind == "layer"

    def scaled(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """x̂: x in its root mean square (``rms``), or centred first (``layer``)."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / self.scale(x)

    def scale(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """What x is divided by: √(mean square + the norm's small constant), of x centred if it is centred."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def fold(
        self, matrix: Float[Tensor, "d_head d_model"], bias: Float[Tensor, " d_head"] | None
    ) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """W and b of x̂ W + b = matrix · norm(x) + bias; centring is part of W."""
        wide = matrix.to(self.gamma.dtype)
        folded = self.gamma[:, None] * wide.T
        if self.centred:
            folded = folded - folded.mean(0)
        added = wide @ self.beta
        return folded, added if bias is None else added + bias.to(added)


class WeightCircuits:
    """The QK and OV circuits of a model's heads. ModelError where blocks do not read and write by norm and matrix."""

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
        """W and b by which a query head's q, k or v is x̂ W + b (k and v: of the KV head that it shares)."""
        self._check(layer, head)
        own = head if component == "q" else head // (self.graph.n_heads // self.graph.n_kv_heads)
        bias = self.wiring.bias(layer, component)
        return self.norms[layer].fold(
            self.wiring.reads(layer, component)[own], None if bias is None else bias[own].detach()
        )

    def written(self, layer: int, head: int) -> Float[Tensor, "d_head d_model"]:
        """W_O of a head: what it adds to the stream is z · W_O."""
        self._check(layer, head)
        out = self.wiring.writes(layer)[head].T
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def ov(self, layer: int, head: int) -> FactoredMatrix:
        """x̂ of a token → what attention to it alone adds to the stream (without the constant of the value's bias)."""
        return FactoredMatrix(self.read("v", layer, head)[0], self.written(layer, head))

    def qk(self, layer: int, head: int, offset: int | None = None) -> FactoredMatrix:
        """x̂ of the query, x̂ of the key → their score (without terms of biases), for a key ``offset`` positions back.

        ``offset`` must be given where the layer rotates queries and keys, and does nothing where it does not.
        """
        w_q, w_k = self.rotated(layer, head, offset)
        return FactoredMatrix(w_q[0], w_k[0].T)

    def rotated(self, layer: int, head: int, offset: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(W_Q, b_Q) and (W_K, b_K) whose plain product is the score, scale and rotation over ``offset`` included."""
        self._check(layer, head)
        if offset is None and self.rotations.rotates(layer):
            raise SiteError(
                f"layer {layer} of {self.model.name} rotates queries and keys (RoPE): their product depends on how far "
                "apart they are; give offset= (0: the token itself, 1: the one before it, …)"
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
        """How much of what an earlier head writes is read by a later head's q, k or v: all pairs, strongest first.

        One row per pair and kind: ``score`` = ‖OV₁ · X₂‖ / (‖OV₁‖ ‖X₂‖) in Frobenius norms, X₂ being QK for ``q``, QKᵀ
        for ``k`` and OV for ``v`` (Elhage et al. 2021). ``baseline`` = 1/√d_model, its root mean square when the
        singular vectors of OV₁ on the residual stream are turned at random (exactly, whatever the singular values);
        ``excess`` = score − baseline; ``z``: how many standard deviations score² lies above its mean under that turning
        (exact moments; a Haar-random rotation). Where layers rotate queries and keys, ``offset`` is the distance at
        which QK is taken. ``layers``: of the later head; default all. Norms see all directions alike: a composition
        that is one small part of what a head reads (inhibition → name mover in `interp.zoo.ioi`) does not stand out.
        """
        kinds, d = tuple(kinds), self.model.d_model
        if not kinds or set(kinds) - set(KINDS):
            raise SiteError(f"kinds={kinds!r}: some of 'q', 'k' and 'v' are expected")
        wanted = range(self.graph.n_layers) if layers is None else list(layers)
        sends = [self._sends(layer) for layer in range(self.graph.n_layers)]
        rows = []
        for layer in wanted:
            for kind in kinds:
                reads = torch.stack([self._receives(kind, layer, h, offset) for h in range(self.graph.n_heads)])
                for sender in range(layer):
                    rows.append(_pairs(sends[sender], reads, d).assign(layer=layer, sender_layer=sender, kind=kind))
        if not rows:
            raise SiteError("there are no pairs of heads in different layers: nothing to compose")
        order = ["layer", "head", "sender_layer", "sender_head", "kind", "score", "baseline", "excess", "z"]
        table: Any = pd.concat(rows)
        return table[order].sort_values("z", ascending=False, kind="stable").reset_index(drop=True)

    def _sends(self, layer: int) -> Float[Tensor, "heads d_head d_model"]:
        """OV without the orthogonal factor on its left, which norms of products do not see."""
        found = [self.ov(layer, h) for h in range(self.graph.n_heads)]
        return torch.stack([torch.linalg.qr(f.A, mode="r")[1] @ f.B for f in found])

    def _receives(self, kind: str, layer: int, head: int, offset: int) -> Float[Tensor, "d_model d_head"]:
        """QK, QKᵀ or OV without the orthogonal factor on its right."""
        matrix = self.ov(layer, head) if kind == "v" else self.qk(layer, head, offset)
        matrix = matrix.T if kind == "k" else matrix
        return matrix.A @ torch.linalg.qr(matrix.B.T, mode="r")[1].T

    # ------------------------------------------------------------ tokens

    @cached_property
    def _unembed_embed(self) -> Float[Tensor, "d_model d_model"]:
        """W_U W_E with the final norm's weight: from the stream to logits, and from tokens back to the stream."""
        bridge: Any = self.model.bridge
        embed, unembed = (module_behind(getattr(bridge, name, None)) for name in ("embed", "unembed"))
        d = self.model.d_model
        found: list[Any] = [getattr(m, "weight", None) for m in (embed, unembed)]
        if any(w is None or w.ndim != 2 or w.shape[1] != d for w in found):
            raise ModelError(
                f"{self.model.name}: embedding and unembedding are no plain [vocabulary, d_model] matrices"
            )
        norm = FoldedNorm(module_behind(getattr(bridge, "ln_final", None)), self.wiring.reads(0, "q"), self.model.name)
        w_e, w_u = (w.detach().to(norm.gamma.dtype) for w in found)
        product = norm.gamma[:, None] * (w_u.T @ w_e)
        return product - product.mean(0) if norm.centred else product

    def copying(self) -> pd.DataFrame:
        """Copying scores of OV: do heads raise the logit of the token that they attend to?

        One row per head: ``copying`` = Σ Re λ / Σ |λ| over the eigenvalues of the token-to-token matrix W_E · OV · W_U
        (Elhage et al. 2021): 1 if it only copies, −1 if it only lowers what it sees, near 0 for a random matrix. Taken
        of token embeddings, without what MLPs make of them; norms' weights are folded, their scales left out.
        """
        rows = []
        for layer in range(self.graph.n_layers):
            for head in range(self.graph.n_heads):
                ov = self.ov(layer, head)
                found = torch.linalg.eigvals(ov.B @ self._unembed_embed @ ov.A)  # the nonzero ones of the long product
                size = float(found.abs().sum())
                rows.append((layer, head, float(found.real.sum()) / size if size else float("nan")))
        return pd.DataFrame(rows, columns=["layer", "head", "copying"])


def _pairs(
    sends: Float[Tensor, "senders d_head d_model"], reads: Float[Tensor, "heads d_model d_head"], d: int
) -> pd.DataFrame:
    """Scores of every sender into every reader, with the moments of random turnings."""
    squares = torch.stack([(s @ reads).double().pow(2).sum((1, 2)) for s in sends])  # one sender's products at a time
    sent, read = sends.double(), reads.double()
    norms = [x.pow(2).sum((1, 2)) for x in (sent, read)]  # tr P and tr Q of the Gram matrices on the stream
    fourth = [(sent @ sent.mT).pow(2).sum((1, 2)), (read.mT @ read).pow(2).sum((1, 2))]  # tr P², tr Q²
    size = norms[0][:, None] * norms[1]
    # E tr(P U Q Uᵀ) = tr P tr Q / d; Var = 2 (tr P² − (tr P)²/d) (tr Q² − (tr Q)²/d) / ((d − 1)(d + 2))
    spread = [f - n.pow(2) / d for f, n in zip(fourth, norms, strict=True)]
    deviation = (2 * spread[0][:, None] * spread[1] / ((d - 1) * (d + 2))).clamp(min=0).sqrt()
    score = (squares / size).sqrt().cpu().numpy()
    z = ((squares - size / d) / deviation).cpu().numpy()
    sender, head = np.meshgrid(range(len(sends)), range(len(reads)), indexing="ij")
    columns = {"sender_head": sender, "head": head, "score": score, "excess": score - d**-0.5, "z": z}
    return pd.DataFrame({name: x.ravel() for name, x in columns.items()}).assign(baseline=d**-0.5)
