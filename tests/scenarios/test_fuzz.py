"""Mutants of valid checkpoints end in an `Int8ConvertError`, or in a source that can be read; in nothing else.

Seeded: case number n of a kind is the same on every machine, so a failure names all that is needed to see it again.
`INT8CONVERT_FUZZ_CASES` sets the number of cases of each kind; CI takes what fits in some seconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from int8convert.checkpoint.source import SourceShard
from int8convert.errors import Int8ConvertError
from tests.tools.attacks.assembler import legacy_file, legacy_storage, tensor
from tests.tools.attacks.mutate import mutate_bytes, mutate_json_text
from tests.tools.attacks.open_measured import check_lines, check_source, open_checkpoint, time_limit
from tests.tools.attacks.registry import CONFIG, INDEX, write_json, write_safetensors
from tests.tools.tiny_models import file_bytes

N_CASES = int(os.environ.get("INT8CONVERT_FUZZ_CASES", "150"))
MAX_CASE_S = 10
MAX_ADDRESS_BYTES = 3_000_000_000
"""Beyond what the process has mapped when a kind begins: what asks for more gets a MemoryError, and so a failure."""

TORCH_REFUSES = (RuntimeError, ValueError)
"""What `torch.load(weights_only=True)` raised on those of 40,000 mutants that are read here: its zip reader is stricter
about what no tensor depends on, such as the `version` record. UnicodeDecodeError is a ValueError."""

Mutator = Callable[[random.Random], bytes]


@dataclass
class Tally:
    """How the cases of one kind ended, for the report."""

    n_success: int = 0
    n_loaded_by_torch: int = 0
    n_by_error: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0


def torch_bytes(is_zip: bool) -> bytes:
    """A `.bin` file as torch itself writes it: views, ties, a scalar, an empty tensor, a parameter."""
    base = torch.arange(24, dtype=torch.float16).reshape(4, 6)
    state_dict = {
        "a.weight": base,
        "a.transposed": base.t(),
        "tied": base,
        "b.bias": torch.nn.Parameter(torch.ones(3)),
        "n": torch.tensor(7),
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
    }
    content = BytesIO()
    torch.save(state_dict, content, _use_new_zipfile_serialization=is_zip)
    return content.getvalue()


def pickle_inside_zip(content: bytes) -> tuple[int, int]:
    """Where the pickle of a torch file begins and ends, to mutate it alone: the archive's checks would hide it."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    begin = content.index(b"\x80\x02}", info.header_offset)
    return begin, begin + info.file_size


def overwrite_within(content: bytes, begin: int, end: int, rng: random.Random) -> bytes:
    """Mutate a part of a file and keep its length, so that what points behind it still does."""
    part = mutate_bytes(content[begin:end], rng, content)[: end - begin]
    return content[:begin] + part.ljust(end - begin, b".") + content[end:]


def flip_one_bit(content: bytes, begin: int, end: int, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def header_mutators(path: Path) -> list[Mutator]:
    whole = path.read_bytes()
    n_header = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + n_header], whole[8 + n_header :]

    def structure(rng: random.Random) -> bytes:
        changed = mutate_json_text(header, rng)
        return len(changed).to_bytes(8, "little") + changed + data

    return [lambda rng: mutate_bytes(whole, rng, header), structure, structure]


def json_mutators(path: Path) -> list[Mutator]:
    whole = path.read_bytes()
    return [lambda rng: mutate_bytes(whole, rng), lambda rng: mutate_json_text(whole, rng)]


def zip_mutators(path: Path) -> list[Mutator]:
    whole = path.read_bytes()
    begin, end = pickle_inside_zip(whole)
    return [
        lambda rng: mutate_bytes(whole, rng, whole),
        lambda rng: overwrite_within(whole, begin, end, rng),
        lambda rng: flip_one_bit(whole, begin, end, rng),
        lambda rng: overwrite_within(whole, whole.rindex(b"data.pkl") - 60, len(whole), rng),
        lambda rng: truncate(whole, rng),
    ]


def legacy_mutators(path: Path) -> list[Mutator]:
    whole = path.read_bytes()
    other = legacy_file({"x": tensor(of=legacy_storage())})
    begin = whole.index(b"a.weight")  # the state dict; in front of it stand the pickles that only say what this is
    end = len(whole) - 100
    return [
        lambda rng: mutate_bytes(whole, rng, other),
        lambda rng: overwrite_within(whole, begin, end, rng),
        lambda rng: flip_one_bit(whole, begin, end, rng),
        lambda rng: flip_one_bit(whole, end, len(whole), rng),
        lambda rng: truncate(whole, rng),
    ]


KINDS: dict[str, tuple[str, Callable[[Path], list[Mutator]]]] = {
    "header": ("model.safetensors", header_mutators),
    "index": (INDEX, json_mutators),
    "config": ("config.json", json_mutators),
    "zip pickle": ("pytorch_model.bin", zip_mutators),
    "legacy pickle": ("pytorch_model.bin", legacy_mutators),
}


