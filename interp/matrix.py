"""The architecture matrix: is a model, routed through headstats, still the model that Hugging Face wrote?

Each check runs one tiny random-weight family of `interp.zoo.architectures` three ways: ours, Hugging Face's
eager attention, and TransformerLens' own path. It answers with the largest difference, relative to the size of
what it compares. `interp doctor --architectures` prints the table; the README shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import headstats
import pandas as pd
import torch
from torch import Tensor

from interp.dense import AttentionCall
from interp.errors import InterpError
from interp.instrument import attend
from interp.loading import Weights, wrap
from interp.model import Model, load
from interp.zoo.architectures import DECODERS as FAMILIES
from interp.zoo.architectures import tiny_hf
from interp.zoo.tokenizer import SPECIALS, word_tokenizer

ALLOWED = 1e-4  # largest difference, relative to the largest value: float32's share in models of a few layers
WORDS = tuple(f"w{i}" for i in range(100 - len(SPECIALS)))
HIDDEN = -1e30  # masked scores hold "very negative", whose value is a convention


class DoesNotApply(Exception):
    """A check that means nothing for a family; the text says why."""


@dataclass(frozen=True)
class Verdict:
    """What one check found. ``gap``: largest relative difference; ``note``: why it failed or does not apply."""

    check: str
    gap: float = 0.0
    note: str = ""
    applies: bool = True

    @property
    def passed(self) -> bool:
        """Whether the check found nothing wrong (also if it does not apply)."""
        return not self.applies or self.gap <= ALLOWED

    def __str__(self) -> str:
        return ("✓" if self.passed else "✗") if self.applies else "–"


class Case:
    """One family's models, each built when a check first asks for it; the same weights in all of them."""

    def __init__(self, family: str):
        self.family = family
        self.tokenizer = word_tokenizer(WORDS)

    @cached_property
    def eager(self) -> Any:
        """Hugging Face's eager attention, in float64 where the family has it."""
        return tiny_hf(self.family)

    @cached_property
    def eager32(self) -> Any:
        """The same in float32: with padding, transformers' eager float64 mask overflows its float32 softmax."""
        return tiny_hf(self.family, torch.float32)

    @cached_property
    def ours(self) -> Model:
        """Through headstats, in float64 where the family has it."""
        return load(tiny_hf(self.family), tokenizer=self.tokenizer)

    @cached_property
    def ours32(self) -> Model:
        """Through headstats, in float32."""
        return load(tiny_hf(self.family, torch.float32), tokenizer=self.tokenizer)

    @cached_property
    def theirs(self) -> Any:
        """A TransformerBridge as TransformerLens makes it."""
        return wrap(Weights(f"tiny {self.family}", tiny_hf(self.family), self.tokenizer))[0]

    def tokens(self, batch: int = 3, length: int = 11) -> Tensor:
        """Random token ids that are no special ones, the same every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(len(SPECIALS), 100, (batch, length), generator=generator)

    def calls(self) -> list[AttentionCall]:
        """What each layer asked of the kernel in one forward."""
        seen: list[AttentionCall] = []

        def note(call: AttentionCall) -> Tensor:
            seen.append(call)
            return attend(call).out

        with torch.no_grad(), self.ours.instrument.handled_by(note):
            self.ours(self.tokens())
        return seen

    def features(self) -> list[str]:
        """What this family's attention has beside plain causal softmax: what negative controls can break."""
        calls = self.calls()
        has = {
            "grouped": any(c.k.shape[1] < c.q.shape[1] for c in calls),
            "window": any(c.window is not None for c in calls),
            "softcap": any(c.softcap is not None for c in calls),
            "sinks": any(c.sinks is not None for c in calls),
            "bias": any(c.bias is not None for c in calls),
            "own scale": any(abs(c.scale * c.q.shape[-1] ** 0.5 - 1) > 1e-6 for c in calls),
        }
        return [name for name, there in has.items() if there]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value of ``theirs``; infinite for NaN or another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    return gap if gap == gap else float("inf")


# ---------------------------------------------------------------- logits


@torch.no_grad()
def logits(case: Case) -> float:
    """Logits of a batch equal eager's."""
    tokens = case.tokens()
    return max(
        difference(case.ours(tokens), case.eager(tokens).logits),
        difference(case.ours32(tokens), case.eager32(tokens).logits),
    )


def left_padding(case: Case) -> float:
    """Logits of a batch padded on the left equal eager's at real tokens."""
    return _padding(case, "left")


