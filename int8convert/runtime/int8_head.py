"""The output head in int8, while the model runs; the checkpoint keeps it in 16 bits.

A head is up to a third of what a small model reads for a token.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from int8convert.errors import SourceError
from int8convert.runtime.in_memory import refuse_saving
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode


def quantize_head(model: Any) -> None:
    """Replace the output head of a loaded model by an int8 one with a scale for each block of inputs.

    Its inputs have no few large columns: in a trained Qwen2 of 0.5B, 895 of 896 reach the threshold. There the head
    alone costs a KL divergence of 0.0005 over bfloat16's, as with the paper's rule and half of the columns in 16 bits.

    An embedding that shares the head's weight keeps it, so memory then grows by the codes. The model cannot be saved
    afterwards. Does not know how far the outputs move: compare them.

    Raises:
        SourceError: the model has no head of its own, or one that is no Linear layer in floats.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.dtype.is_floating_point:
        found = "no output head" if head is None else f"a {type(head).__name__} of {head.weight.dtype} as its head"
        raise SourceError(
            f"{type(model).__name__} has {found}, expected a Linear layer of floats", "leave the head as it is"
        )
    (name,) = {name for name, module in model.named_modules() if module is head}
    model.set_output_embeddings(Int8Linear.from_float(head.weight, head.bias, mode=OutlierMode.BLOCKS))
    refuse_saving(model, name, "load the checkpoint again, with its head in 16 bits")
