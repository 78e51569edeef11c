"""Write: an activation that is set to a value, or to which a value is added."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from interp.errors import InterpError
from interp.interventions.words import parse_fields, read_tokens, say, written
from interp.sites import EACH, Site

if TYPE_CHECKING:
    from torch import Tensor

    from interp.sites import Tokens

WRITE_FIELDS = ("site", "set", "add")  # what no other intervention has
VALUES = "a number, or a tensor [width] or [tokens, width]"


@dataclass(frozen=True, eq=False, repr=False)
class Write:
    """A change of an activation: set it to a value, or add a value to it.

        interp.Write("z.L9H6", "END", set=0.0)                      # a head's output at the tokens of a span
        interp.Write("resid_pre.L3@-1", add=direction)              # [d_model], at the last token
        interp.edit(model, pairs, {"both": [interp.Write("z.L9H6", set=0.0), interp.AttentionEdit(...)]})

    ``tokens``: positions and spans; None: the site's own position, or else all tokens. ``set`` or ``add``: a number, a
    tensor [width] for every token, or [tokens, width] in the order of the prompt; width: d_model, d_head for q, k, v
    and z, and 1 for a neuron. Values carry no gradient.

    Raises InterpError unless one of ``set`` and ``add`` is a finite value of such a shape, and for two sets of tokens.
    """

    site: Site | str
    tokens: Tokens | None = None
    set: float | Tensor | None = None
    add: float | Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site) if isinstance(self.site, str) else self.site)
        if not isinstance(self.site, Site):
            raise InterpError(f"Write(site={self.site!r:.80}): one site expected, e.g. 'z.L9H6'")
        if isinstance(self.tokens, Iterable) and not isinstance(self.tokens, str | range | tuple):
            object.__setattr__(self, "tokens", tuple(self.tokens))  # an iterator can be read once
        if self.tokens is not None and self.site.position is not None:
            raise InterpError(f"Write: the site {self.site} names a position, and tokens={self.tokens!r} too")
        if EACH in (self.site.position, self.tokens):
            raise InterpError(
                "Write: 'each' is a sweep of positions, and a write acts on all its tokens at once; leave tokens out "
                "for all"
            )
        if (self.set is None) == (self.add is None):
            raise InterpError(
                f"Write({self.site}): give one of set=… (the activation becomes this) and add=… (this is added to it)"
            )
        object.__setattr__(self, self.how, _as_value(self.how, self.value))

    @property
    def how(self) -> Literal["set", "add"]:
        """``"set"`` or ``"add"``."""
        return "add" if self.set is None else "set"

    @property
    def value(self) -> float | Tensor:
        """What is set or added."""
        value = self.add if self.set is None else self.set
        assert value is not None
        return value

    @property
    def address(self) -> Site:
        """The site without its position."""
        assert isinstance(self.site, Site)
        return self.site.at(None)

    @property
    def where(self) -> Tokens | None:
        """The tokens on which it acts; None: all."""
        assert isinstance(self.site, Site)
        return self.site.position if self.tokens is None else self.tokens

    @classmethod
    def parse(cls, text: str) -> Write:
        """Read a write as it is written on the command line and in configs, whose value is a number.

            interp.Write.parse("site=z.L9H6@-1 set=0")
            interp.Write.parse("site=resid_pre.L3 tokens=subject,S2:last add=0.5")

        Raises InterpError for anything else.
        """
        return cls(**parse_fields(text, READERS, "write"))

    @property
    def text(self) -> str:
        """The write in the form that `parse` reads; a tensor is written as its shape and a hash."""
        tokens = "" if self.tokens is None else f" tokens={written(self.tokens)}"
        return f"site={self.site}{tokens} {self.how}={written(self.value)}"

    def __repr__(self) -> str:
        return f"Write({self.text})"

    def __str__(self) -> str:
        value: Any = self.value
        words = format(value, "g") if isinstance(value, float) else f"a tensor of {list(value.shape)}"
        place = f"{self.address} at tokens {say(self.where)}"
        return f"adds {words} to {place}" if self.set is None else f"sets {place} to {words}"


READERS = {"site": Site.parse, "tokens": read_tokens, "set": float, "add": float}


def _as_value(name: str, value: Any) -> float | Tensor:
    """Return a number as float, anything else as a tensor. Raises InterpError for other values and shapes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InterpError(f"Write({name}={value!r}): a finite number expected")
        return float(value)
    import torch

    try:
        if isinstance(value, bool | str):
            raise TypeError
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InterpError(f"Write({name}={value!r:.60}): {VALUES} expected") from None
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim > 2 or not tensor.numel():
        raise InterpError(
            f"Write({name}=…): got {tensor.dtype} of shape {list(tensor.shape)}; {VALUES} of real numbers expected"
        )
    if not bool(tensor.isfinite().all()):
        raise InterpError(f"Write({name}=…): finite numbers expected")
    return float(tensor) if tensor.ndim == 0 else tensor
