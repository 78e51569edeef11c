"""The QK fix: what a query or key does to its head's output z through the softmax, exactly, not by its slope.

Kramár et al. 2024 (arXiv 2403.00745): attention that is saturated has no gradient in q and k, so that plain attribution
patching calls a query or key unimportant though replacing it would move all of its head's attention. The fix computes
the attention anew, and is linear only behind it: effect = Σ (A′ − A)[row] · ∂metric/∂A[row] = Σ (z′ − z) · ∂metric/∂z.

* A query changes its own row: z′ is one call of the kernel with the source run's queries, and no pattern is formed.
* All keys of a stretch at once: the same, with the source run's keys in that stretch.
* Each key alone changes one score s → s′ in every row that sees it. With a′ = σ(s′ − log Σ_{others} e^s) and m the mean
  of g = ∂metric/∂A over the other keys, weighted by their attention, the row's effect is a′g + (1 − a′)m − Σ A g: O(1)
  per row and key. It is done in tiles of rows (`TILE` scores at a time), never a pattern of all heads.

Where one key holds nearly all attention, 1 − A is lost to rounding; the other keys' sum is then formed without it.
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
from interp.model.hooks import hooks
from interp.model.instrument import attend
from interp.model.model import Model
from interp.sites import COMPONENTS

RELATIVE = 1e-4  # of the largest change in a layer: below it, slopes stay as they are
TILE = 2**21  # scores that exist at one time

Change = Float[Tensor, "batch position heads dim"]


class Rerun:
    """Attention of a batch's base run with queries or keys of its source run: ``calls`` by run and layer."""

    def __init__(self, backend: str, base: dict[int, AttentionCall], source: dict[int, AttentionCall]):
        self.backend, self.base, self.source = backend, base, source

    def queries(self, layer: int) -> Change:
        """Change of z when each query is the source run's."""
        return self._change(self.base[layer], q=self.source[layer].q)

    def keys(self, layer: int, start: int, stop: int, row: int | None = None) -> Change:
        """Change of z when all keys in [start, stop) are the source run's; ``row``: of one prompt of the batch."""
        base, other = self.base[layer], self.source[layer].k
        if row is not None:
            base, other = _row(base, row), other[row : row + 1]
        k = base.k.clone()
        k[:, :, start:stop] = other[:, :, start:stop]
        return self._change(base, k=k)

    def _change(self, call: AttentionCall, **new: Tensor) -> Change:
        then, now = (attend(c, backend=self.backend).out for c in (replace(call, **new), call))
        return (then - now).transpose(1, 2)

    def each_key(self, layer: int, grads: Change) -> Float[Tensor, "batch position kv_heads"]:
        """Effect of every key alone, given ∂metric/∂z: summed over the rows and query heads that read it."""
        call, other = self.base[layer], self.source[layer].k
        n, kv_heads = call.k.shape[2], call.k.shape[1]
        total = torch.zeros(len(grads), kv_heads, n, device=grads.device, dtype=_wide(grads))
        rows = max(1, TILE // (len(grads) * call.q.shape[1] * n))
        for start in range(0, call.q.shape[2], rows):
            here = range(start, min(start + rows, call.q.shape[2]))
            slope = grads[:, here.start : here.stop].transpose(1, 2).unflatten(1, (kv_heads, -1))
            slope = torch.einsum("bkgmd,bknd->bkgmn", slope.to(total), call.v.to(total))
            found = _one_key(_scores(call, call.k, here), _scores(call, other, here), slope, _sinks(call, total))
            total += found.sum((2, 3))
        return total.transpose(1, 2)


class Secants:
    """Hooks that make the gradients of queries and keys, on their way back, agree with their exact effects.

    ``change``: source − base of q and k by hook name. See ``"atp-carried"`` in `interp.circuits.attribution.nodes`.
    """

    def __init__(self, rerun: Rerun, change: dict[str, Change]):
        self.rerun, self.change = rerun, change
        self.grads: dict[int, Change] = {}  # of z, as a backward pass comes by
        self.moved: dict[int, Change] = {}

    def hooks(self) -> list[tuple[str, Any]]:
        """For a forward through which gradients are taken."""
        layers = sorted({int(name.split(".")[1]) for name in self.change})
        found: list[tuple[str, Any]] = []
        for layer in layers:
            found.append((COMPONENTS["z"].hook.format(layer=layer), self._on_the_way_back(self._note(layer))))
            for component in "qk":
                name = COMPONENTS[component].hook.format(layer=layer)
                found.append((name, self._on_the_way_back(self._turn(name, layer, component))))
        return found

    def _on_the_way_back(self, function: Callable[[Tensor], Tensor | None]) -> Any:
        def hook(x: Tensor, hook: object) -> Tensor | None:
            if not x.requires_grad:
                return None
            x = x.clone()
            x.register_hook(function)
            return x

        return hook

    def _note(self, layer: int) -> Callable[[Tensor], None]:
        return lambda grads: self.grads.__setitem__(layer, grads)

    def _turn(self, name: str, layer: int, component: str) -> Callable[[Tensor], Tensor]:
        def turn(slope: Tensor) -> Tensor:
            change = self.change[name]
            size = change.square().sum(-1)
            if component == "k":
                exact = self.rerun.each_key(layer, self.grads[layer])
            else:
                if layer not in self.moved:
                    self.moved[layer] = self.rerun.queries(layer)
                exact = (self.moved[layer] * self.grads[layer]).sum(-1)
            error = (exact - (slope * change).sum(-1)) / size
            known = size > (RELATIVE**2) * size.amax()  # of what hardly differs a secant would be rounding
            return slope + torch.where(known, error, 0.0).to(slope)[..., None] * change

        return turn


def _one_key(
    s: Float[Tensor, "*rows n"], new: Float[Tensor, "*rows n"], slope: Float[Tensor, "*rows n"], sink: Tensor | None
) -> Float[Tensor, "*rows n"]:
    """Change of Σ softmax(s) · slope when one score becomes ``new``, for each key. Hidden keys have s = −inf."""
    lse = _lse(s, sink)
    p = (s - lse[..., None]).exp()
    mean = (p * slope).sum(-1, keepdim=True)
    others, others_mean = lse[..., None] + torch.log1p(-p), (mean - p * slope) / (1 - p)
    best = s.argmax(-1, keepdim=True)  # the only key that can hold more than half
    rest = s.scatter(-1, best, float("-inf"))
    rest_lse = _lse(rest, sink)[..., None]
    rest_mean = ((rest - rest_lse.clamp(min=torch.finfo(s.dtype).min)).exp() * slope).sum(-1, keepdim=True)
    others, others_mean = others.scatter(-1, best, rest_lse), others_mean.scatter(-1, best, rest_mean)
    share = torch.sigmoid(new - others)
    return torch.where(new == float("-inf"), 0.0, share * slope + (1 - share) * others_mean - mean)


def _lse(s: Float[Tensor, "*rows n"], sink: Tensor | None) -> Float[Tensor, "*rows"]:
    lse = s.logsumexp(-1)
    return lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))


