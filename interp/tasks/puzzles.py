"""Small puzzles of two kinds.

One is solved by recalling a fact, the other by reasoning from the prompt. For studies that compare recall with
reasoning (arXiv 2510.03366; only its abstract was available, so these puzzles are not the paper's). Both kinds are
short stories about people with a question at the end.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.errors import TaskError
from interp.prompts.pairs import PromptPair
from interp.tasks.generate import (
    Split,
    check_choice,
    check_split,
    end_of,
    fill,
    items_of_split,
    make_pairs,
    usable_words,
    word_lists,
)
from interp.tasks.known_facts import relations
from interp.tasks.vocabulary import TaskModel, TaskPairs, single_tokens

Kind = Literal["recall", "reasoning"]


def puzzles(
    model: TaskModel, n: int = 64, seed: int = 0, *, kind: Kind = "reasoning", split: Split | None = None
) -> TaskPairs:
    """Make ``n`` puzzles of one kind.

    ``kind="reasoning"``: "Anna is taller than Ben, and Ben is taller than Carl. … the tallest is" → " Anna"; the two
    premises come in either order, and the question is about either end. In the corrupt prompt the two ends have changed
    places, and so have answer and foil. Spans: ``top``, ``bottom`` (the people at the ends), ``asked``,
    ``END``. ``kind="recall"``: "Today Anna lives in the city of Lyon. The country in which Anna lives is" → " France";
    corrupt: a city of another country. Spans: ``city``, ``END``.

    ``split``: "train" and "test" share no template, and no city, or relation of comparison. Raises TaskError if the
    tokenizer lacks names or countries, or cannot align ``n`` pairs.
    """
    check_split(split, "puzzles")
    check_choice(kind, ("recall", "reasoning"), "kind", "puzzles")
    return (_recall if kind == "recall" else _reasoning)(model, n, seed, split)


def _reasoning(model: TaskModel, n: int, seed: int, split: Split | None) -> TaskPairs:
    words, coder = word_lists("puzzles"), model.coder
    names, dropped = usable_words(
        word_lists("indirect_object")["names"], model, "puzzles-reasoning", fewest=3, what="first names"
    )  # fmt: skip
    templates, comparisons = items_of_split(words["reasoning"], split), items_of_split(words["relations"], split)

    def draw(rng: Random, i: int) -> PromptPair:
        template, (more, most, least) = rng.choice(templates), rng.choice(comparisons)
        top, middle, bottom = rng.sample(names, 3)
        first, superlative = rng.random() < 0.5, rng.random() < 0.5

        def story(high: str, low: str) -> tuple[str, dict[str, tuple[int, int]]]:
            premises = (high, middle, middle, low) if first else (middle, low, high, middle)
            people = dict(zip("abcd", premises, strict=True))
            return fill(template, {**people, "more": more, "most": most if superlative else least})

        clean, ranges = story(top, bottom)
        spans = {
            "top": ranges["a" if first else "c"], "bottom": ranges["d" if first else "b"], "asked": ranges["most"],
            "END": end_of(clean, coder),
        }  # fmt: skip
        answer, foil = (top, bottom) if superlative else (bottom, top)
        return PromptPair(clean, story(bottom, top)[0], f" {answer}", f" {foil}", spans)

    return make_pairs(model, "puzzles-reasoning", n, seed, draw, split=split, dropped=dropped)


def _recall(model: TaskModel, n: int, seed: int, split: Split | None) -> TaskPairs:
    coder = model.coder
    country_of_city = next(r["facts"] for r in relations() if r["name"] == "country of a city")
    names, dropped = usable_words(
        word_lists("indirect_object")["names"], model, "puzzles-recall", fewest=1, what="first names"
    )
    countries, missing = single_tokens(dict.fromkeys(country for _, country in country_of_city), coder)
    templates = items_of_split(word_lists("puzzles")["recall"], split)
    cities = [(city, country) for city, country in items_of_split(country_of_city, split) if country in countries]
    if len({country for _, country in cities}) < 2:
        raise TaskError(f"{model.name}: puzzles-recall needs 2 countries that are single tokens (missing: {missing})")

    def draw(rng: Random, i: int) -> PromptPair:
        template, name = rng.choice(templates), rng.choice(names)
        city, country = rng.choice(cities)
        other, elsewhere = rng.choice([c for c in cities if c[1] != country])
        clean, ranges = fill(template, {"name": name, "city": city})
        corrupt, _ = fill(template, {"name": name, "city": other})
        spans = {"city": ranges["city"], "END": end_of(clean, coder)}
        return PromptPair(clean, corrupt, f" {country}", f" {elsewhere}", spans)

    return make_pairs(model, "puzzles-recall", n, seed, draw, split=split, dropped=[*dropped, *missing])
