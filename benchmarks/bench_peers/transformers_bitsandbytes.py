"""Convert SRC to OUT the way most people do: transformers' `load_in_8bit` by bitsandbytes, on the CPU."""

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(src: str, out: str) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(src, quantization_config=config, device_map="cpu", dtype=torch.float16)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
