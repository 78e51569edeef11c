"""Small models with a circuit set by hand, so that it is exactly known.

They are built in under a second, without a download. They are the ground truth for every recipe: `Known.truth` and
`Known.truth_resid` say where an effect must exist; everywhere else it must be zero. Their prompts are strings of words,
one token per word, after ``<bos>``: position 0 is ``<bos>``, position 1 the first word.

How the pair sets make ablation exact. An effect of ablation is (ablated − clean)/(corrupt − clean) in logit
difference, so it is 1 when the ablated model is as undecided as the corrupt run, whose logit difference is 0:

* *Zero ablation* is exact for each example: without its head the model predicts nothing.
* *Mean ablation* writes the mean of all answers. In a set, the foil of each pair is the answer of the next
  one (cyclically), so answers and foils weigh the same in the mean: exact for each example from 2 pairs on.
  A single pair is its own mean, and mean ablation then does nothing.
* *Resample ablation* takes the activation of another example. All answers in a set differ, so the activation taken
  favours neither answer nor foil: effect 1. The exception is the next pair, whose answer is the foil: effect 2. This
  exception cannot be removed: averaged over all examples that can be drawn (the example itself included), resampling
  equals the mean, and drawing the example itself has effect 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from interp.errors import TaskError
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import Fact, PromptPair
from interp.sites import Site, Sites
from interp.zoo.tokenizer import BOS, LETTERS, SPECIALS, SYLLABLES

if TYPE_CHECKING:
    import torch

    from interp.circuits import Circuit
    from interp.model.model import Model
    from interp.model.native import TransformerBridge

MAX_PAIRS = 72
"""Largest number of pairs in one set of a hand-set model: with more, answers would have to repeat."""

PREVIOUS_TOKEN = Site("z", 0, 1)
INDUCTION = Site("z", 1, 2)
COPY = Site("z", 1, 2)

WORDS = (*LETTERS, *SYLLABLES[:98])
_TRIGGERS, _CONTENT = SYLLABLES[:24], (*LETTERS, *SYLLABLES[24:98])
_PLAIN = (*LETTERS, *SYLLABLES[:14])
_MARKED = tuple(s.upper() for s in SYLLABLES[:83])
_END = "?"


@dataclass(frozen=True)
class Known:
    """A model with its ground truth.

    ``pairs(n=32, seed=0)`` makes prompt pairs that the model solves; ``facts(n=32, seed=0)`` makes the same as facts
    whose subject is the word that matters. ``truth``: the heads that carry the answer (z sites, all positions) and MLPs
    (mlp_out); empty for the random model. ``truth_resid(pair)``: the resid_pre and resid_post sites through which all
    of the difference between clean and corrupt flows, with positions. ``attends(pair)``: for each planted head, the key
    position on which each query position of the clean prompt puts at least 0.999 of its attention.

    ``circuit``: the edges along which all of the difference between clean and corrupt flows. Methods that compare the
    two can find these: each has a non-zero effect (in a set of at least 12 pairs, which has every kind of pair), every
    other edge has none. ``mechanism``: these edges, and those that carry what is equal in both (positions, the word to
    look for). The model run with these edges alone, and 0 along all others, answers as before, and needs each of them.
    """

    name: str
    bridge: TransformerBridge = field(repr=False)
    truth: Sites
    _pairs: Callable[[int, Random], list[PromptPair]] = field(repr=False)
    _resid: Callable[[PromptPair], Sites] = field(repr=False)
    _attends: Callable[[PromptPair], Mapping[Site, list[int]]] = field(repr=False)
    _max_pairs: int | None = field(default=MAX_PAIRS, repr=False)
    carries: Sequence[str] = ()
    holds: Sequence[str] = ()
    roles: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> Model:
        """The bridge as an `interp.Model`."""
        from interp.model.load_model import load

        return load(self.bridge)

    @cached_property
    def circuit(self) -> Circuit:
        """Ground truth for methods that compare clean and corrupt, with roles.

        Raises TaskError for the random model.
        """
        return self._circuit(self.carries)

    @cached_property
    def mechanism(self) -> Circuit:
        """`circuit` and the edges that carry what is equal in clean and corrupt.

        Raises TaskError for the random model.
        """
        return self._circuit([*self.carries, *self.holds])

    def _circuit(self, edges: Sequence[str]) -> Circuit:
        from interp.circuits import Circuit

        if not edges:
            raise TaskError(f"zoo.{self.name} has no circuit: its weights are random")
        circuit = Circuit.of(self.model, edges, roles={Site.parse(s): role for s, role in self.roles.items()})
        circuit.provenance["method"] = "set by hand"
        return circuit

    def pairs(self, n: int = 32, seed: int = 0) -> PairSet:
        """Make ``n`` pairs, the same ones for the same seed.

        Raises TaskError if ``n`` is not possible.
        """
        if n < 1 or (self._max_pairs is not None and n > self._max_pairs):
            most = f" and at most {self._max_pairs} (its answers must differ)" if self._max_pairs else ""
            raise TaskError(f"zoo.{self.name}: a set has at least 1 pair{most}; n={n} was asked for")
        return PairSet(self._pairs(n, Random(f"{self.name}/{seed}")), task=f"zoo.{self.name}", seed=seed)

    def facts(self, n: int = 32, seed: int = 0) -> list[Fact]:
        """Make the clean prompts of `pairs` as facts.

        The subject is the first word that the corrupt prompt changes. For causal tracing, read the *pooled* effect by
        role: noise of three standard deviations on a one-hot embedding breaks only some of the runs. Much stronger
        noise reaches every channel of the residual stream, and the subject's own position then matters beyond what
        `truth_resid` says. Raises TaskError if that word also occurs earlier in the prompt, so that a subject does not
        identify it.
        """
        facts = []
        for pair in self.pairs(n, seed):
            clean, corrupt = pair.clean.split(), pair.corrupt.split()
            place = next(i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b)
            if clean.index(clean[place]) < place:
                raise TaskError(f"zoo.{self.name}: {clean[place]!r} stands twice in {pair.clean!r}: use pairs")
            facts.append(Fact(pair.clean, clean[place], pair.answer, occurrence=0))
        return facts

    def truth_resid(self, pair: PromptPair) -> Sites:
        """Sites of the difference, layer by layer: patching any one of them has effect 1."""
        return self._resid(pair)

    def attends(self, pair: PromptPair) -> Mapping[Site, list[int]]:
        """Key position that each query position attends to, for each planted head.

        ``<bos>`` is 0.
        """
        return self._attends(pair)


def induction(*, dtype: torch.dtype | None = None) -> Known:
    """Build a two-layer attention-only model that completes "… a b … a" with "b".

        known = interp.zoo.induction()
        effects = interp.patch(known.model, known.pairs(8), known.model.sites("z"))
        effects.summary(["layer", "head"])  # effect 1 at L0H1 and L1H2, which are known.truth, 0 elsewhere

    The mechanism is that of Elhage et al. (2021) and Olsson et al. (2022) and nothing else.
    L0H1 attends to the previous token and writes its name; L1H2 attends to the token whose predecessor is
    the present token and copies it, or attends to ``<bos>`` if no token matches. The other six heads attend at random
    and write where nothing reads. In the corrupt prompt the first "a" is another word, which leaves both
    planted heads without a match. Without one the model is undecided (all logits 0), with one it gives "b" 20 logits.
    ``dtype``: torch.float32 (default) or torch.float64.
    """
    import torch

    from interp.zoo.planted import MATCH, SINK, Planted

    n, n_ctx = len(SPECIALS) + len(WORDS), 64
    channels = {"tok": n, "pos": n_ctx, "prev": n, "out": n, "junk": 64}
    build = Planted("induction", WORDS, channels, n_layers=2, n_heads=4, d_head=n, dtype=dtype)
    back = torch.diag(torch.ones(n_ctx - 1), 1)  # [key position, query position]: one to the left
    back[0, 0] = 1.0  # <bos> has no token to its left
    everything, words, bos = torch.eye(n), torch.eye(n), torch.zeros(n, n)
    words[: len(SPECIALS)] = 0
    bos[build.ids[BOS], build.ids[BOS]] = 1.0
    build.plant(
        0, 1, q={"pos": MATCH * back}, k={"pos": torch.eye(n_ctx)},
        v={"tok": everything}, o={"prev": everything},
    )  # fmt: skip
    build.plant(
        1, 2, q={"tok": MATCH * words}, q_bias=SINK * bos[build.ids[BOS]],
        k={"prev": words, "tok": bos}, v={"tok": words}, o={"out": everything},
    )  # fmt: skip
    build.fill()
    return Known(
        "induction", build.bridge, Sites([PREVIOUS_TOKEN, INDUCTION]), _induction_pairs, _induction_resid,
        _induction_attends,
        carries=("resid_pre.L0 -> v.L0H1", "z.L0H1 -> k.L1H2", "z.L1H2 -> resid_post.L1"),
        holds=("resid_pre.L0 -> q.L0H1", "resid_pre.L0 -> k.L0H1", "resid_pre.L0 -> q.L1H2", "resid_pre.L0 -> v.L1H2"),
        roles={"z.L0H1": "previous token", "z.L1H2": "induction"},
    )  # fmt: skip


def _induction_pairs(n: int, rng: Random) -> list[PromptPair]:
    """Nine words: trigger, answer after it, foil, and the trigger last.

    Trigger and foil are at odd positions. No two pairs share both trigger and position, and triggers have no other use.
    So the output of the previous-token head in another example never directs the induction head to answer or foil.
    """
    answers = rng.sample(_CONTENT, n)
    places = rng.sample([(t, p) for t in _TRIGGERS for p in (1, 3, 5)], n)
    pairs = []
    for i, (trigger, p) in enumerate(places):
        answer = answers[i]
        foil = answers[(i + 1) % n] if n > 1 else rng.choice([w for w in _CONTENT if w != answer])
        *fill, stranger = rng.sample([w for w in _CONTENT if w not in (answer, foil)], 6)
        words: dict[int, str] = {p: trigger, p + 1: answer, 9: trigger}
        words[rng.choice([q for q in (1, 3, 5, 7) if q != p])] = foil
        words = {q: words[q] if q in words else fill.pop() for q in range(1, 10)}
        corrupt = {**words, p: stranger}
        clean = " ".join(words.values())
        starts = [0]
        for word in words.values():
            starts.append(starts[-1] + len(word) + 1)
        spans = {name: (starts[q - 1], starts[q] - 1) for name, q in (("A1", p), ("B1", p + 1), ("A2", 9))}
        pairs.append(PromptPair(clean, " ".join(corrupt.values()), f" {answer}", f" {foil}", spans))
    return pairs


def _first_trigger(pair: PromptPair) -> tuple[int, int]:
    """Positions of the first occurrence of the last word, and of the last word.

    ``<bos>`` is 0.
    """
    words = pair.clean.split()
    return words.index(words[-1]) + 1, len(words)


def _induction_resid(pair: PromptPair) -> Sites:
    p, end = _first_trigger(pair)
    return Sites([
        Site("resid_pre", 0, position=p), Site("resid_post", 0, position=p + 1),
        Site("resid_pre", 1, position=p + 1), Site("resid_post", 1, position=end),
    ])  # fmt: skip


def _induction_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    p, end = _first_trigger(pair)
    return {PREVIOUS_TOKEN: [0, *range(end)], INDUCTION: [0] * end + [p + 1]}


def one_head(*, dtype: torch.dtype | None = None) -> Known:
    """Build three layers of four heads, of which L1H2 alone carries the answer.

    Prompts are plain words with one marked (upper-case) word among them, and end in "?", at which L1H2 attends
    to the marked word and copies it. Every other head is active, attends at random, and writes where nothing
    reads. In the corrupt prompt another marked word, neither answer nor foil, takes its place.
    ``dtype``: torch.float32 (default) or torch.float64.
    """
    import torch

    from interp.zoo.planted import MATCH, SINK, Planted

    words = (*_PLAIN, *_MARKED, _END)
    n = len(SPECIALS) + len(words)
    channels = {"tok": n, "pos": 32, "out": n, "junk": 96}
    build = Planted("one_head", words, channels, n_layers=3, n_heads=4, d_head=n, dtype=dtype)
    marked = torch.zeros(n)
    marked[[build.ids[w] for w in _MARKED]] = 1.0
    asks, begins = (torch.eye(n)[build.ids[w]] for w in (_END, BOS))
    build.plant(
        1, 2, q={"tok": MATCH * asks[None]}, q_bias=torch.tensor([0.0, SINK]),
        k={"tok": torch.stack([marked, begins])}, v={"tok": torch.diag(marked)}, o={"out": torch.eye(n)},
    )  # fmt: skip
    build.fill()
    return Known(
        "one_head", build.bridge, Sites([COPY]), _one_head_pairs, _one_head_resid, _one_head_attends,
        carries=("resid_pre.L0 -> v.L1H2", "z.L1H2 -> resid_post.L2"),
        holds=("resid_pre.L0 -> q.L1H2", "resid_pre.L0 -> k.L1H2"), roles={"z.L1H2": "copies the marked word"},
    )  # fmt: skip


def _one_head_pairs(n: int, rng: Random) -> list[PromptPair]:
    # Words that occur in corrupt prompts only: resampling from these favours no answer and no foil.
    strangers, candidates = _MARKED[:11], _MARKED[11:]
    answers = rng.sample(candidates, n)
    pairs = []
    for i, answer in enumerate(answers):
        foil = answers[(i + 1) % n] if n > 1 else rng.choice([w for w in candidates if w != answer])
        words = rng.sample(_PLAIN, 7)
        place = rng.randrange(7)
        before, after = words[:place], [*words[place + 1 :], _END]
        clean, corrupt = (" ".join([*before, w, *after]) for w in (answer, rng.choice(strangers)))
        start = len(" ".join([*before, ""]))
        spans = {"marked": (start, start + len(answer)), "END": (len(clean) - 1, len(clean))}
        pairs.append(PromptPair(clean, corrupt, f" {answer}", f" {foil}", spans))
    return pairs


def _one_head_place(pair: PromptPair) -> tuple[int, int]:
    words = pair.clean.split()
    return next(i for i, w in enumerate(words, 1) if w.isupper()), len(words)


def _one_head_resid(pair: PromptPair) -> Sites:
    marked, end = _one_head_place(pair)
    before = [("resid_pre", 0), ("resid_post", 0), ("resid_pre", 1)]
    after = [("resid_post", 1), ("resid_pre", 2), ("resid_post", 2)]
    return Sites([
        *(Site(c, layer, position=marked) for c, layer in before),
        *(Site(c, layer, position=end) for c, layer in after),
    ])  # fmt: skip


def _one_head_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    marked, end = _one_head_place(pair)
    return {COPY: [0] * end + [marked]}


def random(seed: int = 0, *, dtype: torch.dtype | None = None) -> Known:
    """Build a randomly initialised transformer: the null control.

    It has four layers of eight heads with MLPs. Its pairs differ in one to three random words; answer and foil are
    drawn independently of the prompts and of the weights. Answer and foil swapped are then equally likely, and the swap
    flips the sign of every raw change in logit difference. So the *raw* mean effect of each site has expectation
    exactly zero, and its interval covers zero as often as its level says. This does not hold on the recovery scale: the
    swap flips its numerator and denominator together, and a head of any model passes on some share of any difference.
    The pooled ratio (mean raw change over mean gap) has a zero-mean numerator, but its denominator is zero-mean noise
    too: read its interval as "undetermined", and test the null on ``raw``.
    """
    from interp.zoo.planted import word_level_bridge

    config = {
        "d_model": 64, "d_head": 8, "n_heads": 8, "n_layers": 4, "d_mlp": 256, "act_fn": "gelu", "n_ctx": 64,
        "d_vocab": len(SPECIALS) + len(WORDS), "normalization_type": "LN", "seed": seed,
        "positional_embedding_type": "standard",
    }  # fmt: skip
    bridge, no_sites = word_level_bridge("random", config, WORDS, dtype), Sites([])
    return Known("random", bridge, no_sites, _random_pairs, lambda _: no_sites, lambda _: {}, _max_pairs=None)


def _random_pairs(n: int, rng: Random) -> list[PromptPair]:
    pairs = []
    for _ in range(n):
        words = rng.choices(WORDS, k=8)
        corrupt = list(words)
        for i in rng.sample(range(8), rng.randint(1, 3)):
            corrupt[i] = rng.choice([w for w in WORDS if w != words[i]])
        answer, foil = rng.sample(WORDS, 2)
        pairs.append(PromptPair(" ".join(words), " ".join(corrupt), f" {answer}", f" {foil}"))
    return pairs


def answers_and_foils(words: Sequence[str], n: int, rng: Random) -> list[tuple[str, str]]:
    """Draw ``n`` different answers.

    Each foil is the next answer, so that both weigh the same in a mean.
    """
    answers = rng.sample(words, n)
    if n == 1:
        return [(answers[0], rng.choice([w for w in words if w != answers[0]]))]
    return list(zip(answers, [*answers[1:], answers[0]], strict=True))


def positions_of(path: Sequence[int]) -> Sites:
    """Residual-stream sites of a difference, given its position layer by layer.

    ``path``: its position before each layer and after the last.
    """
    layers = range(len(path) - 1)
    return Sites([
        *(Site("resid_pre", layer, position=path[layer]) for layer in layers),
        *(Site("resid_post", layer, position=path[layer + 1]) for layer in layers),
    ])  # fmt: skip


def spans_of(words: Sequence[str], positions: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Character ranges in " ".join(words) of single words, by position.

    ``<bos>`` is position 0.
    """
    spans = {}
    for name, position in positions.items():
        start = sum(len(w) + 1 for w in words[: position - 1])
        spans[name] = (start, start + len(words[position - 1]))
    return spans
