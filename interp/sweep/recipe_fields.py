"""Which keys each recipe has in a config, what they may be, and which prompts and sites it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp.errors import SiteError
from interp.utils.checks import Check, either, list_of, number, one_of, text, whole

METRICS = ("logit_diff", "prob", "logprob", "rank", "kl")
_MODE = one_of("denoise", "noise")
_WINDOW = whole(1)


def ranges(value: Any) -> str:
    """Numbers and ranges: ``0-5,9``."""
    text(value)
    for part in value.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(e.isdigit() for e in ends) or int(ends[0]) > int(ends[-1]):
            raise ValueError("numbers and ranges like '0-5,9' expected")
    return value


def sites_text(value: Any) -> str:
    """Sites by the grammar of ``--sites``, as far as it is known without a model."""
    from interp.sites import COMPONENTS, Site

    items = [item.strip() for item in text(value).split(",") if item.strip()]
    if not items:
        raise ValueError("a component or sites expected, e.g. 'z' or 'z.L9H6,z.L10H0'")
    for item in items:
        if item.partition("@")[0] not in COMPONENTS:
            try:
                Site.parse(item)
            except SiteError as error:
                raise ValueError(str(error)) from None
    return value


def receivers_text(value: Any) -> str:
    """The logits, sites, or both."""
    words = [word.strip() for word in text(value).split(",")]
    if others := [word for word in words if word != "logits"]:
        sites_text(",".join(others))
    return value


def place(value: Any) -> int | str:
    """A position: a number, or the name of a span."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return text(value)


@dataclass(frozen=True)
class Recipe:
    """What a recipe is called in `interp`, and its keys.

    ``sites``: whether it sweeps over the config's sites.  ``facts``: whether it takes facts; all take pairs.
    ``whole_set``: whether what it does to one prompt depends on the others (means, donors, noise).
    """

    function: str
    keys: dict[str, Check]
    sites: bool = False
    facts: bool = False
    whole_set: bool = False
    seeded: bool = False
    metric: str = "logit_diff"


RECIPES = {
    "patch": Recipe("patch", {"mode": _MODE, "window": _WINDOW}, sites=True),
    "mediate": Recipe("mediate", {"window": _WINDOW}, sites=True),
    "ablate": Recipe(
        "ablate",
        {
            "using": one_of("zero", "mean", "position_mean", "cama", "resample"),
            "schedule": one_of("each", "cumulative", "all but one"),
            "window": _WINDOW,
        },
        sites=True, whole_set=True, seeded=True,
    ),
    "trace": Recipe(
        "trace",
        {
            "component": one_of("resid_post", "mlp_out", "attn_out"),
            "window": _WINDOW,
            "layers": ranges,
            "positions": either(place, list_of(place)),
            "noise": number(0, above=True),
            "samples": whole(1),
            "sigma": number(0, above=True),
            "sever": one_of("mlp", "attn"),
        },
        facts=True, whole_set=True, seeded=True, metric="prob",
    ),
    "path_patch": Recipe(
        "path_patch",
        {
            "senders": text, "receivers": text, "mode": _MODE, "mlps": one_of("frozen", "recomputed"),
            "using": one_of("patch", "zero"),
        },
    ),
    "knock_out": Recipe(
        "knock_out",
        {"keys": place, "queries": place, "layers": ranges, "window": _WINDOW, "heads": ranges},
        facts=True, metric="logprob",
    ),
    "peek": Recipe(
        "peek", {"layers": ranges, "full": whole(0), "context": one_of("mean", "keep")}, whole_set=True
    ),
    "leave_out": Recipe("leave_out", {"spans": list_of(text)}, facts=True, metric="logprob"),
}  # fmt: skip
