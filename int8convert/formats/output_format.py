"""The layouts of int8 weights that somebody else's loader reads: the tensors beside the codes, and what they hold."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype, shape), in the order of the bytes."""

_N_STEPS = np.float32(127)


_COMPRESSED_LEAVES = (
    *("weight_scale", "weight_zero_point", "weight_g_idx", "weight_packed", "weight_shape", "weight_global_scale"),
)


class OutputFormat(StrEnum):
    """Where the scale of an int8 weight stands, and as what.

    bitsandbytes: P.SCB, the row absmax [out], and P.weight_format, a zero byte.
    compressed-tensors: P.weight_scale, absmax / 127 rounded to float32 [out, 1].
    """

    BITSANDBYTES = "bitsandbytes"
    COMPRESSED_TENSORS = "compressed-tensors"

    def weight_specs(self, name: str, shape: tuple[int, ...]) -> TensorSpecs:
        """The tensors an [out, in] weight of that name becomes, its codes first."""
        module = name.removesuffix(".weight")
        if self is OutputFormat.BITSANDBYTES:
            return {name: ("I8", shape), f"{module}.SCB": ("F32", shape[:1]), f"{module}.weight_format": ("U8", ())}
        return {name: ("I8", shape), f"{module}.weight_scale": ("F32", (shape[0], 1))}

    def names_beside(self, name: str) -> list[str]:
        """The names that the loader reads as part of an int8 weight, those it does without included.

        A tensor of such a name that means something else would change the layer.
        """
        module = name.removesuffix(".weight")
        leaves = ("SCB", "weight_format") if self is OutputFormat.BITSANDBYTES else _COMPRESSED_LEAVES
        return [f"{module}.{leaf}" for leaf in leaves]

    def scale_tensors(self, name: str, absmax: npt.NDArray[np.float32]) -> dict[str, memoryview]:
        """The bytes of the tensors beside the codes."""
        _, *others = self.weight_specs(name, (absmax.size, 0))
        if self is OutputFormat.BITSANDBYTES:
            return dict(zip(others, (absmax.view(np.uint8).data, memoryview(b"\0")), strict=True))
        return {others[0]: (absmax / _N_STEPS).view(np.uint8).data}
