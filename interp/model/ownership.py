"""What a Model does with the model object that it was made of: use it alone, save it, put it back."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Self

import torch

from interp.errors import ModelError
from interp.model.protocols import Bridge
from interp.model.session import Session
from interp.model.wiring import WIRING, Wiring


class Owner:
    """The part of `Model` that holds the bridge, its `Session` and its `Wiring`.

    A Model made of an object that another Model uses takes its place: the older one then refuses to run.
    """

    tokenizer: Any

    def __init__(self, bridge: Bridge, name: str):
        self.name = name
        self._bridge: Bridge | None = bridge
        self._gone = ""  # why the bridge may no longer be used
        earlier: Wiring | None = vars(bridge).get(WIRING)
        if earlier is not None and earlier.user is not None:  # a bridge of a loaded Model: install anew
            with earlier.lock:
                earlier.hand_over("its bridge was loaded again, and belongs to the newer Model")
                earlier.undo()
            self.wiring = Wiring(self._roots(bridge), earlier.base, earlier.lock)
        else:
            self.wiring = Wiring(self._roots(bridge), earlier, None if earlier is None else earlier.lock)
        self.session = Session(name, self.wiring.lock, self._root)

    @staticmethod
    def _roots(bridge: Any) -> list[Any]:
        return [bridge, bridge.original_model]

    def _root(self) -> torch.nn.Module:
        return self.bridge.original_model

    def _wired(self) -> None:
        """Say that installation is complete."""
        bridge: Any = self.bridge
        self.wiring.user = weakref.ref(self)
        self.wiring.finish(bridge, bridge.original_model)

    @property
    def bridge(self) -> Bridge:
        """TransformerLens' TransformerBridge. Raises ModelError once the model is released."""
        if self._bridge is None:
            raise ModelError(f"this Model of {self.name} can no longer be used: {self._gone}; load it with interp.load")
        return self._bridge

    @property
    def is_released(self) -> bool:
        """Whether the model object was put back, or belongs to a newer Model."""
        return self._bridge is None

    def retire(self, why: str) -> None:
        """Refuse every later use, which ``why`` explains."""
        self._bridge, self._gone = None, why

    def release(self) -> None:
        """Put the model object back as it was before `interp.load`, and refuse every later use of this Model.

            model = interp.load(hf_model, tokenizer=tokenizer)
            …
            model.release()                        # or: with interp.load(hf_model, tokenizer=tokenizer) as model: …
            hf_model.save_pretrained("folder")

        Modules, their names and classes, hooks, the config and training mode are those of before; weights have the
        values, dtype and device that they have now. What you changed on the object yourself since loading stays. Waits
        for other threads that are running the model. A second call does nothing.
        """
        if self._bridge is not None:
            self.wiring.release("it was released, so that the model object is as it was before loading")

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save weights, config and tokenizer as transformers does, with their original names.

            model.save_pretrained("folder")
            model = interp.load("folder")

        ``options``: those of `transformers.PreTrainedModel.save_pretrained`. Raises ModelError for a model that was
        loaded from a TransformerBridge, whose weights TransformerLens has renamed.
        """
        root = self.wiring.stages()[-1].roots[0]
        if not hasattr(root, "save_pretrained") or root is self.bridge:
            raise ModelError(
                f"{self.name} was loaded from a TransformerBridge, which has no weights file of its own: save the "
                "Hugging Face model before it is wrapped"
            )
        with self.wiring.undone():
            root.save_pretrained(folder, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.release()
