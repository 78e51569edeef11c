"""AttentionMask: which keys each query sees, by tokens of a prompt and layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError
from interp.interventions.words import parse_fields, read_flag, read_items, read_tokens, say, written

if TYPE_CHECKING:
    from interp.sites import Tokens

    Pairs = Sequence[tuple[Tokens | None, Tokens | None]]

RULES = ("open", "close", "prefix", "blocks", "segments", "window", "stride")  # an AttentionMask sets one at least
MASK_FIELDS = (*RULES, "sees", "future")  # what no AttentionEdit has


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMask:
    """Which keys each query sees, as a change of the model's own mask.

        interp.AttentionMask(open=[("image", "question")])            # image tokens see the question that follows them
        interp.AttentionMask(prefix="question")                       # prefix-LM: these tokens see each other
        interp.AttentionMask(segments=["doc1", "doc2"], layers=[0])   # intra-document: the two do not see each other

    A pair is always (queries, keys): the first tokens see, or no longer see, the second; None: all tokens.

    ``open``: pairs that become visible, whatever causality and window hide. The tokens of a pair may be the same: they
    then see each other in both directions. If the two sides share some tokens but differ, as ``(None, [0, 1, 2])``
    (sink keys for all queries), only keys that do not come after the query are opened, so that causality stays.
    ``future=True`` also opens later keys there, and ``future=False`` opens no later key in any pair.
    ``close``: pairs that are hidden. ``prefix``: tokens that see each other in both directions.
    ``blocks``: block-causal. A length (blocks of so many tokens from the first one on) or a list of spans; the tokens
    of a block see each other in both directions.
    ``segments``: spans, each a segment, or a segment number for each token (−1: in none). A token does not see other
    segments than its own; ``sees`` lists the pairs of segment numbers, (of the query, of the key), that it sees too.
    Tokens in no segment are not restricted. Generated tokens are in the segment of the prompt's last token.
    ``window``: a query sees itself and the ``window`` − 1 tokens before it; takes the place of the model's own window.
    ``stride``: it sees keys at distances that are multiples of ``stride``, and with ``window`` also those inside it.
    ``layers``: default all layers with attention.

    What one rule hides stays hidden, except that ``open``, ``prefix`` and ``blocks`` open what the window and causality
    hide; padding stays hidden. A query that sees no key gets a zero output from its heads. Several masks of one layer
    act together; of several windows the last one counts. Generation: what the prompt's tokens have read does not change
    when tokens are decoded later.

    Raises InterpError for a mask without a rule, a field out of range, and fields that do not go together.
    """

    open: Pairs = ()
    close: Pairs = ()
    prefix: Tokens | None = None
    blocks: int | Sequence[Tokens] | None = None
    segments: Sequence[Tokens] | Sequence[int] | None = None
    sees: Sequence[tuple[int, int]] = ()
    window: int | None = None
    stride: int | None = None
    future: bool | None = None
    layers: Iterable[int] | int | None = None

    def __post_init__(self) -> None:
        for name in ("open", "close", "sees"):
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        for name in ("prefix", "blocks", "segments", "layers"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | range):
                object.__setattr__(self, name, tuple(getattr(value, "tolist", lambda value=value: value)()))
        for name, least in (("window", 1), ("stride", 1), ("blocks", 1)):
            value = getattr(self, name)
            if name == "blocks" and (isinstance(value, tuple | range) or value is None):
                continue
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InterpError(f"AttentionMask({name}={value!r:.60}): a whole number of at least {least} expected"
                                  + (", or a list of spans" if name == "blocks" else ""))  # fmt: skip
        if not self.changes:
            raise InterpError(
                "AttentionMask changes nothing: set a rule, e.g. open=[('image', 'question')], prefix='image', "
                "blocks=4, segments=['doc1', 'doc2'] or window=8"
            )
        self._check_segments()
        if self.future not in (None, True, False) or (self.future is not None and not self.open):
            raise InterpError(f"AttentionMask(future={self.future!r}): True or False, for the pairs of open=, expected")

    def _check_segments(self) -> None:
        """Raise InterpError unless `segments`, `blocks` and `sees` can be read."""
        for name in ("segments", "blocks"):
            value = getattr(self, name)
            if isinstance(value, str) or (isinstance(value, tuple | range) and not len(value)):
                raise InterpError(f"AttentionMask({name}={value!r}): a list expected, e.g. {name}=['doc1', 'doc2']")
        if self.segments is None and self.sees:
            raise InterpError("AttentionMask(sees=…) says which segments see which, and segments= is not set")
        if self.segments is None:
            return
        numbers = [isinstance(s, int) and not isinstance(s, bool) for s in self.segments]
        if any(numbers) and not all(numbers):
            raise InterpError(
                "AttentionMask(segments=…): either spans, or one segment number for each token; a segment of one token "
                "is written as a list, [3]"
            )
        for pair in self.sees:
            if any(isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < self.n_segments for x in pair):
                raise InterpError(
                    f"AttentionMask(sees={pair!r}): two of the segment numbers 0 to {self.n_segments - 1} expected"
                )

    @property
    def names_spans(self) -> bool:
        """Whether tokens are named by spans of a prompt."""
        blocks = () if isinstance(self.blocks, int | None) else self.blocks
        sides = [side for pair in (*self.open, *self.close) for side in pair]
        named = [*sides, self.prefix, *blocks, *(() if self.numbers_tokens else self.segments or ())]
        return any(isinstance(x, str) for item in named for x in (item if isinstance(item, list | tuple) else [item]))

    @property
    def numbers_tokens(self) -> bool:
        """Whether ``segments`` holds a number for each token, not spans."""
        return self.segments is not None and isinstance(self.segments[0], int)

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        numbers: Any = self.segments
        return 1 + max(numbers) if self.numbers_tokens else len(numbers)

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of the rules that this mask sets."""
        return tuple(name for name in RULES if getattr(self, name) not in (None, ()))

    @classmethod
    def parse(cls, text: str) -> AttentionMask:
        """Read a mask as it is written on the command line and in configs; ``text`` of a mask is read back.

            interp.AttentionMask.parse("open=image>question,*>0+1 layers=0-3")      # pairs queries>keys; *: all tokens
            interp.AttentionMask.parse("segments=doc1,doc2,0-3 sees=1>0 window=8")  # spans, or numbers: segments=0/0/1

        The items of a list are separated by commas, the tokens of one item by ``+``. Raises InterpError for anything
        else.
        """
        return cls(**parse_fields(text, READERS, "attention mask"))

    @property
    def text(self) -> str:
        """The mask in the form that `parse` reads."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value == ():
                continue
            if field.name in ("open", "close", "sees"):
                value = ",".join(f"{_written_item(a)}>{_written_item(b)}" for a, b in value)
            elif field.name == "segments" and self.numbers_tokens:
                value = "/".join(map(str, value))
            elif field.name in ("segments", "blocks") and not isinstance(value, int):
                value = ",".join(map(_written_item, value))
            words.append(f"{field.name}={value if isinstance(value, str) else written(value)}")
        return " ".join(words)

    def __repr__(self) -> str:
        return f"AttentionMask({self.text})"

    def __str__(self) -> str:
        parts = []
        for queries, keys in self.open:
            parts.append(f"queries {say(queries)} see keys {say(keys)}" + _say_future(queries, keys, self.future))
        parts += [f"queries {say(queries)} do not see keys {say(keys)}" for queries, keys in self.close]
        if self.prefix is not None:
            parts.append(f"{say(self.prefix)} see each other in both directions")
        if isinstance(self.blocks, int):
            parts.append(f"each {self.blocks} tokens see each other in both directions")
        elif self.blocks is not None:
            parts.append(f"inside each of {_say_items(self.blocks)}, tokens see each other in both directions")
        if self.segments is not None:
            what = f"{self.n_segments} segments" if self.numbers_tokens else f"segments {_say_items(self.segments)}"
            seen = "".join(f", segment {a} sees {b}" for a, b in self.sees)
            parts.append(f"{what} do not see each other" + (f" (but{seen.removeprefix(',')})" if seen else ""))
        if self.stride is not None:
            parts.append(f"keys at multiples of {self.stride} tokens" + (
                "" if self.window is None else f", and the last {self.window}"))  # fmt: skip
        elif self.window is not None:
            parts.append(f"a window of {self.window} tokens")
        return f"{'; '.join(parts)}; layers {say(self.layers)}"


def _pairs(name: str, value: Any) -> tuple[tuple[Any, Any], ...]:
    """Return pairs as tuples. Raises InterpError for anything else."""
    one_pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, str | int | None) for x in value)
    pairs = [value] if one_pair else value
    if not isinstance(pairs, str) and isinstance(pairs, Iterable):
        pairs = tuple(tuple(p) if isinstance(p, list | tuple) else p for p in pairs)
        if all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            return tuple((_listed(a), _listed(b)) for a, b in pairs)
    raise InterpError(
        f"AttentionMask({name}={value!r:.80}): a list of pairs (queries, keys) expected, e.g. "
        + ("[(1, 0)]" if name == "sees" else f"{name}=[('image', 'question')]")
    )


def _listed(side: Any) -> Any:
    """An iterator can be read once: keep its items."""
    return tuple(side) if isinstance(side, Iterable) and not isinstance(side, str | range | tuple) else side


def _written_item(tokens: Any) -> str:
    return "*" if tokens is None else written(tokens).replace(",", "+")


def _say_items(items: Iterable[Any]) -> str:
    return ", ".join(say(x) if isinstance(x, str | int | range) else f"({say(x)})" for x in items)


def _say_future(queries: Any, keys: Any, future: bool | None) -> str:
    if future is False or (future is None and (queries is None) != (keys is None)):
        return " before them"
    return " also after them" if future else ""


def _read_item(text: str) -> Any:
    return None if text == "*" else read_tokens(text.replace("+", ","))


def _read_spans(text: str) -> Any:
    """Read a list of spans; a single position is a span of one token."""
    items = [_read_item(part) for part in text.split(",")]
    if None in items:
        raise ValueError
    return [[item] if isinstance(item, int) else item for item in items]


def _read_pairs(text: str) -> list[tuple[Any, Any]]:
    pairs = [part.split(">") for part in text.split(",")]
    if any(len(p) != 2 for p in pairs):
        raise ValueError
    return [(_read_item(a), _read_item(b)) for a, b in pairs]


def _read_blocks(text: str) -> Any:
    return int(text) if text.isdigit() else _read_spans(text)


def _read_segments(text: str) -> Any:
    return [int(x) for x in text.split("/")] if "/" in text else _read_spans(text)


READERS = {
    "open": _read_pairs, "close": _read_pairs, "prefix": read_tokens, "blocks": _read_blocks,
    "segments": _read_segments, "sees": _read_pairs, "window": int, "stride": int, "future": read_flag,
    "layers": read_items,
}  # fmt: skip