def make_valid(kind: str, checkpoint: Path) -> None:
    """The checkpoint whose file gets mutated."""
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", {**CONFIG, "hidden_size": 64, "rope": {"type": "linear", "f": [1.0, 2]}})
    (checkpoint / "tokenizer.json").write_text("{}")
    if kind == "index":
        for name in ("a", "b", "c"):
            write_safetensors(checkpoint / f"{name}.safetensors", f"model.{name}")
        weight_map = {f"model.{name}": f"{name}.safetensors" for name in ("a", "b", "c")}
        write_json(checkpoint / INDEX, {"metadata": {"total_size": 96}, "weight_map": weight_map})
    elif "pickle" in kind:
        (checkpoint / "pytorch_model.bin").write_bytes(torch_bytes(is_zip=kind == "zip pickle"))
    else:
        from safetensors.torch import save_file

        tensors = {"a.weight": torch.ones(4, 6), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def run_case(checkpoint: Path, kind: str, tally: Tally) -> None:
    """Open one mutant and judge the outcome."""
    try:
        with time_limit(MAX_CASE_S):
            source = open_checkpoint(checkpoint)
    except Int8ConvertError as error:
        check_lines(error.message, error.hint)
        tally.n_by_error[type(error).__name__] += 1
        return
    check_source(source)
    tally.n_success += 1
    if kind == "header":
        check_safetensors_agrees(checkpoint / "model.safetensors")
    if "pickle" in kind:
        tally.n_loaded_by_torch += check_torch_agrees(source.shards[0])


def check_safetensors_agrees(path: Path) -> None:
    """What is accepted here, the safetensors library accepts too."""
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise AssertionError(f"accepted, but the safetensors library refuses it: {error}") from error


def check_torch_agrees(shard: SourceShard) -> bool:
    """Whether torch loads the file as well; if so, every tensor has the same shape and bytes.

    Of mutants that pass our checks alone: torch allocates whatever a pickle asks for.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(shard.path, map_location="cpu", weights_only=True)
    except TORCH_REFUSES:
        return False
    assert set(loaded) == {stored.name for stored in shard.tensors}
    reader = shard.open()
    try:
        for stored in shard.tensors:
            expected = loaded[stored.name].detach()
            assert tuple(expected.shape) == stored.shape, stored
            if stored.strides is None:
                found = memoryview(bytearray(stored.n_bytes))
                reader.read_into(found, stored.offset)
                assert bytes(found) == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), stored
            else:
                assert expected.numel() == 0 or tuple(expected.stride()) == stored.strides, stored
    finally:
        reader.close()
    return True


def fuzz(kind: str, checkpoint: Path, n_cases: int) -> Tally:
    """Run cases 0 to n of a kind."""
    make_valid(kind, checkpoint)
    name, make_mutators = KINDS[kind]
    path = checkpoint / name
    valid = path.read_bytes()
    mutators = make_mutators(path)
    tally = Tally()
    run_case(checkpoint, kind, tally)
    assert tally.n_success == 1, "the checkpoint to start from is not valid"
    before = {name: content for name, content in file_bytes(checkpoint).items() if name != path.name}
    begin = time.perf_counter()
    for n in range(n_cases):
        rng = random.Random(f"{kind} {n}")
        mutant = rng.choice(mutators)(rng)
        path.write_bytes(mutant)
        try:
            run_case(checkpoint, kind, tally)
        except BaseException as error:
            raise AssertionError(f"{kind}, case {n}: {type(error).__name__}: {error}") from error
    tally.wall_s = time.perf_counter() - begin
    after = file_bytes(checkpoint)
    assert after.pop(path.name) == (mutant if n_cases else valid) and after == before, "files were created or changed"
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_read_or_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + MAX_ADDRESS_BYTES, hard))
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        tally = fuzz(kind, tmp_path / "checkpoint", N_CASES)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024
    assert grown_bytes < 300_000_000, f"the peak of memory grew by {grown_bytes:,} bytes"
    assert os.listdir(tmp_path) == ["checkpoint"], "something was created beside the checkpoint"
    errors = ", ".join(f"{n} {name}" for name, n in tally.n_by_error.most_common())
    with capsys.disabled():
        if N_CASES > 150:
            read = f"{tally.n_success:,} read ({tally.n_loaded_by_torch:,} by torch too)"
            print(f"\n{kind}: {N_CASES:,} cases, {read}, {errors}; {tally.wall_s:.1f} s", flush=True)
    # A fuzzer whose mutants are all refused at the first check, or all read, finds nothing.
    assert tally.n_success > 1 and sum(tally.n_by_error.values()) > N_CASES / 10


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_truncated_at_every_length_is_refused(is_zip: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_valid("zip pickle" if is_zip else "legacy pickle", checkpoint)
    whole = (checkpoint / "pytorch_model.bin").read_bytes()
    step = max(1, len(whole) // 2500)
    for n in (*range(0, len(whole) - 64, step), *range(len(whole) - 64, len(whole))):
        (checkpoint / "pytorch_model.bin").write_bytes(whole[:n])
        with pytest.raises(Int8ConvertError) as caught:
            open_checkpoint(checkpoint)
        check_lines(caught.value.message, caught.value.hint)


def test_header_truncated_at_every_length_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_valid("header", checkpoint)
    whole = (checkpoint / "model.safetensors").read_bytes()
    for n in range(len(whole)):
        (checkpoint / "model.safetensors").write_bytes(whole[:n])
        with pytest.raises(Int8ConvertError):
            open_checkpoint(checkpoint)


def test_mutations_depend_on_the_seed_alone() -> None:
    text = json.dumps(CONFIG).encode()
    for mutate in (mutate_bytes, mutate_json_text):
        first, second = ([mutate(text, random.Random(n)) for n in range(50)] for _ in range(2))
        assert first == second and len(set(first)) > 40
