"""Multiple choice: a question, labelled options, and the letter of the right one."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase
from typing import Literal

from interp.errors import TaskError
from interp.prompts.pairs import PromptPair
from interp.tasks.generate import (
    Split,
    check_choice,
    check_split,
    end_of,
    items_of_split,
    make_pairs,
    span_of,
    usable_words,
)
from interp.tasks.known_facts import relations
from interp.tasks.vocabulary import TaskModel, TaskPairs


def multiple_choice(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    options: int = 4,
    labels: Literal["alphabet", "random"] = "alphabet",
    corruption: Literal["order", "labels"] = "order",
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` multiple-choice questions of common knowledge.

    They have 2 to 10 ``options`` in random order; the answer is a letter. ``labels="alphabet"``: A, B, C, …;
    ``"random"``: random letters in random order. ``corruption="order"``: the right option and the foil's option
    exchange their texts; ``"labels"``: they exchange their letters, and each text stays. Either way the right letter
    becomes the foil. Spans: ``question``, ``right`` and ``wrong`` (the texts of these two options), ``label`` (the
    answer's letter), ``END``. ``split``: "train" and "test" share no question. Raises TaskError if the tokenizer lacks
    letters, or cannot align ``n`` pairs.
    """
    check_split(split, "multiple_choice")
    check_choice(options, range(2, 11), "options", "multiple_choice")
    check_choice(labels, ("alphabet", "random"), "labels", "multiple_choice")
    check_choice(corruption, ("order", "labels"), "corruption", "multiple_choice")
    coder = model.coder
    letters, dropped = usable_words(ascii_uppercase, model, "multiple_choice", fewest=options, what="capital letters")
    questions = _questions(options, split)
    if not questions:
        raise TaskError(f"multiple_choice: no relation has {options} different answers; ask for fewer options")

    def draw(rng: Random, i: int) -> PromptPair:
        question, right, others = rng.choice(questions)
        texts = rng.sample([right, *rng.sample(others, options - 1)], options)
        right_option = texts.index(right)
        wrong_option = rng.choice([j for j in range(options) if j != right_option])
        marks = rng.sample(letters, options) if labels == "random" else letters[:options]
        exchanged = _exchange(texts if corruption == "order" else marks, right_option, wrong_option)
        clean = _text(question, marks, texts)
        corrupt = _text(question, marks, exchanged) if corruption == "order" else _text(question, exchanged, texts)
        first = clean.index("\n")
        spans = {"question": span_of(question, clean), "END": end_of(clean, coder)}
        for name, j in (("right", right_option), ("wrong", wrong_option)):
            start = clean.index(f"\n{marks[j]}. ", first) + 4
            spans[name] = (start, start + len(texts[j]))
        spans["label"] = (spans["right"][0] - 3, spans["right"][0] - 2)
        return PromptPair(clean, corrupt, f" {marks[right_option]}", f" {marks[wrong_option]}", spans)

    return make_pairs(model, "multiple_choice", n, seed, draw, split=split, dropped=dropped)


def _questions(options: int, split: Split | None) -> list[tuple[str, str, list[str]]]:
    """List (question, right answer, other answers of its relation)."""
    questions = []
    for relation in relations():
        answers = list(dict.fromkeys(answer for _, answer in relation["facts"]))
        if len(answers) >= options:
            questions += [
                (relation["question"].format(subject=subject), answer, [a for a in answers if a != answer])
                for subject, answer in relation["facts"]
            ]
    return items_of_split(questions, split)


def _exchange(items: list[str], i: int, j: int) -> list[str]:
    out = list(items)
    out[i], out[j] = items[j], items[i]
    return out


def _text(question: str, marks: list[str], texts: list[str]) -> str:
    lines = "\n".join(f"{mark}. {text}" for mark, text in zip(marks, texts, strict=True))
    return f"Question: {question}\n{lines}\nAnswer:"
