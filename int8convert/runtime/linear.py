"""The Linear layer of LLM.int8(): int8 for nearly all input features, 16 bits for the outlier columns.

    y = x8 @ weight8^T * x_absmax / 127 * weight_absmax / 127  +  x[:, O] @ weight[:, O]^T  +  bias

O are the outlier columns. The layer's mode selects them; see `modes`.

The parameters have the names of the checkpoint's tensors, so loading and saving convert nothing.
Source: LLM.int8(), arXiv:2208.07339, Sec. 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import nn

from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD, QuantizedWeight, hadamard
from int8convert.errors import FormatError
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.peft_guard import guard_adapters

_MIN_CAPACITY = 256


def max_found_columns(in_features: int) -> int:
    """Return how many outlier columns a batch may add to the stored ones; further ones are rounded like the rest.

    That is half of all columns, or 256. The paper's rule has no bound, but with more, int8 would save nothing. The
    largest model of the paper has seven such columns (Sec. 4.1). The input of a gated MLP's last layer has more: in a
    trained Qwen2 of 0.5B up to 1,673 of 4,864, in 256 tokens.
    """
    return min(in_features, max(_MIN_CAPACITY, in_features // 2))


@cache
def _hadamard_matrix(size: int, device: torch.device) -> torch.Tensor:
    """Return float32 [size, size], over sqrt(size)."""
    return torch.from_numpy(hadamard(np.eye(size, dtype=np.float32), size)).to(device)


def hadamard_rotated(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return x [..., in] with blocks of columns rotated in float32, as `cuda_kernels.reference.hadamard` does.

    The last bits may depend on the batch.
    """
    rotated = x.float().reshape(-1, size) @ _hadamard_matrix(size, x.device)
    return rotated.view(x.shape).to(x.dtype)


