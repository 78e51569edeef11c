"""The QK fix: exact effects of queries and keys on z, through the softmax.

They replace estimates by the softmax's slope. Kramár et al. 2024 (arXiv 2403.00745): saturated attention has no
gradient in q and k. Plain attribution patching then calls a query or key unimportant although replacing it would move
all of its head's attention. The fix recomputes the attention and is linear only after it: effect = Σ (A′ − A)[row] ·
∂metric/∂A[row] = Σ (z′ − z) · ∂metric/∂z.

* A query changes only its own row: z′ is one call of the kernel with the source run's queries; no pattern is formed.
* All keys of a span together: the same, with the source run's keys in that span.
* Each key alone changes one score s → s′ in every row that sees it. With a′ = σ(s′ − log Σ_{others} e^s) and m the mean
  of g = ∂metric/∂A over the other keys, weighted by their attention, the row's effect is a′g + (1 − a′)m − Σ A g, which
  takes O(1) per row and key. Rows are processed in tiles (`TILE` scores at a time); the patterns of all heads never
  exist together.

If one key has nearly all attention, 1 − A is lost to rounding. The sum over the other keys is then computed directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.capture import capture, capture_calls
from interp.errors import ModelError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.sites import COMPONENTS

RELATIVE = 1e-4  # share of the largest change in a layer, below which slopes stay as they are
TILE = 2**21  # scores that exist at one time

Change = Float[Tensor, "batch position heads dim"]


class Rerun:
    """Attention of a batch's base run with queries or keys of its source run.

    ``base``, ``source``: calls by layer.
    """

    def __init__(self, backend: str, base: dict[int, AttentionCall], source: dict[int, AttentionCall]):
        self.backend, self.base, self.source = backend, base, source

    def queries(self, layer: int) -> Change:
        """Change of z when each query is replaced by the source run's."""
        return self._change(self.base[layer], q=self.source[layer].q)

    def keys(self, layer: int, start: int, stop: int, row: int | None = None) -> Change:
        """Change of z when the keys in [start, stop) are the source run's.

        ``row``: for one prompt of the batch.
        """
        base, source_k = self.base[layer], self.source[layer].k
        if row is not None:
            base, source_k = _one_prompt(base, row), source_k[row : row + 1]
        k = base.k.clone()
        k[:, :, start:stop] = source_k[:, :, start:stop]
        return self._change(base, k=k)

    def _change(self, call: AttentionCall, **replaced: Tensor) -> Change:
        new, old = (attend(c, backend=self.backend).out for c in (replace(call, **replaced), call))
        return (new - old).transpose(1, 2)

    def each_key(self, layer: int, grads: Change) -> Float[Tensor, "batch position kv_heads"]:
        """Effect of replacing each key alone, given ∂metric/∂z.

        It is summed over the rows and query heads that read the key.
        """
        call, source_k = self.base[layer], self.source[layer].k
        n, kv_heads = call.k.shape[2], call.k.shape[1]
        total = torch.zeros(len(grads), kv_heads, n, device=grads.device, dtype=_wide(grads))
        rows = max(1, TILE // (len(grads) * call.q.shape[1] * n))
        for start in range(0, call.q.shape[2], rows):
            tile = range(start, min(start + rows, call.q.shape[2]))
            slope = grads[:, tile.start : tile.stop].transpose(1, 2).unflatten(1, (kv_heads, -1))
            slope = torch.einsum("bkgmd,bknd->bkgmn", slope.to(total), call.v.to(total))
            old, new = _scores(call, call.k, tile), _scores(call, source_k, tile)
            total += _one_key(old, new, slope, _sinks(call, total)).sum((2, 3))
        return total.transpose(1, 2)


class Secants:
    """Hooks that make gradients of queries and keys agree with their exact effects.

    They act during a backward pass. ``change``: source − base of q and k, by hook name. See ``"atp-carried"`` in
    `interp.circuits.attribution.nodes`.
    """

    def __init__(self, rerun: Rerun, change: dict[str, Change]):
        self.rerun, self.change = rerun, change
        self.z_grads: dict[int, Change] = {}  # by layer, stored when the backward pass reaches z
        self.z_changes: dict[int, Change] = {}  # by layer, for replaced queries

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks for a forward through which gradients are taken."""
        layers = sorted({int(name.split(".")[1]) for name in self.change})
        pairs: list[tuple[str, Any]] = []
        for layer in layers:
            pairs.append((COMPONENTS["z"].hook.format(layer=layer), self._on_backward(self._store_z_grad(layer))))
            for component in "qk":
                name = COMPONENTS[component].hook.format(layer=layer)
                pairs.append((name, self._on_backward(self._corrected(name, layer, component))))
        return pairs

    def _on_backward(self, function: Callable[[Tensor], Tensor | None]) -> Any:
        """A forward hook that registers ``function`` on the activation's gradient."""

        def hook(x: Tensor, hook: object) -> Tensor | None:
            if not x.requires_grad:
                return None
            x = x.clone()
            x.register_hook(function)
            return x

        return hook

    def _store_z_grad(self, layer: int) -> Callable[[Tensor], None]:
        def store(grads: Tensor) -> None:
            self.z_grads[layer] = grads

        return store

    def _corrected(self, name: str, layer: int, component: str) -> Callable[[Tensor], Tensor]:
        """A function that replaces the slope along ``change`` by the secant."""

        def correct(slope: Tensor) -> Tensor:
            change = self.change[name]
            size = change.square().sum(-1)
            if component == "k":
                exact = self.rerun.each_key(layer, self.z_grads[layer])
            else:
                if layer not in self.z_changes:
                    self.z_changes[layer] = self.rerun.queries(layer)
                exact = (self.z_changes[layer] * self.z_grads[layer]).sum(-1)
            error = (exact - (slope * change).sum(-1)) / size
            is_large = size > (RELATIVE**2) * size.amax()  # the secant of a tiny change would be rounding
            return slope + torch.where(is_large, error, 0.0).to(slope)[..., None] * change

        return correct


def _one_key(
    s: Float[Tensor, "*rows n"], new: Float[Tensor, "*rows n"], slope: Float[Tensor, "*rows n"], sink: Tensor | None
) -> Float[Tensor, "*rows n"]:
    """For each key, the change of Σ softmax(s) · slope if its score becomes ``new``.

    Hidden keys have s = −inf.
    """
    lse = _lse(s, sink)
    p = (s - lse[..., None]).exp()
    mean = (p * slope).sum(-1, keepdim=True)
    others, others_mean = lse[..., None] + torch.log1p(-p), (mean - p * slope) / (1 - p)
    best = s.argmax(-1, keepdim=True)  # the only key that can have more than half of the attention
    rest = s.scatter(-1, best, float("-inf"))
    rest_lse = _lse(rest, sink)[..., None]
    rest_mean = ((rest - rest_lse.clamp(min=torch.finfo(s.dtype).min)).exp() * slope).sum(-1, keepdim=True)
    others, others_mean = others.scatter(-1, best, rest_lse), others_mean.scatter(-1, best, rest_mean)
    share = torch.sigmoid(new - others)
    return torch.where(new == float("-inf"), 0.0, share * slope + (1 - share) * others_mean - mean)


def _lse(s: Float[Tensor, "*rows n"], sink: Tensor | None) -> Float[Tensor, "*rows"]:
    """Logsumexp over keys, and over the sink if there is one."""
    lse = s.logsumexp(-1)
    return lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))