def right_padding(case: Case) -> float:
    """Logits of a batch padded on the right equal eager's at real tokens."""
    return _padding(case, "right")


@torch.no_grad()
def _padding(case: Case, side: str) -> float:
    real = torch.ones(3, 11, dtype=torch.long)
    for row, pad in enumerate((0, 3, 7)):
        real[row, slice(0, pad) if side == "left" else slice(11 - pad, 11)] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": case.tokens(), "attention_mask": real, "position_ids": positions}
    theirs = case.eager32(**inputs).logits[real.bool()]
    return difference(case.ours32.bridge.original_model(**inputs).logits[real.bool()], theirs)


@torch.no_grad()
def packed(case: Case) -> float:
    """Several sequences in one row, told apart by position_ids alone, do not see each other."""
    tokens, lengths = case.tokens(1), (4, 2, 5)
    parts = tokens.split(lengths, dim=1)
    inputs = {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    alone = torch.cat([case.eager32(part).logits for part in parts], dim=1)
    theirs = case.eager32(**inputs, use_cache=False).logits
    gap = difference(case.ours32.bridge.original_model(**inputs, use_cache=False).logits, theirs)
    if gap <= ALLOWED < difference(theirs, alone):
        raise DoesNotApply("Hugging Face does not keep packed sequences of this family apart; nor do we")
    return max(gap, difference(theirs, alone))


@torch.no_grad()
def cached(case: Case) -> float:
    """Decoding token by token with a key/value cache gives the logits of one forward.

    Of a hybrid it gives those of Hugging Face's own steps: a recurrent layer may step otherwise than it scans.
    """
    from transformers import DynamicCache

    tokens = case.tokens(2, 9)
    pieces = tokens.split([4, 1, 1, 1, 1, 1], dim=1)

    def stepped(model: Any) -> Tensor:
        cache = DynamicCache(config=case.eager.config)
        steps = [model(piece, past_key_values=cache, use_cache=True) for piece in pieces]
        return torch.cat([getattr(step, "logits", step) for step in steps], 1)

    hybrid = FAMILIES[case.family].kind == "hybrid"
    return difference(stepped(case.ours), stepped(case.eager) if hybrid else case.eager(tokens).logits)


def _halve_head(x: Tensor, hook: Any) -> Tensor:
    """A hook on q, v or z [batch, position, heads, d_head] that halves head 1 (of v: the only one, if there is one)."""
    x = x.clone()
    x[:, :, min(1, x.shape[2] - 1)] *= 0.5
    return x


def _halve_square(x: Tensor, hook: Any) -> Tensor:
    """A hook on scores or pattern [batch, heads, query, key] that halves head 1."""
    x = x.clone()
    x[:, 1] *= 0.5
    return x


@torch.no_grad()
def generation(case: Case) -> float:
    """``generate`` on a left-padded batch with a hook in place: TransformerLens' logits without cache or padding."""
    tokens, steps = case.tokens(2, 9), 4
    real = torch.ones_like(tokens)
    real[1, :3] = 0
    edits = [("blocks.1.attn.hook_z", _halve_head)]
    with case.ours32.bridge.hooks(fwd_hooks=edits):
        made = case.ours32.bridge.original_model.generate(
            input_ids=tokens, attention_mask=real, do_sample=False, max_new_tokens=steps, min_new_tokens=steps,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    worst = 0.0
    for row, pad in enumerate((0, 3)):
        for step in range(steps):
            so_far = made.sequences[row : row + 1, pad : tokens.shape[1] + step]
            expected = case.theirs.run_with_hooks(so_far, fwd_hooks=edits)[0, -1]
            worst = max(worst, difference(made.logits[step][row], expected))
    return worst


# ---------------------------------------------------------------- hooks, edits, gradients


@torch.no_grad()
def hooks(case: Case) -> float:
    """Every hook that TransformerLens fires on its own path fires, with the same value; pattern and scores too."""
    tokens = case.tokens()
    _, expected = case.theirs.run_with_cache(tokens, return_cache_object=False)
    _, got = case.ours.bridge.run_with_cache(tokens, return_cache_object=False)
    if silent := sorted(set(expected) - set(got)):
        raise InterpError(f"{len(silent)} hooks do not fire: {', '.join(silent[:3])}")
    worst, where = 0.0, ""
    for name, value in expected.items():
        ours = got[name]
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            continue
        if name.endswith("hook_attn_scores"):
            if torch.equal(value, expected[name.replace("attn_scores", "pattern")]):
                continue  # on models it does not re-implement, TransformerLens shows the pattern as the scores
            seen = (value > HIDDEN) & (ours > HIDDEN) & torch.ones(value.shape[-2:], dtype=torch.bool).tril()
            value, ours = value.masked_fill(~seen, 0), ours.masked_fill(~seen, 0)
        worst, where = max((worst, where), (difference(ours, value), name))
    if worst > ALLOWED:
        raise InterpError(f"{where} differs by {worst:.1e}")
    return worst


@torch.no_grad()
def edits(case: Case) -> float:
    """Edits of scores, pattern, z and v change the logits as they do in TransformerLens."""
    tokens = case.tokens()
    plain = {"ours": case.ours(tokens), "theirs": case.theirs(tokens)}
    # Halving a head's scores is halving its queries; halving its pattern is halving its output.
    same = {"attn_scores": "q", "pattern": "z", "z": "z", "v": "v"}
    worst = 0.0
    for name, equal in same.items():
        edit = _halve_head if name == equal else _halve_square
        ours = case.ours.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.attn.hook_{name}", edit)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where TransformerLens discards the edit, it warns
            theirs = case.theirs.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.attn.hook_{name}", edit)])
        if difference(theirs, plain["theirs"]) < 1e-9:  # TransformerLens fires this hook too late to matter
            theirs = case.theirs.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.attn.hook_{equal}", _halve_head)])
        if difference(ours, plain["ours"]) < 1e-7:
            raise InterpError(f"an edit of hook_{name} has no effect")
        worst = max(worst, difference(ours, theirs))
    return worst


def gradients(case: Case) -> float:
    """Gradients of the weights equal eager's, on the kernel and with a dense layer."""
    tokens = case.tokens(2, 8)
    case.eager.zero_grad()
    case.eager(tokens).logits[:, -1].logsumexp(-1).sum().backward()
    expected = {n: p.grad for n, p in case.eager.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(g.abs().max() for g in expected.values())
    worst, model = 0.0, case.ours.bridge.original_model
    # TransformerLens splits fused projections into new weights; the others keep their names, more or less.
    same = {n.replace("._original_component", ""): p for n, p in model.named_parameters()}
    shared = [n for n in expected if n in same and same[n].shape == expected[n].shape]
    for hooked in ([], [("blocks.1.attn.hook_pattern", lambda x, hook: x)]):
        model.zero_grad()
        with case.ours.bridge.hooks(fwd_hooks=hooked):
            case.ours(tokens)[:, -1].logsumexp(-1).sum().backward()
        reached = [n for n in shared if same[n].grad is not None]  # not the fused ones that were split
        if len(reached) < len(expected) / 2:
            raise InterpError(f"gradients reach only {len(reached)} of {len(expected)} weights with a known name")
        for name in reached:
            value = expected[name]
            worst = max(worst, float((same[name].grad - value).abs().max() / value.abs().max().clamp_min(floor)))
    model.zero_grad()
    return worst


# ---------------------------------------------------------------- statistics and calls


@torch.no_grad()
def statistics(case: Case) -> float:
    """Every statistic equals the float64 reference on the dense pattern, which is the one that hook_pattern shows."""
    text = " ".join(f"w{i}" for i in (5, 9, 5, 77, 12, 9, 5, 31, 2))
    model, tokens = case.ours, torch.tensor([case.ours.coder.encode(text)])
    spec = headstats.StatSpec.all()
    ours = model.attention_stats(text, spec)
    seen: list[AttentionCall] = []
    with model.instrument.handled_by(lambda call: (seen.append(call), attend(call).out)[1]):
        model(tokens)
    _, cache = model.bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    worst = 0.0
    for call in seen:
        wide = {f: getattr(call, f).double() for f in ("q", "k", "v")}
        exact = attend(replace(call, **wide), spec=spec, backend="reference").stats.as_dict()
        n, heads = call.k.shape[2], call.k.shape[1]
        identity = torch.eye(n, dtype=torch.float64).expand(1, heads, n, n)
        pattern = attend(replace(call, **{**wide, "v": identity}), backend="reference").out
        worst = max(worst, difference(cache[f"blocks.{call.layer}.attn.hook_pattern"], pattern))
        for name, arrays in ours.values.items():
            got, value = torch.as_tensor(arrays[0][call.layer]), exact[name]
            assert isinstance(value, Tensor)
            scale = value.abs().max().clamp_min(1.0)
            worst = max(worst, float((got.double() - value[0].double()).abs().max() / scale))
    return worst


@torch.no_grad()
def calls(case: Case) -> float:
    """Each layer's attention arrives exactly once a forward, on the kernel; only a hooked layer goes dense."""
    model = case.ours
    for hooked, dense in ((None, ()), (1, (1,))):
        model.instrument.layers.clear()
        name = f"blocks.{hooked}.attn.hook_pattern"
        with model.bridge.hooks(fwd_hooks=[] if hooked is None else [(name, lambda x, hook: None)]):
            model(case.tokens())
        for layer in model.attention_layers:
            record = model.instrument.record(layer)
            if record.calls != 1:
                raise InterpError(f"layer {layer} called the kernel {record.calls} times in one forward")
            if ("dense" in record.backends) != (layer in dense):
                raise InterpError(f"layer {layer} ran on {', '.join(record.backends)}")
    return 0.0


CHECKS: dict[str, Callable[[Case], float]] = {
    "logits": logits,
    "left padding": left_padding,
    "right padding": right_padding,
    "packed": packed,
    "cache": cached,
    "generate": generation,
    "hooks": hooks,
    "edits": edits,
    "gradients": gradients,
    "statistics": statistics,
    "calls": calls,
}


def run_check(case: Case, name: str) -> Verdict:
    """One check of one family; whatever goes wrong in it is a failed verdict that says so."""
    try:
        return Verdict(name, CHECKS[name](case))
    except DoesNotApply as reason:
        return Verdict(name, note=str(reason), applies=False)
    except Exception as error:
        return Verdict(name, float("inf"), f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Row:
    """All verdicts on one family."""

    family: str
    model: str
    features: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(v.passed for v in self.verdicts)

    def markdown(self) -> str:
        """One line of the README's table."""
        cells = (self.family, self.model, ", ".join(self.features) or "plain", *map(str, self.verdicts))
        return f"| {' | '.join(cells)} |"


def examine_family(family: str, case: Case | None = None) -> Row:
    """Every check of a family, on ``case`` if its models are built already."""
    case = case or Case(family)
    verdicts = tuple(run_check(case, name) for name in CHECKS)
    return Row(family, type(case.eager).__name__, tuple(case.features()), verdicts)


@dataclass(frozen=True)
class Matrix:
    """Verdicts on many families; prints itself as a table."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(row.passed for row in self.rows)

    def frame(self) -> pd.DataFrame:
        """One row per family and check: passed, applies, the largest relative difference, and a note."""
        return pd.DataFrame(
            {"family": r.family, "model": r.model, "check": v.check, "passed": v.passed, "applies": v.applies,
             "gap": v.gap, "note": v.note}
            for r in self.rows
            for v in r.verdicts
        )  # fmt: skip

    def markdown(self) -> str:
        """The table that the README shows."""
        return "\n".join([*header(), *(row.markdown() for row in self.rows)])

    def __str__(self) -> str:
        width = max([len("family"), *(len(r.family) for r in self.rows)])
        lines = [f"{'family':<{width}}  {'  '.join(CHECKS)}  largest difference"]
        for row in self.rows:
            cells = "  ".join(f"{v!s:^{len(v.check)}}" for v in row.verdicts)
            lines.append(f"{row.family:<{width}}  {cells}  {max(v.gap for v in row.verdicts):.0e}")
        notes = [f"{r.family}, {v.check} {v}: {v.note}" for r in self.rows for v in r.verdicts if v.note]
        return "\n".join([*lines, *notes])


def header() -> list[str]:
    """The two head lines of the table in Markdown."""
    names = ("family", "model", "attention", *CHECKS)
    return [f"| {' | '.join(names)} |", f"|---|---|---|{':-:|' * len(CHECKS)}"]


def architectures(families: Iterable[str] | None = None, say: Callable[[str], object] | None = None) -> Matrix:
    """Examine the families named (default: all), one after the other; ``say`` hears of each as it is done."""
    rows = []
    for family in FAMILIES if families is None else families:
        if family not in FAMILIES:
            raise InterpError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
        rows.append(examine_family(family))
        if say is not None:
            say(f"{family}: {'ok' if rows[-1].passed else 'FAILED'}")
    return Matrix(tuple(rows))
