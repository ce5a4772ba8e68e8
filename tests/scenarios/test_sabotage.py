"""Planted defects: each is found at the level that should find it, and named.

A defect that changes bytes is planted twice: as it is, so that the sha256 of the manifest bites, and with the manifest
rewritten to agree, so that what bites is the comparison with the source.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.verification.exact.level import ExactReport, verify_exact
from tests.conftest import in_this_process
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import convert, outlier_model
from tests.tools.tiny_models import edit_config

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LAYER = "model.decoder.layers.1"
FC1, FC2, Q = f"{LAYER}.fc1", f"{LAYER}.fc2", f"{LAYER}.self_attn.q_proj"
EMBEDDING = "model.decoder.embed_tokens"

Tensors = dict[str, torch.Tensor]


def save_source(directory: Path, dtype: torch.dtype, max_shard_size: str = "120KB") -> Path:
    tokenizer = build_tokenizer()
    outlier_model(tokenizer).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source in three shards and its int8 checkpoint, stored outlier columns included."""
    folder = tmp_path_factory.mktemp("made")
    with in_this_process():
        source = save_source(folder / "source", torch.bfloat16)
        out = convert(source, folder / "out")
        int8convert.store_outliers(source, out, {FC1: [7, 21, 50], Q: [7]})
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to plant a defect in."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def shard_of(out: Path, name: str) -> Path:
    for path in sorted(out.glob("*.safetensors")):
        if name in load_file(path):
            return path
    raise AssertionError(name)


def edit(out: Path, change: Callable[[Tensors], None], *names: str) -> None:
    """Change the tensors of the shard that holds these."""
    path = shard_of(out, names[0])
    tensors = load_file(path)
    assert set(names) <= tensors.keys()
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    index_path = out / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    weight_map = {n: f for n, f in index["weight_map"].items() if f != path.name}
    index["weight_map"] = {**weight_map, **dict.fromkeys(tensors, path.name)}
    index_path.write_text(json.dumps(index))


