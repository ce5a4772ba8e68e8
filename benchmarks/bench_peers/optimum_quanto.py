"""Convert SRC to OUT with optimum-quanto: qint8 weights, `lm_head` left alone because it is tied."""

import sys

import torch
from optimum.quanto import QuantizedModelForCausalLM, qint8
from transformers import AutoModelForCausalLM


def main(src: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float16)
    # `quantize` of this class also freezes, which is when the weights become int8.
    QuantizedModelForCausalLM.quantize(model, weights=qint8, exclude="lm_head").save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
