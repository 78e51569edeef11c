"""Types of recipes' options: how a value is written in a config and on the command line, and what it becomes.

Importing this module is light: a value becomes what a recipe takes only when there is a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import InterpError, SiteError
from interp.recipes.selection import (
    layer_list,
    layers_text,
    position_value,
    receivers_of,
    receivers_text,
    sites_of,
    sites_text,
    typed_position,
)
from interp.utils import checks
from interp.utils.arguments import is_number
from interp.utils.checks import Check


def _same(value: Any) -> Any:
    return value


def _same_for_any_model(model: Any, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class OptionType:
    """How one kind of option is read.

    ``check``: returns the value of a config, or raises ValueError with what is expected.  ``command_line``: the type
    of the command line's option.  ``from_command_line``: what is typed, as a config would hold it.  ``argument``: what
    the recipe takes, given the model and the checked value.  ``words``: what may be typed, if it is one of some words.
    """

    check: Check
    command_line: Any = str
    from_command_line: Callable[[Any], Any] = _same
    argument: Callable[[Any, Any], Any] = _same_for_any_model
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One option of a recipe.

    ``name``: its key in a config, and with dashes its name on the command line.  ``keyword``: that of the recipe's
    function, if it has another name.  ``default``: for both; None leaves it to the function.  ``stored``: whether a
    sweep's frozen config spells the default out.  ``required``: there is no default.
    """

    name: str
    type: OptionType
    help: str
    keyword: str = ""
    default: Any = None
    stored: bool = False
    required: bool = False

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """Return a value from the command line as a config would hold it. Raises InterpError for a bad one."""
        try:
            return self.type.check(self.type.from_command_line(value))
        except InterpError:
            raise
        except ValueError as error:
            expected = re.sub(r"'([^']*)'", r"\1", str(error))  # words on the command line have no quotes
            raise InterpError(f"{self.flag} {_shown(value)}: {expected}") from None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def choice(*values: str) -> OptionType:
    """Return the type of one of some words; on the command line, dashes or underscores may stand for spaces."""
    by_typed = {re.sub("[-_ ]", "-", value): value for value in values}
    return OptionType(
        checks.one_of(*values),
        from_command_line=lambda value: by_typed.get(re.sub("[-_ ]", "-", value), value),
        words=tuple(value.replace(" ", "-") for value in values),
    )


def whole(least: int) -> OptionType:
    """Return the type of a whole number from ``least`` on."""
    return OptionType(checks.whole(least), int)


def number(least: float, *, above: bool = False) -> OptionType:
    """Return the type of a finite number from ``least`` on (``above``: greater than it)."""
    return OptionType(checks.number(least, above=above), float)


def _any_number(value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError("a finite number expected")
    return float(value)


def _one_site(value: Any) -> str:
    from interp.sites import Site

    try:
        Site.parse(checks.text(value))
    except SiteError as error:
        raise ValueError(str(error)) from None
    return value


def _texts_of_file(path: Path) -> list[str]:
    from interp.prompts.files import read_texts

    return read_texts(path)


def _typed_positions(value: str) -> int | str | list[int | str]:
    """Read positions and names of spans, comma-separated."""
    items = [typed_position(item.strip()) for item in value.split(",")]
    return items[0] if len(items) == 1 else items


def _comma_separated(value: str) -> list[str]:
    return [item.strip() for item in value.split(",")]


def _words_by_name(items: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    if any(not name.strip() or not equals for name, equals, _ in pairs):
        raise ValueError("name=words expected")
    words_by_name = {name.strip(): words for name, _, words in pairs}
    if len(words_by_name) < len(pairs):
        raise ValueError("each name once expected")
    return words_by_name


def _table_of_texts(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, str) for v in value.values()):
        raise ValueError('a table of words by name expected: {subject = "Mary"}')
    return dict(value)


def _edits_by_name(value: Any) -> dict[str, str | list[str]]:
    from interp.interventions import parse_change

    if not isinstance(value, Mapping) or not value:
        raise ValueError('a table of attention edits by name expected: {cut = "knockout keys=subject"}')
    for texts in value.values():
        for text in texts if isinstance(texts, list) else [texts]:
            parse_change(checks.text(text))
    return dict(value)


def _edits(_model: Any, value: Mapping[str, str | list[str]]) -> dict[str, Any]:
    from interp.interventions import parse_change

    lists = {name: texts if isinstance(texts, list) else [texts] for name, texts in value.items()}
    return {name: [parse_change(text) for text in texts] for name, texts in lists.items()}


def _typed_edits(items: list[str]) -> dict[str, list[str]]:
    """Read ``name: fields`` (several of a name act at once), or the fields of one edit."""
    edits: dict[str, list[str]] = {}
    for item in items:
        name, colon, text = item.partition(":")
        is_named = colon and "=" not in name and " " not in name.strip()
        edits.setdefault(name.strip() if is_named else "edit", []).append(text.strip() if is_named else item)
    return edits


ANY_NUMBER = OptionType(_any_number, float)
LAYERS = OptionType(layers_text, argument=lambda model, value: layer_list(value))
POSITION = OptionType(position_value, from_command_line=typed_position)
# as the only position, a text of digits is a number in a config too
POSITIONS = OptionType(
    checks.either(position_value, checks.list_of(position_value)),
    from_command_line=typed_position,
    argument=lambda model, value: typed_position(value) if isinstance(value, str) else value,
)
PLACES = OptionType(
    checks.either(position_value, checks.list_of(position_value)),
    from_command_line=_typed_positions,
    argument=lambda model, value: _typed_positions(value) if isinstance(value, str) else value,
)
SITE = OptionType(_one_site)
SITES = OptionType(sites_text, argument=sites_of)
RECEIVERS = OptionType(receivers_text, argument=receivers_of)
TEXTS = OptionType(checks.list_of(checks.text, distinct=False), Path, _texts_of_file)
NAMES = OptionType(checks.list_of(checks.text), str, _comma_separated)
EDITS = OptionType(_edits_by_name, list[str], _typed_edits, _edits)
WORDS_BY_NAME = OptionType(_table_of_texts, list[str], _words_by_name)
