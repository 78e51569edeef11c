"""A `Call` as numbers, addresses and strides for the compiled library."""

from __future__ import annotations

from ctypes import Structure
from typing import TYPE_CHECKING, Any

import torch

from headstats import probes
from headstats.call import HIDDEN, HIDDEN_BIAS, Call
from headstats.edits import hash_noise
from headstats.edits.lowering import LAYOUTS, LoweredCall
from headstats.stats import Result, TopK

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Statistics by the shape of their result.
OF_ROWS = (
    "entropy", "entropy_normalised", "max_prob", "argmax", "participation", "effective_keys", "distance",
    "distance_var", "waad", "sink", "diagonal", "previous", "local", "value_norm",
)  # fmt: skip
OF_KEYS = ("received", "received_max", "fai", "column_norm")
LISTS = ("topk", "segments", "segment_value_norms", "segment_outputs", "targets", "key_features")
COMPUTED = (*OF_ROWS, *OF_KEYS, *LISTS)


class CallArguments:
    """The C structure of one call, the tensors that it points to, and the results."""

    def __init__(self, call: Call, structure: type[Structure]):
        self.call, self.c = call, structure()
        self.names = {field[0] for field in structure._fields_}
        self.alive: list[Tensor] = []
        b, h, m, _ = call.q.shape
        self.out = torch.empty(b, h, m, call.v.shape[3], dtype=call.dtype, device="cpu")
        self.norm = torch.empty(2, b, h, m, dtype=call.dtype, device="cpu")
        self.stats: dict[str, Result] = {}
        self._set(
            dtype=DTYPES[call.q.dtype], B=b, H=h, Hk=call.k.shape[1], M=m, N=call.n, D=call.q.shape[3],
            Dv=call.v.shape[3], prefixed=call.n - call.k.shape[2], causal=call.causal, window=call.window or 0,
            softcap=call.softcap or 0.0, scale=call.scale, out=self.out, norm=self.norm,
        )  # fmt: skip
        self._set_inputs()
        self._set_options()
        self._set_segments()
        self._set_edit()
        for name, value in call.spec.requested().items():
            self._add_statistic(name, value)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            assert name in self.names, name
            if isinstance(value, torch.Tensor):
                self.alive.append(value)
                value = value.data_ptr()
            setattr(self.c, name, value)

    def _set_strided(self, name: str, x: Tensor | None, axes: str) -> None:
        """Set an array in the dtype of logits, and its strides.

        Axes of size 1 only broadcast.
        """
        if x is not None:
            x = self._to_dtype(x)
            strides = {f"{name}_{a}": s if n > 1 else 0 for a, s, n in zip(axes, x.stride(), x.shape, strict=True)}
            self._set(**{name: x}, **strides)

    def _to_dtype(self, x: Tensor) -> Tensor:
        return x.detach().to(self.call.dtype)

    def _set_inputs(self) -> None:
        call = self.call
        for name in ("q", "k", "v", "prefix_k", "prefix_v"):
            if (x := getattr(call, name)) is not None:
                self._set(**{name: x}, **dict(zip((f"{name}_{a}" for a in "bhmd"), x.stride(), strict=True)))
        if call.prefix_k is not None:
            self._set(runs=call.prefix_k.shape[0])

    def _set_options(self) -> None:
        call = self.call
        self._set_strided("bias", call.bias, "bhmd")
        if call.bias is not None:
            self._set(bias_hides=max(torch.finfo(call.bias.dtype).min, HIDDEN_BIAS))
        for name in ("alibi", "sinks", "key_padding", "query_padding"):
            if (x := getattr(call, name)) is not None:
                self._set(**{name: (x if x.dtype == torch.bool else self._to_dtype(x)).contiguous()})

    def _set_segments(self) -> None:
        """Set ids and tables over segments.

        Ids start at 1 and tables with "no segment", so loops never see -1.
        """
        call = self.call
        log2_gain = None if call.gain is None else call.gain.to(call.dtype).log2().clamp_min(HIDDEN)
        if isinstance(call, LoweredCall) and call.log2_gain is not None:
            log2_gain = call.log2_gain
        masks = {"segment_mask": call.segment_mask, "segment_open": call.segment_open}
        edits = {
            "knockout": call.knockout, "edit_bias": call.edit_bias, "logit_factor": call.logit_factor,
            "logit_raise": call.logit_raise, "log2_gain": log2_gain,
        }  # fmt: skip
        self._set_tables("q_segments", call.q_segments, masks)
        self._set_tables("edit_q_segments", call.edit_q_segments, edits)
        if call.k_segments is not None:
            self._set_ids("k_segments", call.k_segments + 1)
        acts = log2_gain is not None or (isinstance(call, LoweredCall) and call.layout is not None)
        within = acts and isinstance(call, LoweredCall) and call.within
        self._set(after=acts and not within, within=within)

    def _set_tables(self, ids_name: str, ids: Tensor | None, tables: dict[str, Tensor | None]) -> None:
        present = {name: t for name, t in tables.items() if t is not None}
        if not present:
            return
        assert ids is not None  # validated: a table needs them
        # `one_table_row_per_query` makes tables with as many rows as queries, and therefore no row for segment -1.
        self._set_ids(ids_name, (ids + 1).remainder(min(t.shape[2] for t in present.values())))
        for name, table in present.items():
            table = table if table.dtype == torch.bool else self._to_dtype(table)
            table = table.roll((1, 1), (2, 3)).contiguous()
            strides = [s if n > 1 else 0 for s, n in zip(table.stride(), table.shape, strict=True)]
            self._set(**{name: table}, **{f"{name}_{a}": s for a, s in zip("bhm", strides[:3], strict=True)})

    def _set_ids(self, name: str, ids: Tensor) -> None:
        ids = ids.to(torch.int32).contiguous()
        self._set(**{name: ids, f"{name}_b": ids.shape[1] if len(ids) > 1 else 0})

    def _set_edit(self) -> None:
        call = self.call
        if isinstance(call, LoweredCall) and call.layout is not None:
            self._set(layout=1 + LAYOUTS.index(call.layout))
            for name, x in (("levels", call.levels), ("tops", call.tops)):
                if x is not None:
                    self._set(**{name: self._to_dtype(x).contiguous()})
            rows, heads = (torch.arange(size, device="cpu") for size in call.q.shape[:2])
            self._set(states=hash_noise.states(call.counterfactual_seed, rows, heads).to(torch.int32))
        self._set_strided("temperature", call.temperature, "bhm")
        self._set_strided("gate", call.gate, "bhm")
        self._set_strided("replacement", call.replacement, "bhmd")

    def _allocate(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.empty(*self.call.q.shape[:2], *shape, dtype=dtype or self.call.dtype, device="cpu")
        self._set(**{name: x})
        return x

    def _add_statistic(self, name: str, value: Any) -> None:
        """Allocate the result of a statistic, and set the arguments that it needs."""
        call, m = self.call, self.call.q.shape[2]
        if name in OF_KEYS:
            self.stats[name] = self._allocate(name, call.n)
        elif name in OF_ROWS:
            self.stats[name] = self._allocate(name, m, dtype=torch.int64 if name == "argmax" else None)
        if name == "topk":
            self._set(topk_count=value)
            indices = self._allocate("topk_indices", m, value, dtype=torch.int64)
            self.stats[name] = TopK(self._allocate("topk_values", m, value), indices)
        elif name in ("waad", "local"):
            self._set(**{f"{name}_at": value})
        elif name == "fai":
            self._set(fai_near=value[0], fai_far=value[1])
        elif name == "sink":
            keys = probes.first_real_keys(call, value).contiguous()
            self._set(sink_keys=keys, sink_keys_b=keys.shape[1] if len(keys) > 1 else 0, sink_count=keys.shape[1])
        elif name in ("segments", "segment_value_norms", "segment_outputs"):
            self._set(n_segments=call.n_segments)
            last = (call.v.shape[3],) if name == "segment_outputs" else ()
            self.stats[name] = self._allocate(name, m, call.n_segments, *last)
        elif name == "targets":
            assert call.targets is not None  # validated
            keys = call.targets.to(torch.int64).contiguous()
            self._set(target_keys=keys, target_keys_b=keys[0].numel() if len(keys) > 1 else 0, n_targets=keys.shape[2])
            self.stats[name] = self._allocate(name, m, keys.shape[2])
        elif name == "key_features":
            assert call.key_features is not None  # validated
            x = self._to_dtype(call.key_features).contiguous()
            self._set(features=x, features_b=x[0].numel() if len(x) > 1 else 0, n_features=x.shape[2])
            self.stats[name] = self._allocate(name, m, x.shape[2])
