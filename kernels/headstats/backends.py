"""The table of backends.

A row says what a backend cannot do, and holds its forward and the backward that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headstats import reference
from headstats.autograd import Backward, Forward, with_gradients
from headstats.blocked import backend as blocked
from headstats.blocked import recompute
from headstats.call import Call
from headstats.cpu import backend as cpu
from headstats.triton import backend as triton
from headstats.triton import launch_backward

if TYPE_CHECKING:
    from torch import Tensor

    from headstats.stats import Result


@dataclass(frozen=True)
class Backend:
    """One way to compute a call.

    unsupported: why the backend cannot do a call, or None.
    forward: out [B, H, M, Dv], norm [2, B, H, M] (see `call.lse_of`) and the requested statistics by name.
    backward: d loss / d leaf by name, given the names of the leaves, out, norm and d loss / d (out, lse); None if
        autograd differentiates the forward itself.
    """

    unsupported: Callable[[Call], str | None]
    forward: Forward
    backward: Backward | None

    def run(self, call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
        """Return what `forward` returns, with gradients where some argument requires them."""
        if self.backward is None or not call.trainable:
            return self.forward(call)
        return with_gradients(call, self.forward, self.backward)


def _tile_backward(
    call: Call, leaf_names: set[str], out: Tensor, norm: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """Compute every gradient tile by tile in plain torch."""
    return recompute.backward(call, leaf_names, out, norm, grad_out, grad_lse)


def _triton_backward(
    call: Call, leaf_names: set[str], out: Tensor, norm: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """Run the Triton kernels if they compute every gradient, else the tile backward."""
    in_kernels = not launch_backward.unsupported(call, leaf_names)
    backward = launch_backward.backward if in_kernels else _tile_backward
    return backward(call, leaf_names, out, norm, grad_out, grad_lse)


# In the order in which backend="auto" tries them on CUDA.
BACKENDS = {
    "triton": Backend(triton.unsupported, triton.forward, _triton_backward),
    "compiled": Backend(cpu.unsupported, cpu.forward, _tile_backward),
    "blocked": Backend(blocked.unsupported, blocked.forward, _tile_backward),
    "reference": Backend(reference.unsupported, reference.run, None),
}
