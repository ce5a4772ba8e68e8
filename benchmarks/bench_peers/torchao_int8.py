"""Convert SRC to OUT with torchao: int8 weights by row, activations quantized when the model runs.

`quantize_` keeps int8 weights as tensor subclasses, which safetensors does not hold, so that they go through
`torch.save`, as torchao's own documentation does. `lm_head` is left alone, as everybody else here does: it is tied.
"""

import sys
from pathlib import Path

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModelForCausalLM


def is_body_linear(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and name != "lm_head"


def main(src: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=is_body_linear)
    Path(out).mkdir(parents=True)
    torch.save(model.state_dict(), Path(out) / "pytorch_model.bin")
    model.config.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
