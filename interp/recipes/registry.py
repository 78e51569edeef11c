"""The table of recipes: one row each, read by the command line, by sweeps' configs and templates, and by workers.

Importing this module is light; a recipe's module is imported when its function is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from interp.recipes.choices import (
    ABLATIONS,
    ALIGNMENTS,
    EDITED_ALONE,
    MODES,
    PATH_ABLATIONS,
    PATH_MLPS,
    PEEK_CONTEXTS,
    SCHEDULES,
    SEVERED,
    TRACED_WINDOWS,
)
from interp.recipes.options import (
    ANY_NUMBER,
    EDITS,
    LAYERS,
    NAMES,
    PLACES,
    POSITION,
    POSITIONS,
    RECEIVERS,
    SITE,
    SITES,
    TEXTS,
    WORDS_BY_NAME,
    Option,
    choice,
    number,
    whole,
)
from interp.recipes.selection import groups_of, sites_of


@dataclass(frozen=True)
class SiteOptions:
    """How a recipe takes the sites that it sweeps over.

    ``default``: on the command line.  ``groups``: whether it takes groups of sites too.  ``keyword``: of its function.
    """

    default: str = "z"
    groups: bool = True
    keyword: str = "sites"


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    ``function``: ``module:name`` in `interp.recipes`.  ``summary``: the first line of its help.  ``sites``: how it
    takes the sites to sweep over, if it does.  ``facts``: it takes Facts too, besides pairs.  ``traces_facts``: the
    command line gives it facts by default.  ``whole_set``: what it does to one prompt depends on the others (means,
    donors, noise).  ``seeded``: its numbers depend on the seed, where the options are as ``seeded_if`` says.
    ``metric``: the default.  ``prepare``: ``module:name`` of a function (model, arguments) → arguments that computes
    some of them with the model.  ``needs``: rules (option, value, other option, allowed): where the option has the
    value (None: any), the other one must be allowed (None: not given).
    """

    name: str
    function: str
    summary: str
    options: tuple[Option, ...] = ()
    sites: SiteOptions | None = None
    facts: bool = False
    traces_facts: bool = False
    whole_set: bool = False
    seeded: bool = False
    seeded_if: Mapping[str, str] = field(default_factory=dict)
    metric: str = "logit_diff"
    prepare: str = ""
    needs: tuple[tuple[str, str | None, str, tuple[str | None, ...]], ...] = ()

    @property
    def verb(self) -> str:
        """Its name on the command line."""
        return self.name.replace("_", "-")

    def load(self) -> Callable[..., Any]:
        """Import and return its function."""
        return _imported(self.function)

    def takes(self, keyword: str) -> bool:
        """Return whether its function has a parameter."""
        return keyword in inspect.signature(self.load()).parameters

    def is_random(self, options: Mapping[str, Any]) -> bool:
        """Return whether another seed gives other numbers for the same prompts."""
        return self.seeded and all(options.get(key) == value for key, value in self.seeded_if.items())

    def conflict(self, options: Mapping[str, Any]) -> tuple[str, str | None, str, str] | None:
        """Return a broken rule of ``needs`` as (option, its value or None, other option, the value that it needs)."""
        for name, value, other, allowed in self.needs:
            actual = options.get(name)
            if actual is not None and value in (None, actual) and options.get(other) not in allowed:
                return name, value, other, next(v for v in allowed if v is not None)
        return None

    def arguments(self, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of its function for checked options; options that are None are left out."""
        by_keyword: dict[str, Any] = {}
        for option in self.options:
            value = option.default if options.get(option.name) is None else options[option.name]
            if value is not None:
                by_keyword[option.keyword or option.name] = option.type.argument(model, value)
        return by_keyword

    def site_arguments(
        self, model: Any, sites: str | None, layers: str | None, groups: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """Return the keyword arguments for the sites and groups that texts name."""
        assert self.sites is not None
        by_keyword: dict[str, Any] = {self.sites.keyword: None if sites is None else sites_of(model, sites, layers)}
        if self.sites.groups:
            by_keyword["groups"] = groups_of(model, groups)
        return by_keyword

    def prepared(self, model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with those that are computed with the model."""
        return _imported(self.prepare)(model, arguments) if self.prepare else arguments


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(import_module(f"interp.recipes.{module}"), name)


MODE = choice(*MODES)
AT = Option(
    "at", PLACES, "Where the metric is read: last; a position; a span (subject, subject:mean); each. Comma-separated.",
    default="last",
)  # fmt: skip
ALIGN = Option(
    "align", choice(*ALIGNMENTS), "position; span: the mean over a named span of the other run.", default="position",
)  # fmt: skip
WINDOW = Option("window", whole(1), "Layers changed together around each layer.", default=1)
REFERENCE = "Texts that means are taken over (and donors drawn from), one per line. Default: the prompts."

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "patch", "patching:patch",
            "Activation patching: copy an activation from one prompt's run into the other's.",
            (
                Option("mode", MODE, "denoise: clean into corrupt; noise: corrupt into clean.", default="denoise"),
                WINDOW,
                AT,
                ALIGN,
            ),
            sites=SiteOptions(),
        ),
        Recipe(
            "ablate", "ablation:ablate",
            "Ablation: replace a component's activation in the clean run, by a stated recipe.",
            (
                Option("using", choice(*ABLATIONS), "zero; mean; position_mean; cama (context-aware mean); resample; "
                       "other_heads (mean of the layer's other heads, for z).", default="mean"),
                Option("schedule", choice(*SCHEDULES), "each; cumulative (in the order given); all-but-one.",
                       default="each"),
                WINDOW,
                Option("reference", TEXTS, REFERENCE),
                AT,
            ),
            sites=SiteOptions(), whole_set=True, seeded=True, seeded_if={"using": "resample"},
        ),
        Recipe(
            "trace", "tracing:trace",
            "Causal tracing: corrupt a fact's subject, restore one state, and read how much of the answer returns.",
            (
                Option("component", choice(*TRACED_WINDOWS), "resid_post, mlp_out or attn_out.", default="resid_post"),
                Option("window", whole(1), "Layers restored together. Default: 1 or 10, as published."),
                Option("layers", LAYERS, "Layers that are restored: 0-5,9. Default: all."),
                Option("positions", POSITIONS, "each; subject; subject:last; a number; another span.", default="each"),
                Option("noise", number(0, above=True), "In standard deviations of subject embeddings. Default: 3."),
                Option("samples", whole(1), "Corrupted runs of each fact. Default: 10."),
                Option("sigma", number(0, above=True), "The standard deviation. Default: that of these subjects."),
                Option("sever", choice(*SEVERED), "mlp or attn: keep later ones at their corrupted values."),
                AT,
            ),
            facts=True, traces_facts=True, whole_set=True, seeded=True, metric="prob",
            needs=(("sever", None, "component", ("resid_post", None)),),
        ),
        Recipe(
            "mediate", "mediation:mediate",
            "Causal mediation: total, natural direct and indirect effect, and interaction, of each mediator.",
            (WINDOW, ALIGN, AT),
            sites=SiteOptions(keyword="mediators"),
        ),
        Recipe(
            "path_patch", "path_patching:path_patch",
            "Path patching: change what one component sends along one path, and nothing else.",
            (
                Option("senders", SITES, "Sites of z, attn_out or mlp_out, as for --sites of patch.", default="z",
                       stored=True),
                Option("receivers", RECEIVERS, "logits; sites of q, k, v or mlp_out, e.g. q,k,v for every head.",
                       default="logits"),
                Option("mode", MODE, "noise (as published) or denoise.", default="noise"),
                Option("mlps", choice(*PATH_MLPS), "frozen, or recomputed along the path.", default="frozen"),
                Option("using", choice(*PATH_ABLATIONS), "patch; zero or mean: ablate the edge.", default="patch"),
                AT,
            ),
            whole_set=True,
            needs=(("using", "zero", "mode", ("noise", None)), ("using", "mean", "mode", ("noise", None))),
        ),
        Recipe(
            "knock_out", "knockout:knock_out",
            "Attention knock-out: block attention from some tokens to others in a window of layers.",
            (
                Option("keys", POSITION, "What is no longer read: a span (subject) or a position.", default="subject"),
                Option("queries", POSITION, "Who no longer reads it: a span, a position, or all.", default=-1),
                Option("layers", LAYERS, "Centres of the windows: 0-5,9. Default: all layers."),
                Option("window", whole(1), "Layers blocked together. Default: a fifth of the model's."),
                Option("heads", LAYERS, "Query heads: 0-3,7. Default: all."),
                AT,
            ),
            facts=True, traces_facts=True, metric="logprob",
        ),
        Recipe(
            "edit", "editing:edit",
            "Attention edits: change how queries read keys (cut, sharpen, even out, overwrite, redistribute, gate).",
            (
                Option("edit", EDITS, "'name: fields', e.g. 'cut: knockout queries=-1 keys=subject layers=8-19', or of "
                       "a mask, 'blind: close=*>subject', or of a write, 'off: site=z.L9H6@-1 set=0'. May be "
                       "repeated; edits of one name act at once.",
                       keyword="edits", required=True),
                Option("mode", MODE, "noise: edit the clean run; denoise: the corrupt run.", default="noise"),
                Option("each", choice(*EDITED_ALONE), "Edit every layer or head alone. Default: all at once."),
                AT,
            ),
            facts=True,
        ),
        Recipe(
            "peek", "peeking:peek",
            "All for One: the last token alone, after the others waited and it read them for a few layers.",
            (
                Option("layers", LAYERS, "Layers up to which tokens wait: 0-5,9. Default: all.", keyword="wait"),
                Option("full", whole(0), "Layers after it in which the last token reads the others.", default=2),
                Option("context", choice(*PEEK_CONTEXTS), "mean: remove context while waiting; keep: only mask.",
                       default="mean"),
                Option("reference", TEXTS, REFERENCE),
                AT,
            ),
            whole_set=True,
        ),
        Recipe(
            "steer", "steering:steer",
            "Steering: add the difference of means of two sets of texts, and read the answer.",
            (
                Option("positive", TEXTS, "Texts to steer towards, one per line.", required=True),
                Option("negative", TEXTS, "Texts to steer away from, one per line.", required=True),
                Option("at", SITE, "The site whose mean difference is the direction. Default: the first of the sites.",
                       keyword="direction_at"),
                Option("scale", ANY_NUMBER, "How many times the direction is added.", default=1.0),
                replace(AT, name="read_at", keyword="at"),
            ),
            sites=SiteOptions("resid_pre@all", groups=False), facts=True, prepare="steering:direction_between",
        ),
        Recipe(
            "leave_out", "leave_one_out:leave_out",
            "Leave-one-out: the answer without each named span of the prompt, or with other words in its place.",
            (
                Option("spans", NAMES, "Names of spans, comma-separated. Default: all of each prompt."),
                Option("instead", WORDS_BY_NAME, "Words in a span's place: 'name=other words'. May be repeated."),
                AT,
            ),
            facts=True, metric="logprob",
        ),
    )
}  # fmt: skip
"""Every recipe by name. A new recipe is one row here, besides its module, its page of documentation and its test."""
