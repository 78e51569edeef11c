"""The next argument in a docstring, after Heimersheim and Janiak (2023).

Documentation keeps the order of arguments.
"""

from __future__ import annotations

from random import Random

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import Split, check_split, end_of, items_of_split, make_pairs, span_of
from interp.tasks.vocabulary import TaskModel, TaskPairs, words_of_tokenizer

ARGUMENTS, DOCUMENTED = 5, 2
FEWEST, MOST = 44, 3000  # words of the tokenizer: a prompt needs 11, also from the quarter for the test


def docstring(model: TaskModel, n: int = 64, seed: int = 0, *, split: Split | None = None) -> TaskPairs:
    """Make ``n`` Python functions whose docstring describes two of five arguments.

    The third argument is next. All names are random words that are single tokens. In the corrupt prompt the third and a
    later argument have changed places in the definition, so that the foil is right. Spans: ``A``, ``B`` (the described
    arguments, in the definition), ``C`` (the answer there), ``D`` (the foil there), ``A_doc``, ``B_doc`` (in the
    docstring), ``END``. ``split``: "train" and "test" share no word. Raises TaskError if the tokenizer has too few
    words.
    """
    check_split(split, "docstring")
    words, coder = items_of_split(words_of_tokenizer(model, fewest=FEWEST, most=MOST), split), model.coder

    def draw(rng: Random, i: int) -> PromptPair:
        function, *rest = rng.sample(words, 1 + ARGUMENTS + 5)
        arguments, prose = rest[:ARGUMENTS], rest[ARGUMENTS:]
        later = rng.randrange(DOCUMENTED + 1, ARGUMENTS)
        changed = list(arguments)
        changed[DOCUMENTED], changed[later] = arguments[later], arguments[DOCUMENTED]
        described = "".join(
            f"    :param {a}: {' '.join(prose[j : j + 2])}\n" for j, a in enumerate(arguments[:DOCUMENTED])
        )

        def text(names: list[str]) -> str:
            head = f"def {function}(self, {', '.join(names)}):"
            return f'{head}\n    """{" ".join(prose[2:])}\n\n{described}    :param'

        clean = text(arguments)
        definition = zip("ABCD", [*arguments[: DOCUMENTED + 1], arguments[later]], strict=True)
        start, body = clean.index("self"), clean.index('"""')
        spans = {name: _after_space(word, clean, start) for name, word in definition}
        for name, word in zip("AB", arguments, strict=False):
            spans[f"{name}_doc"] = _after_space(word, clean, body)
        spans["END"] = end_of(clean, coder)
        return PromptPair(clean, text(changed), f" {arguments[DOCUMENTED]}", f" {arguments[later]}", spans)

    return make_pairs(model, "docstring", n, seed, draw, split=split)


def _after_space(word: str, text: str, start: int) -> tuple[int, int]:
    """Character range of a word between a space and punctuation.

    It is then not part of another word.
    """
    space = min(i for end in ",):" if (i := text.find(f" {word}{end}", start)) >= 0)
    return span_of(word, text, space + 1)
