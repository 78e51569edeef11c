"""ModelFacts: what a model is made of, its sites, and the record of how its attention was computed."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch

from interp.model.buffers import buffer_state
from interp.model.install import stacks
from interp.model.instrument import Instrument
from interp.model.ownership import Owner
from interp.sites import COMPONENTS, Sites, enumerate_sites
from interp.utils.html_card import card
from interp.utils.provenance import text_hash, weights_hash


class ModelFacts(Owner):
    """The part of `Model` that states facts and enumerates sites."""

    instruments: dict[str, Instrument]
    _layers_with: dict[str, list[int]]
    _buffers_at_load: str

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.bridge.cfg.n_layers)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have softmax attention.

        These are all layers, except in hybrid models (Jamba, Qwen3-Next, …).
        """
        by_stack = stacks(self.bridge)
        return list(by_stack.get("") or by_stack["decoder"])

    def layers_with(self, component: str) -> list[int]:
        """The layers that have a component of `interp.sites.COMPONENTS`; [0] for one that exists once.

        Hybrid models have attention, and with it ``attn_out`` and heads, in some layers only.
        """
        if component not in self._layers_with:
            spec, names = COMPONENTS[component], self.bridge.hook_dict
            layers = [i for i in range(self.n_layers if spec.per_layer else 1) if spec.hook.format(layer=i) in names]
            if component == "resid_mid":  # it is set through attention's output
                layers = [i for i in layers if f"blocks.{i}.hook_attn_out" in names]
            self._layers_with[component] = layers
        return self._layers_with[component]

    @property
    def stacks(self) -> list[str]:
        """Names of an encoder–decoder model's stacks: encoder, decoder, cross.

        The list is empty for a model with one stack.
        """
        return list(self.instruments) if "decoder" in self.instruments else []

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return int(self.bridge.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads per layer.

        It is smaller than ``n_heads`` under grouped-query attention.
        """
        return int(getattr(self.bridge.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def n_neurons(self) -> int:
        """Number of neurons of each MLP (mlp_post).

        It is 0 if there are none to address: no MLPs, or experts.
        """
        widths = []
        for block in getattr(self.bridge, "blocks", ()):
            # the hook of mlp_post is on the input of the output projection (for experts it is on their output)
            project = getattr(getattr(block, "mlp", None), "out", None)
            weight = getattr(getattr(project, "original_component", None), "weight", None)
            in_features = getattr(getattr(project, "original_component", None), "in_features", None)
            widths.append(0 if weight is None else in_features or weight.numel() // self.d_model)
        return min(widths, default=0)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.bridge.cfg.d_model)

    @property
    def n_ctx(self) -> int:
        """Longest context that the model was made for, in tokens."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        """Device of the token embedding: inputs go there."""
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.bridge.parameters()).dtype

    def __repr__(self) -> str:
        if self.is_released:
            return f"Model({self.name}: released)"
        kv = f" ({self.n_kv_heads} KV)" if self.n_kv_heads != self.n_heads else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name}: {self.n_layers} layers × {self.n_heads} heads{kv}, "
            f"d_model {self.d_model}, {dtype}, {self.device})"
        )

    def _repr_html_(self) -> str:
        if self.is_released:
            return card(f"Model {self.name}", {"state": "released"})
        properties = {
            "layers × heads": f"{self.n_layers} × {self.n_heads}", "KV heads": self.n_kv_heads, "d_model": self.d_model,
            "context": self.n_ctx, "dtype": str(self.dtype).removeprefix("torch."), "device": self.device,
        }  # fmt: skip
        return card(f"Model {self.name}", properties)

    def sites(
        self,
        component: str,
        *,
        layers: Iterable[int] | int | None = None,
        heads: Iterable[int] | int | None = None,
        positions: Iterable[int | str] | int | str | None = None,
    ) -> Sites:
        """All sites of a component: layers × heads × positions; join several with ``|``.

            model.sites("z")                                          # every head, at all positions at once
            model.sites("resid_pre", layers=range(4), positions=-1)
            model.sites("attn_out") | model.sites("mlp_out")          # every position of every layer

        Arguments as those of `interp.sites.enumerate_sites`. Only layers that have the component are enumerated: in a
        hybrid model, attn_out and heads exist in its attention layers only. Raises SiteError for an unknown component
        or an index out of range.
        """
        if layers is None and component in COMPONENTS and COMPONENTS[component].per_layer and not self.stacks:
            layers = self.layers_with(component) or None  # one that no layer has is refused by recipes, by name
        return enumerate_sites(
            component, n_layers=self.n_layers, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads,
            n_neurons=self.n_neurons if component == "mlp_post" else 0, layers=layers, heads=heads,
            positions=positions,
        )  # fmt: skip

    def backend_report(self) -> pd.DataFrame:
        """One row per layer: which backends computed its attention since loading, and in how many calls.

        The column dense_because says why the latest call was computed densely, and is empty if it was not.
        """
        rows = []
        for stack, attentions in stacks(self.bridge).items():
            for layer in range(self.n_layers if not stack else len(attentions)):
                record, attn = self.instruments[stack].record(layer), attentions.get(layer)
                backends = ", ".join(f"{b} ×{n}" for b, n in record.backends.items()) or "not run yet"
                row = {
                    "layer": layer,
                    "attention": "none" if attn is None else type(attn.original_component).__name__,
                    "backend": "" if attn is None else backends,
                    "calls": record.calls,
                    "dense_because": record.dense_because,
                }
                rows.append(row if len(self.instruments) == 1 else {"stack": stack or "text", **row})
        return pd.DataFrame(rows)

    def fingerprint(self) -> str:
        """A short hash over every weight's name, shape and values.

        Up to 4,096 evenly spaced values of each weight are used. If buffers (rotary frequencies) are no longer those
        with which the model was loaded, they are part of it.
        """
        with self.session.lock:
            weights = weights_hash(self.bridge.original_model.named_parameters())
            buffers = buffer_state(self.bridge.original_model)
        return weights if buffers == self._buffers_at_load else text_hash(f"{weights} {buffers}")