def _sinks(call: AttentionCall, like: Tensor) -> Tensor | None:
    """A learned score that takes attention and gives nothing, [1, kv_heads, group, 1]."""
    return None if call.sinks is None else call.sinks.to(like).reshape(1, call.k.shape[1], -1, 1)


def _scores(call: AttentionCall, k: Tensor, rows: range) -> Float[Tensor, "batch kv_heads group rows n"]:
    """Scores of some rows of queries, −inf where hidden: what `dense_attention` feeds its softmax."""
    kv_heads, n = k.shape[1], k.shape[2]
    q = call.q[:, :, rows.start : rows.stop].unflatten(1, (kv_heads, -1))
    s = torch.einsum("bkgmd,bknd->bkgmn", q.to(_wide(q)), k.to(_wide(k))) * call.scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        bias = call.bias.expand(-1, call.q.shape[1], call.q.shape[2], n)[:, :, rows.start : rows.stop]
        s = s + bias.unflatten(1, (kv_heads, -1)).to(s)
    behind = torch.arange(rows.start, rows.stop, device=s.device)[:, None] + n - call.q.shape[2]
    behind = behind - torch.arange(n, device=s.device)
    hidden = behind < 0 if call.causal else torch.zeros_like(behind, dtype=torch.bool)
    if call.window is not None:
        hidden = hidden | (behind.abs() >= call.window)
    return s.masked_fill(hidden, float("-inf"))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row(call: AttentionCall, row: int) -> AttentionCall:
    one = slice(row, row + 1)
    bias = call.bias if call.bias is None or call.bias.shape[0] == 1 else call.bias[one]
    return replace(call, q=call.q[one], k=call.k[one], v=call.v[one], bias=bias)


@torch.no_grad()
def check_heads_apart(model: Model, ids: Sequence[int], components: Sequence[str]) -> None:
    """Raise ModelError where the q or k of a head, as hooks have them, do not reach that head's attention alone.

    One forward per component: head 0 of the first layer is changed, and no other head's may be.
    """
    layer = model.attention_layers[0]
    with capture_calls(model) as kept:
        model.last_logits(torch.tensor([list(ids)], device=model.device))
        before = kept[layer]
        want = {"q": before.q, "k": before.k, "z": before.q[..., :1].expand(*before.q.shape[:3], before.v.shape[-1])}
        names = {c: COMPONENTS[c].hook.format(layer=layer) for c in want}
        seen = capture(model, [ids], list(names.values()))
        if any(seen[names[c]].shape != x.transpose(1, 2).shape for c, x in want.items()):
            raise ModelError(
                f"{model.name}: its hooks of q, k and z do not carry what attention reads and gives (latent "
                "attention), so that the QK fix is not defined: take AtP without it"
            )
        for component in components:

            def nudge(x: Tensor, hook: object) -> Tensor:
                x = x.clone()
                x[:, :, 0] += x[:, :, 0].roll(1, -1) + 1
                return x

            with hooks(model, (COMPONENTS[component].hook.format(layer=layer), nudge)):
                model.last_logits(torch.tensor([list(ids)], device=model.device))
            change = (getattr(kept[layer], component) - getattr(before, component)).abs().amax((0, 2, 3))
            if not change[0] > 0 or (change[1:] > 0).any():
                raise ModelError(
                    f"{model.name}: what a head's {component} hook carries does not reach that head's attention alone "
                    "(it is normed over all heads, or rebuilt), so that the QK fix is not defined: take AtP without it"
                )