class Int8Linear(nn.Linear):
    """A Linear layer with an int8 weight.

    A subclass of nn.Linear, so that PEFT and offloading find it. Its weight takes no gradient; its input does, by the
    dequantized weight.

    Attributes:
        weight: int8 [out_features, in_features], codes.
        SCB: float32 [out_features], the row absmax, in the bitsandbytes layout; with weight_format, a zero byte.
        weight_scale: float32 [out_features, 1], absmax / 127, in that of compressed-tensors.
        outlier_columns: int32 [n], ascending; empty until `set_outliers`.
        outlier_weight: [out_features, n], those columns before quantization.
        input_block: size of the blocks of columns by which the input is rotated before all else, see
            `formats.transforms`; 1 rotates nothing. Outlier columns are those of the rotated input.
        mode: which columns stay 16-bit.
        threshold: magnitude from which a column is an outlier, in the units of x; 0 finds none.
    """

    weight_format: torch.Tensor
    outlier_columns: torch.Tensor
    outlier_weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: Format = Format.BITSANDBYTES,
        mode: OutlierMode = OutlierMode.DYNAMIC,
        threshold: float = OUTLIER_THRESHOLD,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight first
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.scale_name = module_of(layout).NAMES.scale
        self.stores_absmax = module_of(layout).STORES_ABSMAX
        self.input_block = 1
        self.mode = mode
        self.threshold = threshold
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        specs, zeros_name = module_of(layout).weight_specs(".weight", weight.shape), module_of(layout).NAMES.zeros
        scale = torch.empty(specs[f".{self.scale_name}"][1], dtype=torch.float32, device=device)
        self.register_parameter(self.scale_name, nn.Parameter(scale, requires_grad=False))
        if f".{zeros_name}" in specs:
            self.register_buffer(zeros_name, torch.zeros((), dtype=torch.uint8, device=device))
        empty_bias = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty_bias, requires_grad=False) if bias else None)
        self.register_buffer("outlier_columns", torch.empty(0, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer(
            "outlier_weight", torch.empty(out_features, 0, dtype=dtype, device=device), persistent=False
        )

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        mode: OutlierMode = OutlierMode.DYNAMIC,
        threshold: float = OUTLIER_THRESHOLD,
    ) -> Int8Linear:
        """Quantize a weight [out_features, in_features], in float16, bfloat16 or float32."""
        from cuda_kernels import ops

        rows = ops.row_quantize(weight.detach())
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias is not None, "meta", weight.dtype, mode=mode, threshold=threshold
        ).to_empty(device=weight.device)
        layer.weight.data, layer.SCB.data = rows.codes, rows.absmax
        layer.weight_format.zero_()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.show_scale()
        return layer

    def show_scale(self) -> None:
        """Set the scale as the attribute `SCB` of the weight, as bitsandbytes does.

        RWKV's code divides that scale in place. Without it, RWKV would divide the integer codes, which fails. A layer
        with stored columns has none, because the columns' weights would stay undivided.
        """
        if self.outlier_columns.numel():
            self.weight.__dict__.pop("SCB", None)
            return
        self.weight.SCB = getattr(self, self.scale_name)  # type: ignore[attr-defined]

    @property
    def weight_absmax(self) -> torch.Tensor:
        """float32 [out_features]."""
        scale: torch.Tensor = getattr(self, self.scale_name)
        return scale if self.stores_absmax else scale.view(-1) * N_STEPS

    @property
    def W_q(self) -> torch.Tensor:
        """The codes. PEFT calls `dequantize` on a layer with this name; else DoRA would take the codes for weights."""
        return self.weight

    def set_outliers(self, columns: torch.Tensor, weight: torch.Tensor) -> None:
        """Store the columns that stay 16-bit, [n], and their weights before quantization, [out_features, n]."""
        self.outlier_columns = columns.to(self.weight.device, torch.int32)
        self.outlier_weight = weight.to(self.weight.device)
        self.show_scale()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [..., out_features] for x [..., in_features], in the dtype of x. nn.Linear calls x `input`.

        Raises:
            FormatError: x has an integer dtype, because model code casts it to the dtype of a layer's weight.
        """
        from cuda_kernels import ops

        x = input
        if not x.is_floating_point():
            raise FormatError(
                f"an int8 Linear of {self.in_features:,} x {self.out_features:,} got an input of {x.dtype}, expected a "
                "float: the model's code casts it to the dtype of a weight",
                "convert the source again with --skip LAYER; int8convert verify names the layer",
            )
        x = self.rotate_input(x)
        stored = self.outlier_columns if self.mode.uses_stored else self.outlier_columns[:0]
        stored_weight = self.outlier_weight if self.mode.uses_stored else self.outlier_weight[:, :0]
        capacity = max_found_columns(self.in_features) if self.mode.finds and self.threshold > 0 else 0
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        if stored_weight.dtype != x.dtype:
            stored_weight = stored_weight.to(x.dtype)
        weight = QuantizedWeight(self.weight, self.weight_absmax, stored_weight, bias)
        return ops.int8_linear(x, weight, stored, self.threshold, capacity, self.mode.block_size)

    def rotate_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as it is quantized: rotated, or the same."""
        return x if self.input_block == 1 else hadamard_rotated(x, self.input_block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight of the codes, [out_features, in_features], with the stored outlier columns unchanged.

        It is that of inputs which are not rotated: the matrix of the rotation is its own inverse.
        """
        weight = (self.weight * (self.weight_absmax / N_STEPS)[:, None]).to(dtype)
        weight[:, self.outlier_columns.long()] = self.outlier_weight.to(dtype)
        return self.rotate_input(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        # .half() and .to(dtype) reach every floating tensor; rounded scales would shift every output.
        scale = self._parameters.pop(self.scale_name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        assert scale is not None
        moved = fn(scale.data)
        kept = moved if moved.dtype == torch.float32 else scale.data.to(moved.device)
        self._parameters[self.scale_name] = nn.Parameter(kept, requires_grad=False)
        self.show_scale()  # not the one of before, which may be on another device
        return self

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, mode={self.mode}, threshold={self.threshold:g}, "
            f"n_outlier_columns={self.outlier_columns.numel()}"
        )


guard_adapters(Int8Linear)
