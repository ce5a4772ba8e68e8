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

    The paper's rule would not help: nearly all inputs of a head reach the threshold, in a trained Qwen2 of 0.5B 895 of
    896. In that model an int8 head alone causes a KL divergence of 0.0006, and a bfloat16 head one of 0.0002.

    An embedding that shares the head's weight keeps it, so memory then grows by the codes. The model cannot be saved
    afterwards. This function does not measure how far the outputs move.

    Raises:
        SourceError: the model has no head, or its head is not a Linear layer of floats.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.dtype.is_floating_point:
        found = "no output head" if head is None else f"a {type(head).__name__} of {head.weight.dtype} as its head"
        raise SourceError(
            f"{type(model).__name__} has {found}, expected a Linear layer of floats", "leave the head as it is"
        )
    (name,) = {name for name, module in model.named_modules() if module is head}
    model.config.tie_word_embeddings = False  # or else whatever ties weights again would take the codes' place
    model.set_output_embeddings(Int8Linear.from_float(head.weight, head.bias, mode=OutlierMode.BLOCKS))
    refuse_saving(model, name, "load the checkpoint again, with its head in 16 bits")