def _sinks(call: AttentionCall, like: Tensor) -> Tensor | None:
    """Learned sink scores, [1, kv_heads, group, 1].

    A sink receives attention and adds nothing to the output.
    """
    return None if call.sinks is None else call.sinks.to(like).reshape(1, call.k.shape[1], -1, 1)


def _scores(call: AttentionCall, k: Tensor, rows: range) -> Float[Tensor, "batch kv_heads group rows n"]:
    """Scores of a range of queries, −inf where hidden.

    They are what `dense_attention` passes to its softmax.
    """
    kv_heads, n = k.shape[1], k.shape[2]
    q = call.q[:, :, rows.start : rows.stop].unflatten(1, (kv_heads, -1))
    s = torch.einsum("bkgmd,bknd->bkgmn", q.to(_wide(q)), k.to(_wide(k))) * call.scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        bias = call.bias.expand(-1, call.q.shape[1], call.q.shape[2], n)[:, :, rows.start : rows.stop]
        s = s + bias.unflatten(1, (kv_heads, -1)).to(s)
    distance = torch.arange(rows.start, rows.stop, device=s.device)[:, None] + n - call.q.shape[2]
    distance = distance - torch.arange(n, device=s.device)  # from key to query
    hidden = distance < 0 if call.causal else torch.zeros_like(distance, dtype=torch.bool)
    if call.window is not None:
        hidden = hidden | (distance.abs() >= call.window)
    return s.masked_fill(hidden, float("-inf"))


def _wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _one_prompt(call: AttentionCall, row: int) -> AttentionCall:
    """The call of one prompt of the batch."""
    one = slice(row, row + 1)
    bias = call.bias if call.bias is None or call.bias.shape[0] == 1 else call.bias[one]
    return replace(call, q=call.q[one], k=call.k[one], v=call.v[one], bias=bias, edits=call.edits[one])


@torch.no_grad()
def check_heads_apart(model: Model, ids: Sequence[int], components: Sequence[str]) -> None:
    """Raise ModelError unless a head's q and k reach that head's attention alone.

    q and k are the activations that the hooks carry. The check takes one forward per component, which changes head 0 of
    the first layer: no other head's attention may change.
    """
    layer = model.attention_layers[0]
    with capture_calls(model) as calls:
        model.last_logits([ids])
        before = calls[layer]
        like_z = before.q[..., :1].expand(*before.q.shape[:3], before.v.shape[-1])
        expected = {"q": before.q, "k": before.k, "z": like_z}
        names = {c: COMPONENTS[c].hook.format(layer=layer) for c in expected}
        acts = capture(model, [ids], list(names.values()))
        if any(acts[names[c]].shape != x.transpose(1, 2).shape for c, x in expected.items()):
            raise ModelError(
                f"{model.name}: its hooks of q, k and z do not carry what attention reads and gives (latent "
                "attention), so the QK fix is not defined: use AtP without it"
            )
        for component in components:

            def nudge(x: Tensor, hook: object) -> Tensor:
                x = x.clone()
                x[:, :, 0] += x[:, :, 0].roll(1, -1) + 1
                return x

            with hooks(model, (COMPONENTS[component].hook.format(layer=layer), nudge)):
                model.last_logits([ids])
            change = (getattr(calls[layer], component) - getattr(before, component)).abs().amax((0, 2, 3))
            if not change[0] > 0 or (change[1:] > 0).any():
                raise ModelError(
                    f"{model.name}: the {component} hook of a head does not reach that head's attention alone "
                    "(it is normed over all heads, or rebuilt), so the QK fix is not defined: use AtP without it"
                )
