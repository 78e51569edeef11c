"""Facts that a model knows, for causal tracing (Meng et al. 2022).

For example "The capital of France is the city of" → " Paris". `facts.toml` lists common knowledge; which of these facts
a model knows is measured, not assumed.
"""

from __future__ import annotations

import logging
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from random import Random
from typing import Any

from interp.errors import TaskError
from interp.prompts.pairs import Fact, encode_facts
from interp.tasks.behaviour import margins
from interp.tasks.vocabulary import TaskModel, check_count, token_of

log = logging.getLogger("interp")

NOT_A_TOKEN, NOT_KNOWN = "answer is not a single token", "not the model's first answer"


class Facts(list[Fact]):
    """Facts that a model knows.

    ``dropped`` gives, by prompt, the reason why each other fact was left out.
    """

    task = "facts"

    def __init__(self, facts: Iterable[Fact], dropped: Mapping[str, str]):
        super().__init__(facts)
        self.dropped = dict(dropped)

    def __repr__(self) -> str:
        first = f"; first: {self[0].prompt!r} → {self[0].answer!r}" if self else ""
        return f"Facts({len(self)} known, {len(self.dropped)} left out{first})"


@cache
def relations() -> list[dict[str, Any]]:
    """Read facts.toml: name, prompt, question and facts of each relation."""
    text = resources.files("interp.tasks").joinpath("facts.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["relation"]


def all_facts() -> list[Fact]:
    """List all facts, relation by relation, whether or not a model knows them."""
    return [
        Fact(relation["prompt"].format(subject=subject), subject, f" {answer}")
        for relation in relations()
        for subject, answer in relation["facts"]
    ]


def facts(model: TaskModel, n: int | None = None, seed: int = 0) -> Facts:
    """Collect facts that the model completes correctly.

    The answer is one token and the model's first choice. ``n``: how many, drawn at random with ``seed`` (default: all
    that the model knows, in the list's order). The result's ``dropped`` says why each other fact was left out; a log
    line counts them.

    Raises TaskError if the model knows fewer than ``n``, or none.
    """
    if n is not None:
        check_count(n, "facts")
    every_fact = all_facts()
    usable = [f for f in every_fact if token_of(str(f.answer).strip(), model.coder) is not None]
    dropped = {f.prompt: NOT_A_TOKEN for f in every_fact if f not in usable}
    known_facts: list[Fact] = []
    if usable:
        gaps = margins(model, encode_facts(usable, model.coder))
        known_facts = [f for f, gap in zip(usable, gaps, strict=True) if gap > 0]
        dropped |= {f.prompt: NOT_KNOWN for f in usable if f not in known_facts}
    counts = Counter(dropped.values())
    why = ", ".join(f"{count} left out ({reason})" for reason, count in counts.items())
    if len(known_facts) < (n or 1):
        raise TaskError(
            f"{model.name} knows {len(known_facts)} of the {len(every_fact)} facts, and {n or 1} were asked for: "
            f"{why}. Ask for fewer, use a larger model, or pass custom interp.Fact objects."
        )
    log.info("facts: %s knows %d of %d: %s", model.name, len(known_facts), len(every_fact), why or "none left out")
    sample = known_facts if n is None else Random(f"facts/{seed}").sample(known_facts, n)
    return Facts(sample, dropped)