def rewrite_manifest(out: Path) -> None:
    """Make the manifest agree with the files that are there."""
    path = out / "int8convert" / "manifest.json"
    manifest = json.loads(path.read_text())
    for record in manifest["shards"]:
        data = (out / record["file_name"]).read_bytes()
        record["n_bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))


def edit_block(out: Path, **changes: object) -> None:
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_config(out, quantization_config={**block, **changes})


def flip_one_code(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{FC1}.weight"][70, 33] += 1 if tensors[f"{FC1}.weight"][70, 33] < 127 else -1

    edit(out, change, f"{FC1}.weight")


def scale_off_by_one_percent(out: Path) -> None:
    edit(out, lambda t: t[f"{FC1}.SCB"][5].mul_(1.01), f"{FC1}.SCB")


def swap_rows(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in (f"{Q}.weight", f"{Q}.SCB"):
            tensors[name][[2, 3]] = tensors[name][[3, 2]]

    edit(out, change, f"{Q}.weight", f"{Q}.SCB")


def floor_instead_of_rint(out: Path) -> None:
    source = load_file(shard_of(out.parent / "source", f"{FC2}.weight"))[f"{FC2}.weight"].float()

    def change(tensors: Tensors) -> None:
        absmax = source.abs().amax(1, keepdim=True)
        tensors[f"{FC2}.weight"].copy_((source * (127 / absmax)).floor().to(torch.int8))

    edit(out, change, f"{FC2}.weight")


def half_up_instead_of_half_to_even(out: Path) -> None:
    """Weights of a few bits lie halfway often; here one row is made so."""
    for directory in (out.parent / "source", out):
        is_source = directory != out

        def change(tensors: Tensors, is_source: bool = is_source) -> None:
            weight = torch.zeros(64)
            weight[:3] = torch.tensor([127, 2.5, -4.5])
            tensors[f"{Q}.weight"][9] = weight if is_source else (weight.abs() + 0.5).floor() * weight.sign()
            if not is_source:
                tensors[f"{Q}.SCB"][9] = 127

        edit(directory, change, f"{Q}.weight")
    int8convert.store_outliers(out.parent / "source", out, {FC1: [7]})


def zero_a_row(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{FC1}.weight"][11] = 0

    edit(out, change, f"{FC1}.weight")


def drop_a_tensor(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        for part in ("weight", "SCB", "weight_format"):
            del tensors[f"{FC2}.{part}"]

    edit(out, change, f"{FC2}.weight", f"{FC2}.SCB", f"{FC2}.weight_format")


def drop_a_scale(out: Path) -> None:
    edit(out, lambda t: t.__delitem__(f"{FC2}.SCB"), f"{FC2}.SCB")


def quantize_embeddings(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        weight = tensors[f"{EMBEDDING}.weight"].float()
        absmax = weight.abs().amax(1)
        inv_scale = torch.where(absmax > 0, 127 / absmax, 0)
        tensors[f"{EMBEDDING}.weight"] = (weight * inv_scale[:, None]).round().to(torch.int8)
        tensors[f"{EMBEDDING}.SCB"] = absmax
        tensors[f"{EMBEDDING}.weight_format"] = torch.tensor(0, dtype=torch.uint8)

    edit(out, change, f"{EMBEDDING}.weight")


def transpose(name: str) -> Callable[[Path], None]:
    def plant(out: Path) -> None:
        edit(out, lambda t: t.__setitem__(f"{name}.weight", t[f"{name}.weight"].t().contiguous()), f"{name}.weight")

    return plant


def stale_shard(out: Path) -> None:
    """One file of a conversion of the same model after another hour of training."""
    later = Path(shutil.copytree(out.parent / "source", out.parent / "later"))
    path = shard_of(later, f"{FC1}.weight")
    tensors = load_file(path)
    torch.manual_seed(0)
    for tensor in tensors.values():
        tensor += torch.randn_like(tensor) * 0.01
    save_file(tensors, path, {"format": "pt"})
    other = convert(later, out.parent / "other")
    shutil.copy(other / path.name, out / path.name)


def zero_outlier_columns(out: Path) -> None:
    path = out / OUTLIERS_FILE
    tensors = load_file(path)
    tensors[f"{FC1}.outlier_weight"][:, 1] = 0
    save_file(tensors, path)


def move_outlier_columns(out: Path) -> None:
    path = out / OUTLIERS_FILE
    tensors = load_file(path)
    tensors[f"{FC1}.outlier_columns"] += 1
    save_file(tensors, path)


def outlier_columns_of_another_module(out: Path) -> None:
    path = out / OUTLIERS_FILE
    tensors = load_file(path)
    for leaf in ("outlier_columns", "outlier_weight"):
        tensors[f"lm_head.{leaf}"] = tensors.pop(f"{Q}.{leaf}")
    save_file(tensors, path)


def read_bf16_as_fp16(out: Path) -> None:
    """Everything from a source whose bytes are taken for those of the other 16-bit float."""
    misread = Path(shutil.copytree(out.parent / "source", out.parent / "misread"))
    for path in misread.glob("*.safetensors"):
        tensors = {name: tensor.view(torch.float16) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    converted = convert(misread, out.parent / "converted")
    for path in out.glob("*.safetensors"):
        shutil.copy(converted / path.name, path)


def read_bf16_bias_as_fp16(out: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = f"{FC1}.bias"
        tensors[name] = tensors[name].view(torch.float16).to(torch.bfloat16)

    edit(out, change, f"{FC1}.bias")


def drop_a_bias(out: Path) -> None:
    edit(out, lambda t: t.__delitem__(f"{FC1}.bias"), f"{FC1}.bias")


def zero_a_bias(out: Path) -> None:
    edit(out, lambda t: t[f"{FC1}.bias"].zero_(), f"{FC1}.bias")


def absmax_by_way_of_bf16(out: Path) -> None:
    """In the place of a source in bf16, whose absmax it would not change, one in the scales of another row."""
    edit(out, lambda t: t[f"{FC2}.SCB"].copy_(t[f"{FC2}.SCB"].roll(1)), f"{FC2}.SCB")


def other_order_of_codes(out: Path) -> None:
    edit(out, lambda t: t[f"{FC2}.weight_format"].fill_(1), f"{FC2}.weight_format")


def one_tensor_too_many(out: Path) -> None:
    edit(out, lambda t: t.__setitem__("model.decoder.extra.weight", torch.zeros(3)), f"{FC1}.weight")


def scale_in_fp16(out: Path) -> None:
    edit(out, lambda t: t.__setitem__(f"{FC1}.SCB", t[f"{FC1}.SCB"].half()), f"{FC1}.SCB")


@dataclass(frozen=True)
class Defect:
    """What is planted, the checks that fail when the manifest agrees with it, and what the first finding of each says.

    is_in_shards: whether the manifest's sha256 shows it, too.
    """

    plant: Callable[[Path], Any]
    found: dict[str, str]
    is_in_shards: bool = True


DEFECTS = {
    "one flipped code": Defect(
        flip_one_code,
        {"weights": f"{FC1}.weight row 70 column 33: ", "codes": f"{FC1}.weight row 70 column 33: expected code "},
    ),
    "one scale off by 1 %": Defect(
        scale_off_by_one_percent,
        {"weights": f"{FC1}.weight row 5 column ", "scales": f"{FC1}.weight row 5: expected absmax "},
    ),
    "swapped rows": Defect(
        swap_rows, {"weights": f"{Q}.weight row 2 ", "codes": f"{Q}.weight row 2 ", "scales": f"{Q}.weight row 2"}
    ),
    "floor instead of rint": Defect(
        floor_instead_of_rint,
        {"rows": "expected largest |code| 127, found 128", "weights": f"{FC2}.weight row 0", "codes": f"{FC2}.weight"},
    ),
    "half up instead of half to even": Defect(
        half_up_instead_of_half_to_even, {"codes": f"{Q}.weight row 9 column 1: expected code 2, found code 3"}
    ),
    "zeroed row": Defect(
        zero_a_row,
        {
            "rows": f"{FC1}.weight row 11: expected a row whose largest weight is ",
            "weights": f"{FC1}.weight row 11",
            "codes": f"{FC1}.weight row 11",
        },
    ),
    "dropped tensor": Defect(drop_a_tensor, {"tensors": f"{FC2}.weight: expected I8 [64, 128], found no such tensor"}),
    "dropped scale": Defect(drop_a_scale, {"tensors": f"{FC2}.SCB: expected F32 [64], found no such tensor"}),
    "scale in fp16": Defect(scale_in_fp16, {"tensors": f"{FC1}.SCB: expected F32 [128], found F16 [128]"}),
    "embeddings quantized": Defect(
        quantize_embeddings,
        {"tensors": f"{EMBEDDING}.weight: expected BF16, which stays as it is: embedding, tied, found int8 codes"},
    ),
    "transposed weight": Defect(
        transpose(FC1), {"tensors": f"{FC1}.weight: expected I8 [128, 64], found I8 [64, 128]"}
    ),
    "transposed square weight": Defect(
        transpose(Q), {"rows": f"{Q}.weight", "weights": f"{Q}.weight row 0", "codes": f"{Q}.weight row 0"}
    ),
    "stale shard": Defect(
        stale_shard,
        {"weights": "layers.0.fc2", "codes": "layers.0.fc2", "scales": "layers.0.fc2", "kept": "layers.0.fc"},
    ),
    "zeroed outlier columns": Defect(
        zero_outlier_columns, {"outlier columns": f"{FC1}.outlier_weight row 0 column 21: "}, is_in_shards=False
    ),
    "moved outlier columns": Defect(
        move_outlier_columns, {"outlier columns": f"{FC1}.outlier_weight row 0 column 8: "}, is_in_shards=False
    ),
    "outlier columns of another module": Defect(
        outlier_columns_of_another_module,
        {"outlier columns": "lm_head: expected columns and their weights, of a module that is int8"},
        is_in_shards=False,
    ),
    "wrong threshold": Defect(
        lambda out: edit_block(out, llm_int8_threshold=60.0),
        {"config": "llm_int8_threshold: expected 6, found 60"},
        is_in_shards=False,
    ),
    "threshold no loader reads": Defect(
        lambda out: edit_block(out, llm_int8_threshold=6),
        {"config": "a number with a decimal point"},
        is_in_shards=False,
    ),
    "int8 module left alone by the loader": Defect(
        lambda out: edit_block(out, llm_int8_skip_modules=["lm_head", "fc1"]),
        {"config": "layers.0.fc1 to be loaded as int8, found it is among those to leave alone"},
        is_in_shards=False,
    ),
    "output head not left alone": Defect(
        lambda out: edit_block(out, llm_int8_skip_modules=[]),
        {"config": "expected lm_head among the modules to leave alone"},
        is_in_shards=False,
    ),
    "no list of modules to leave alone": Defect(
        lambda out: edit_block(out, llm_int8_skip_modules=None),
        {"config": "expected a list of the modules to leave alone, found no such list"},
        is_in_shards=False,
    ),
    "another activation function": Defect(
        lambda out: edit_config(out, activation_function="gelu"),
        {"config": "activation_function: expected 'relu', found 'gelu'"},
        is_in_shards=False,
    ),
    "another tokenizer": Defect(
        lambda out: (out / "tokenizer.json").write_text("{}"),
        {"carried": "tokenizer.json: expected the source's content"},
        is_in_shards=False,
    ),
    "no tokenizer": Defect(
        lambda out: (out / "tokenizer.json").unlink(), {"carried": "tokenizer.json: "}, is_in_shards=False
    ),
    "bf16 read as fp16": Defect(
        read_bf16_as_fp16,
        {"weights": "fc1.weight", "codes": "fc1.weight", "scales": "fc1.weight", "kept": "expected 0.0136"},
    ),
    "bf16 bias read as fp16": Defect(read_bf16_bias_as_fp16, {"kept": f"{FC1}.bias row 0: expected "}),
    "missing bias": Defect(drop_a_bias, {"tensors": f"{FC1}.bias: expected BF16 [128], found no such tensor"}),
    "zeroed bias": Defect(zero_a_bias, {"kept": f"{FC1}.bias row 0: expected "}),
    "scales of other rows": Defect(
        absmax_by_way_of_bf16, {"weights": f"{FC2}.weight row 0", "scales": f"{FC2}.weight row 0: expected absmax "}
    ),
    "another order of the codes": Defect(other_order_of_codes, {"scales": f"{FC2}.weight_format row 0: expected 0"}),
    "one tensor too many": Defect(one_tensor_too_many, {"tensors": "model.decoder.extra.weight: expected no such"}),
}


def failures(report: ExactReport) -> dict[str, list[str]]:
    return {check.name: [str(finding) for finding in check.findings] for check in report.checks if not check.is_passed}


def test_without_a_defect_it_passes(made: Path, out: Path) -> None:
    report = verify_exact(out)
    assert failures(report) == {}
    assert all(check.n_checked > 0 for check in report.checks), report.checks


@pytest.fixture
def planted(request: pytest.FixtureRequest, made: Path, out: Path) -> Path:
    """An output with the defect, beside a source of its own that the defect may change."""
    source = out.parent / "source"
    shutil.copytree(made / "source", source)
    DEFECTS[request.param].plant(out)
    return out


@pytest.mark.parametrize(("planted", "name"), [(n, n) for n in DEFECTS], indirect=["planted"], ids=list(DEFECTS))
def test_defect_is_found_and_named(planted: Path, name: str) -> None:
    defect = DEFECTS[name]
    source = planted.parent / "source"
    first = failures(verify_exact(planted, reference=source))
    assert ("files" in first) is defect.is_in_shards
    if defect.is_in_shards:
        assert first["files"][0].startswith("model-0000")
        rewrite_manifest(planted)
    found = failures(verify_exact(planted, reference=source))
    assert found.keys() == defect.found.keys(), found
    for check, text in defect.found.items():
        assert text in found[check][0], found


def test_places_are_right_where_a_tensor_takes_many_blocks(
    made: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models people have take a megabyte block after the other; here a block is a few rows."""
    monkeypatch.setattr("int8convert.checkpoint.rows.BLOCK_BYTES", 700)
    assert failures(verify_exact(out)) == {}

    def change(tensors: Tensors) -> None:
        tensors[f"{FC1}.weight"][[70, 71, 120], 33] ^= 1
        tensors[f"{FC1}.SCB"][[90, 91]] *= 1.5
        tensors[f"{FC1}.bias"][[100, 127]] += 1

    edit(out, change, f"{FC1}.weight", f"{FC1}.SCB", f"{FC1}.bias")
    edit(out, lambda t: t[f"{EMBEDDING}.weight"][200:, 9:11].add_(1), f"{EMBEDDING}.weight")
    path = out / OUTLIERS_FILE
    tensors = load_file(path)
    tensors[f"{FC1}.outlier_weight"][[50, 99], 2] += 1
    save_file(tensors, path)
    rewrite_manifest(out)
    report = verify_exact(out)
    places = {(c.name, f.tensor): (f.row, f.column, f.n_places) for c in report.checks for f in c.findings if f.tensor}
    n_rows = len(load_file(shard_of(out, f"{EMBEDDING}.weight"))[f"{EMBEDDING}.weight"])
    assert places.pop(("weights", f"{FC1}.weight"))[0] == 70
    assert places == {
        ("codes", f"{FC1}.weight"): (70, 33, 3),
        ("scales", f"{FC1}.weight"): (90, None, 2),
        ("kept", f"{FC1}.bias"): (100, None, 2),
        ("kept", f"{EMBEDDING}.weight"): (200, 9, 2 * (n_rows - 200)),
        ("outlier columns", f"{FC1}.outlier_weight"): (50, 50, 2),
    }


def test_bytes_that_no_tensor_shows_are_found_by_their_hash_alone(out: Path) -> None:
    """A header may be written in many ways: the same tensors, other bytes."""
    edit(out, lambda t: None, f"{FC1}.weight")
    path = shard_of(out, f"{FC1}.weight")
    save_file(load_file(path), path, {"format": "pt", "note": "written again"})
    found = failures(verify_exact(out))
    assert found.keys() == {"files"} and found["files"][0].startswith(path.name)


@pytest.mark.parametrize("how", ["truncated", "gone", "extra"])
def test_files_that_do_not_make_a_checkpoint_are_a_failure_and_not_an_error(how: str, out: Path) -> None:
    path = shard_of(out, f"{FC1}.weight")
    match how:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "gone":
            path.unlink()
        case "extra":
            shutil.copy(path, out / "model.safetensors")
    found = failures(verify_exact(out))
    name = "model.safetensors" if how == "extra" else path.name
    # A loader takes the single file for the whole checkpoint, and then lacks all the others' tensors.
    assert found.keys() == ({"files", "tensors", "beside"} if how == "extra" else {"files"})
    assert any(name in finding for finding in found["files"])


def test_many_defects_are_counted_and_the_first_ones_named(out: Path, np_seed: int = 0) -> None:
    rng = np.random.default_rng(np_seed)

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int8:
                tensor[int(rng.integers(tensor.shape[0])), 3] *= -1
                tensor[0, :5] = 1
                assert name.endswith(".weight")

    for path in sorted(out.glob("model-*.safetensors")):
        int8 = [name for name, tensor in load_file(path).items() if tensor.dtype == torch.int8]
        if int8:
            edit(out, change, int8[0])
    report = verify_exact(out)
    check = next(check for check in report.checks if check.name == "weights")
    assert check.n_findings == 12 and len(check.findings) == 12
    assert all(finding.n_places >= 5 for finding in check.findings)
    assert report.n_different_codes == sum(f.n_places for c in report.checks if c.name == "codes" for f in c.findings)
