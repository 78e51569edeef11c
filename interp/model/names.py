"""Names of models: what a misspelt one may mean, and whether the hub can be asked."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

EMBEDDED = ("smollm2", "smollm2-135m", "smollm2-135m-instruct")
CLOSE = 0.75  # of difflib's similarity, 1 for the same name


def did_you_mean(name: str) -> str:
    """Return " Did you mean …?" with known names close to ``name``; nothing if there is none.

    Known are the embedded model, model folders and GGUF files next to where ``name`` points, models in the cache of the
    hub, and those that TransformerLens lists.
    """
    known = dict.fromkeys([*EMBEDDED[:1], *_neighbours(Path(name).expanduser(), name), *_cached(), *_listed()])
    by_spelling = {}
    for other in reversed(known):  # the first of two names with one spelling
        by_spelling[other.lower()] = other
        by_spelling[other.lower().rpartition("/")[2]] = other
    spelling = name.lower()
    close = get_close_matches(spelling, by_spelling, 3, CLOSE)
    close += get_close_matches(spelling.rpartition("/")[2], by_spelling, 3, CLOSE)
    names = [n for n in dict.fromkeys(by_spelling[c] for c in close) if n != name][:3]
    return f" Did you mean {' or '.join(map(repr, names))}?" if names else ""


def _neighbours(path: Path, name: str) -> list[str]:
    """Model folders and GGUF files in the folder that a path points into, written as the path is."""
    start = name[: len(name) - len(path.name)] if name.endswith(path.name) else ""
    try:
        return [
            start + entry.name
            for entry in sorted(path.parent.iterdir())
            if entry.suffix.lower() == ".gguf" or (entry / "config.json").is_file()
        ]
    except OSError:
        return []


def _cached() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folders = sorted(p.name for p in Path(HF_HUB_CACHE).glob("models--*"))
    except OSError:
        return []
    return [folder.removeprefix("models--").replace("--", "/") for folder in folders]


def _listed() -> list[str]:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    return list(OFFICIAL_MODEL_NAMES)


def is_hub_unreachable(name: str) -> bool:
    """Whether the model hub answers nothing at all about a name, which one request finds out.

    transformers repeats every request for half a minute. Where the hub is switched off (HF_HUB_OFFLINE) nothing is
    asked, and transformers fails at once.
    """
    from huggingface_hub import constants, get_session, hf_hub_url

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "TRUE", "YES"):
        return False
    try:
        url = hf_hub_url(name, "config.json")
    except ValueError:  # no name that the hub could have
        return False
    try:
        get_session().head(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the client's own errors; an answer of any status is none
        return True
    return False
