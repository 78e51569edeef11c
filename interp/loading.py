"""From a name, a folder, a GGUF file or a model object to a TransformerBridge; nothing installed, nothing executed."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch

from interp.errors import InterpError, ModelError

EMBEDDED = ("smollm2", "smollm2-135m", "smollm2-135m-instruct")


def boot(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, str]:
    """A TransformerBridge and a name for it. Raises ModelError with one clear message."""
    from transformer_lens.model_bridge import TransformerBridge

    _never_install()
    if isinstance(source, TransformerBridge):
        if dtype is not None or device is not None:
            source.to(*(x for x in (device, dtype) if x is not None))
        return source, str(getattr(source.cfg, "model_name", None) or "bridge")
    if isinstance(source, torch.nn.Module):
        return _from_object(source, tokenizer, dtype, device)
    if not isinstance(source, str | Path):
        raise ModelError(
            f"cannot load a {type(source).__name__}: pass a hub id, a folder, a .gguf file, a Hugging Face model "
            "or a TransformerBridge"
        )
    name = str(source)
    if name.lower() in EMBEDDED:
        from interp.zoo.embedded import embedded_model

        folder = embedded_model()
        return _from_pretrained("SmolLM2-135M-Instruct", folder, dtype, device, tokenizer, False, None)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" or path.exists():
        return _from_path(path, dtype, device, tokenizer, trust_remote_code)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"{name} does not exist; give an existing folder, a .gguf file or a hub id like 'gpt2'")
    return _from_pretrained(name, name, dtype, device, tokenizer, trust_remote_code, revision)


def _from_path(path: Path, dtype: Any, device: Any, tokenizer: Any, trust_remote_code: bool) -> tuple[Any, str]:
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file but not a .gguf; give the folder that holds config.json instead")
        return _from_pretrained(
            path.stem, path.parent, dtype, device, tokenizer, trust_remote_code, None, gguf=path.name
        )
    if not (path / "config.json").exists():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: pass that file" if ggufs else ""
        raise ModelError(f"{path} holds no config.json, so it is not a Hugging Face model folder{hint}")
    return _from_pretrained(path.name, path, dtype, device, tokenizer, trust_remote_code, None)


def _from_pretrained(
    name: str, where: str | Path, dtype: Any, device: Any, tokenizer: Any,
    trust_remote_code: bool, revision: str | None, gguf: str | None = None,
) -> tuple[Any, str]:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        options["revision"] = revision
    if gguf:
        options["gguf_file"] = gguf
    try:
        with _quiet():
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(where, **options)
            # Safetensors (or GGUF) only: pickled checkpoints can execute code when they are opened.
            safe = {} if gguf else {"use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or torch.float32, **safe, **options)
    except Exception as error:
        raise ModelError(_why_not(name, error)) from error
    if device is not None:
        model = model.to(device)
    return _wrap(name, model, tokenizer)


def _from_object(model: Any, tokenizer: Any, dtype: Any, device: Any) -> tuple[Any, str]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"cannot load a bare {type(model).__name__}: pass a Hugging Face PreTrainedModel or a TransformerBridge"
        )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if tokenizer is None:
        tokenizer = _tokenizer_of(name)
    if dtype is not None or device is not None:
        model = model.to(*(x for x in (device, dtype) if x is not None))
    return _wrap(name, model, tokenizer)


def _tokenizer_of(name: str) -> Any:
    """The tokenizer beside a model object's weights; ModelError if it cannot be found."""
    from transformers import AutoTokenizer

    try:
        if not name or not (Path(name).exists() or "/" in name):
            raise OSError("the model object does not say where it came from")
        with _quiet():
            return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ModelError(
            f"no tokenizer was found for the model object {name!r} ({_first_line(error)}): pass tokenizer=…"
        ) from error


def _wrap(name: str, model: Any, tokenizer: Any) -> tuple[Any, str]:
    from transformer_lens.model_bridge import TransformerBridge

    if tokenizer is not None and not tokenizer.init_kwargs.get("name_or_path"):
        # Made in memory: TransformerLens would look it up on the hub to switch BOS on. It prepends BOS itself.
        tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    if not getattr(model.config, "architectures", None):
        model.config.architectures = [type(model).__name__]  # a model made from a config alone does not say
    first = next(model.parameters())
    try:
        with _quiet():
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=tokenizer, device=first.device, dtype=first.dtype
            )
    except Exception as error:
        raise ModelError(
            f"TransformerLens cannot wrap {name} ({type(model).__name__}): {_first_line(error)}"
        ) from error
    return bridge, name


def _why_not(name: str, error: Exception) -> str:
    """One readable sentence for the usual ways in which loading fails."""
    text = str(error)
    if isinstance(error, InterpError):
        return text
    if "safetensors" in text and ("does not appear to have" in text or "no file named" in text.lower()):
        return (
            f"{name} offers no safetensors weights. interp opens no pickled checkpoints, since opening one can run "
            "code; convert it, or load it yourself and pass the model object."
        )
    if "trust_remote_code" in text:
        return f"{name} needs code from its repository; if you trust it, pass trust_remote_code=True"
    offline = ("couldn't connect", "offline", "connection", "resolve host", "max retries", "localentrynotfound")
    if any(word in (text + type(error).__name__).lower() for word in offline):
        return (
            f"{name} is not a local folder, and the model hub cannot be reached ({type(error).__name__}). "
            "Give a local folder, use 'smollm2', or try again with a network."
        )
    return f"cannot load {name}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _never_install() -> None:
    """TransformerLens would pip-install torchvision (and with it another torch) when some models boot."""
    import importlib.util

    from transformer_lens.model_bridge.sources.transformers import helpers

    helpers._ensure_torchvision = lambda: importlib.util.find_spec("torchvision") is not None


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep transformers' progress bars and info lines out of notebooks and logs while weights load."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    level = logging.getLogger("transformers").level
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()
