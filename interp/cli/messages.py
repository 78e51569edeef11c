"""Say on the command line what a message of the Python functions says about their arguments.

``mode='noise'`` becomes ``--mode noise`` where the command has that option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PHRASES = {
    "load it with tokenizer=…": "put its tokenizer's files into the model's folder, or use interp.load(…, tokenizer=…) "
    "in Python",
    "pass tokenizer=…": "put its tokenizer's files into the model's folder, or use interp.load(…, tokenizer=…) in "
    "Python",
    "if you trust it, pass trust_remote_code=True": "if you trust it, use interp.load(…, trust_remote_code=True) in "
    "Python: the command line runs no such code",
    "give every PromptPair foil=…, or use interp.logprob": "give every pair a foil, or use --metric logprob",
    "give PromptPair(foil=…), or use metric=interp.logprob": "give every pair a foil, or use --metric logprob",
    "pass sites, e.g. model.sites('z'), or groups={'name': sites}": "name some with --sites or --group",
}
VALUE = r"('[^']*'|\"[^\"]*\"|…|[\w.+-]*\w|(?=[\s,;.)]|$))"


def options_of(command: Any, arguments: Sequence[str]) -> dict[str, str]:
    """Return the options of the command that is typed, by their names in Python: ``{"n_boot": "--n-boot"}``."""
    for word in arguments:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
    return {
        parameter.name: max((opt for opt in parameter.opts if opt.startswith("--")), key=len)
        for parameter in command.params
        if parameter.name and any(opt.startswith("--") for opt in parameter.opts)
    }


def spoken(message: str, options: Mapping[str, str]) -> str:
    """Return a message in the words of the command line.

    ``options``: those of the command, as `options_of` gives them. Arguments that are no option stay as they are.

        spoken("unknown mode: use mode='noise'", {"mode": "--mode"})   # unknown mode: use --mode noise
    """
    for python, typed in PHRASES.items():
        message = message.replace(python, typed)

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'\"").removeprefix("interp.")
        if name not in options:
            return match[0]
        return options[name] if value in ("…", "True", "") else f"{options[name]} {value}"

    named = "|".join(map(re.escape, options)) or "(?!)"
    message = re.sub(rf"\bleave (?:out )?({named})=None\b", lambda m: f"leave {options[m[1]]} out", message)
    return re.sub(rf"(?<![\w.(:,'\"])({named})={VALUE}", option, message)
