"""A repository of facebook/opt-66b's shape on the tests' Hub: 14 `.bin` files of 131 GB in all, on next to no disk.

torch writes each file's directory and pickle, and leaves holes where the data would be. Names are those of the
original, without `model.`; nobody asks for the files' hashes, which are made up.
"""

import hashlib
import json
from pathlib import Path

import torch

from benchmarks.make_checkpoint import SHAPES, build_config, list_tensors, split_into_shards
from tests.tools.hub_server.blobs import KnownFile
from tests.tools.hub_server.hub import Hub

NAME = "facebook/opt-66b"


def add_opt_66b(hub: Hub, folder: Path) -> int:
    """Put it on the Hub; the bytes of its weights."""
    shape = SHAPES["opt-66b"]
    shards = split_into_shards(list_tensors(shape), shape.n_shards)
    files: dict[str, bytes | Path | KnownFile] = {"config.json": json.dumps(build_config(shape, "float16")).encode()}
    weight_map = {}
    n_bytes = 0
    folder.mkdir(parents=True)
    for i, tensors in enumerate(shards, 1):
        name = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        state = {t.name.removeprefix("model."): torch.empty(t.shape, dtype=torch.float16) for t in tensors}
        with torch.serialization.skip_data():
            torch.save(state, folder / name)
        weight_map |= dict.fromkeys(state, name)
        files[name] = KnownFile(folder / name, hashlib.sha256(name.encode()).hexdigest())
        n_bytes += (folder / name).stat().st_size
    files["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    hub.add_repo(NAME, files)
    return n_bytes
