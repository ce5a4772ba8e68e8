"""Merged weights are those of PEFT, and an adapter that cannot be merged is refused in two lines."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import AdapterError, CorruptFileError, Int8ConvertError, SourceError
from int8convert.planning.adapters.adapter import open_adapter
from int8convert.planning.adapters.adapter_placement import AdapterPlacement, BaseTensor, place_adapter
from int8convert.planning.adapters.lora import read_float32
from tests.tools.attacks.mutate import mutate_json_text
from tests.tools.tiny_models import MODELS, build_model

# PEFT and transformers warn of much that is meant here: tied embeddings, saved embedding layers.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2**-21
"""Largest difference of a merged weight in float32, over the largest weight: four units in the last place. Up to two
were measured, as processors add the products of an update in other orders."""


def base_tensors(model: Any) -> dict[str, BaseTensor]:
    """Parameter name -> the tensor it is stored as, tied parameters under one name."""
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    key_by_storage: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = key_by_storage.setdefault(parameter.data_ptr(), name)
        found[name] = BaseTensor(key, tuple(parameter.shape), name in conv1d)
    return found


def save_adapter(model_name: str, directory: Path, config: LoraConfig, bf16: bool = False) -> Path:
    """An adapter as PEFT saves it, with nothing left at its initial value."""
    model = get_peft_model(build_model(model_name, torch.float32), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                values = torch.randn_like(parameter)
                parameter.copy_(values.abs() + 0.5 if "magnitude" in name else values)
    model.save_pretrained(directory)
    if bf16:
        path = directory / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return directory


def merged_by_peft(model_name: str, directory: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(build_model(model_name, torch.float32), directory)
    return dict(model.merge_and_unload().named_parameters())


def merged_by_us(model_name: str, directory: Path, block: int = 7) -> dict[str, np.ndarray]:
    """The base's parameters with the adapter merged in blocks of a few rows."""
    model = build_model(model_name, torch.float32)
    adapter = open_adapter(directory)
    placed = place_adapter(adapter, base_tensors(model))
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for key, stored in placed.replacements.items():
        reader = adapter.shard.open()
        weights[key] = read_float32(stored, reader)
        reader.close()
    for key, delta in placed.deltas.items():
        weight = weights[key].T if delta.is_transposed else weights[key]
        assert weight.shape == delta.shape
        loaded = delta.load()
        parts = [loaded.merge(weight[i : i + block], i) for i in range(0, len(weight), block)]
        merged = np.concatenate(parts)
        weights[key] = merged.T if delta.is_transposed else merged
    return weights


def check_merge(model_name: str, directory: Path, n_changed: int) -> None:
    """All parameters as PEFT merges them, so many of them changed."""
    ours, theirs = merged_by_us(model_name, directory), merged_by_peft(model_name, directory)
    base = dict(build_model(model_name, torch.float32).named_parameters())
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, expected in theirs.items():
        difference = np.abs(ours[name] - expected.detach().numpy()).max()
        assert difference <= TOLERANCE * max(1.0, float(expected.abs().max())), (name, difference)
        changed += float((expected - base[name]).abs().max()) > 0.1
    assert changed == n_changed


@pytest.mark.parametrize(
    ("model_name", "targets", "n_changed"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], 6),
        ("opt", ["k_proj", "fc1"], 4),
        ("opt", r".*decoder\.layers\.(?!1).*\.(?:q_proj|fc2)", 2),
        ("gpt2", ["c_attn", "c_proj"], 6),
        ("t5", ["q", "wo"], 10),
        ("bloom", None, 2),
        ("llama", "all-linear", 14),
    ],
)
def test_merged_weights_are_those_of_peft(model_name: str, targets: Any, n_changed: int, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    check_merge(model_name, save_adapter(model_name, tmp_path, config), n_changed)


def test_square_conv1d_is_transposed(tmp_path: Path) -> None:
    """attn.c_proj of GPT-2 is square, so no shape would show a mistake; lm_head makes PEFT save the wrong flag."""
    model = "untied_gpt2"
    directory = save_adapter(model, tmp_path, LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"]))
    assert json.loads((directory / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    check_merge(model, directory, 3)


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def untied_gpt2() -> Any:
        config = MODELS["gpt2"]().config
        config.tie_word_embeddings = False
        return type(MODELS["gpt2"]())(config)

    monkeypatch.setitem(MODELS, "untied_gpt2", untied_gpt2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_and_rank_stabilization(use_rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"^model\.layers\.\d+\.self_attn.q_proj": 2, "0.mlp.up_proj": 16, "proj_": 3},
        alpha_pattern={"v_proj": 9, r"layers\.1\..*": 3, "q_proj": 5, "_proj": 1000},
    )
    directory = save_adapter("llama", tmp_path, config)
    placed = place(directory)
    ranks = {key: delta.update.rank for key, delta in placed.deltas.items()}
    assert set(ranks.values()) == {2, 4, 16}
    check_merge("llama", directory, 6)


@pytest.mark.parametrize(
    ("model_name", "targets"), [("llama", ["q_proj", "k_proj", "down_proj"]), ("gpt2", ["c_attn"])]
)
def test_dora(model_name: str, targets: list[str], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets)
    check_merge(model_name, save_adapter(model_name, tmp_path, config), 2 * len(targets))


def test_embedding(tmp_path: Path) -> None:
    """PEFT saves the base embedding too: it replaces the checkpoint's before the update is added."""
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    assert open_adapter(directory).replacements.keys() == {"model.embed_tokens.weight"}
    check_merge("llama", directory, 3)


def test_replaced_base_layer_is_used(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    edit_tensors(directory, lambda tensors: tensors["base_model.model.model.embed_tokens.base_layer.weight"].fill_(3.0))
    check_merge("llama", directory, 3)


def test_modules_to_save(tmp_path: Path) -> None:
    """`norm` covers all norms: PEFT matches tails of names, not only dotted ones."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    directory = save_adapter("llama", tmp_path, config)
    assert len(open_adapter(directory).replacements) == 6
    check_merge("llama", directory, 8)


@pytest.mark.parametrize(("bias", "n_biases"), [("all", 17), ("lora_only", 2)])
def test_trained_biases(bias: Any, n_biases: int, tmp_path: Path) -> None:
    """For `all`: of 2 layers, 4 projections, 2 linear layers and 2 norms each, and of the last norm."""
    directory = save_adapter("opt", tmp_path, LoraConfig(r=4, target_modules=["q_proj"], bias=bias))
    check_merge("opt", directory, 2 + n_biases)


def test_bfloat16_adapter_is_widened(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    check_merge("llama", save_adapter("llama", tmp_path, config, bf16=True), 4)


def test_pickled_adapter_is_read_alike(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    before = merged_by_us("llama", directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    turned = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}  # strided, as training may leave it
    torch.save(turned, directory / "adapter_model.bin")
    after = merged_by_us("llama", directory)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_experts_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    """Adapters of Mixtral made before transformers fused the experts name them as checkpoints still do."""
    key = "model.layers.0.block_sparse_moe.experts.3.w1"
    write_adapter(tmp_path, {f"{key}.lora_A.weight": torch.ones(2, 6), f"{key}.lora_B.weight": torch.ones(4, 2)}, r=2)
    # Not a parameter of the model, which has one for all experts, made of many tensors.
    parameters = {"other.weight": BaseTensor(f"{key}.weight", (4, 6))}
    delta = place_adapter(open_adapter(tmp_path), parameters).deltas[f"{key}.weight"]
    np.testing.assert_array_equal(delta.load().rows(1, 3), np.full((2, 6), 2 * 8 / 2, np.float32))


def test_checkpoint_without_the_base_prefix(tmp_path: Path) -> None:
    directory = save_adapter("opt", tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    tensors = base_tensors(build_model("opt"))
    renamed = {
        name: BaseTensor(base.name.removeprefix("model."), base.shape, base.is_transposed)
        for name, base in tensors.items()
    }
    placed = place_adapter(open_adapter(directory), renamed)
    assert set(placed.deltas) == {f"decoder.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_threads_share_a_loaded_delta(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["down_proj"]))
    loaded = next(iter(place(directory).deltas.values())).load()
    whole = loaded.rows(0, 64)
    with ThreadPoolExecutor(4) as pool:
        for i, part in enumerate(pool.map(lambda i: loaded.rows(i, i + 1), [*range(64)] * 20)):
            np.testing.assert_allclose(part[0], whole[i % 64], rtol=0, atol=TOLERANCE)


def test_merging_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    loaded = next(iter(place(directory).deltas.values())).load()
    weight = np.ones((5, 64), np.float32)
    first, second = loaded.merge(weight, 3), loaded.merge(weight, 3)
    assert (weight == 1).all()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), loaded.magnitude[3:8], rtol=1e-6)


def test_stated_memory_is_what_is_held(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["down_proj"], use_dora=True))
    for delta in place(directory).deltas.values():
        loaded = delta.load()
        assert delta.n_bytes == loaded.left.nbytes + loaded.right.nbytes + loaded.magnitude.nbytes


def test_identity_is_that_of_both_files(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    names = ("adapter_config.json", "adapter_model.safetensors")
    expected = {name: sha256((directory / name).read_bytes()).hexdigest() for name in names}
    assert open_adapter(directory).identity() == expected


# What is refused.


def place(directory: Path, model_name: str = "llama") -> AdapterPlacement:
    return place_adapter(open_adapter(directory), base_tensors(build_model(model_name)))


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    directory.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(
    directory: Path, match: str, error: type[Int8ConvertError] = AdapterError, model_name: str = "llama"
) -> None:
    """Placing and loading the adapter raises, in two plain lines."""
    with pytest.raises(error, match=match) as caught:
        for delta in place(directory, model_name).deltas.values():
            delta.load()
    for line in (caught.value.message, caught.value.hint):
        assert line and "\n" not in line and not line.endswith(".") and line.isprintable()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    return save_adapter("llama", tmp_path_factory.mktemp("saved"), config)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "config", [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), LoHaConfig(target_modules=["q_proj"])]
)
def test_other_methods(config: Any, tmp_path: Path) -> None:
    get_peft_model(build_model("llama", torch.float32), config).save_pretrained(tmp_path)
    refused(tmp_path, f"peft_type in adapter_config.json is '{config.peft_type.value}'")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [0]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("an_option_of_tomorrow", 1),
        ("an_option_of_tomorrow", 0),
    ],
)
def test_options_that_would_change_the_merge(option: str, value: object, adapter: Path) -> None:
    edit_config(adapter, **{option: value})
    refused(adapter, f"sets '{option}'")


def test_options_of_tomorrow_that_are_unset_are_passed_over(adapter: Path) -> None:
    edit_config(adapter, an_option_of_tomorrow=None, another=False, third=[], fourth={})
    assert len(place(adapter).deltas) == 4


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of", 1])
def test_adapters_of_a_changed_base(init: object, adapter: Path) -> None:
    edit_config(adapter, init_lora_weights=init)
    refused(adapter, "init_lora_weights .* changed base")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("r", 10**300),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", [1]),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("modules_to_save", "lm_head"),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_options_of_the_wrong_kind(option: str, value: object, adapter: Path) -> None:
    edit_config(adapter, **{option: value})
    refused(adapter, f"{option} in adapter_config.json is ")


@pytest.mark.parametrize("pattern", ["(?!0).*", "(" * 50, "a" * 1000])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_not_matched(option: str, pattern: str, adapter: Path) -> None:
    edit_config(adapter, **{option: {pattern: 4}})
    refused(adapter, f"pattern in {option}")


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{Q_PROJ}.lora_B.weight", None, "has for .* lora_A, expected lora_A and lora_B"),
        (f"{Q_PROJ}.lora_A.weight", None, "has for .* lora_B, expected lora_A and lora_B"),
        (f"{Q_PROJ}.lora_magnitude_vector", torch.ones(64), "expected lora_A and lora_B"),
        (f"{Q_PROJ}.lora_embedding_A", torch.ones(4, 64), "expected lora_embedding_A and lora_embedding_B"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(4, 63), r"has shape \[64, 63\], the checkpoint's has \[64, 64\]"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(5, 64), r"expected \[4, in\]"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(4, 64, 3, 3), "convolution"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(256), r"expected \[4, in\]"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(4, 0), r"expected \[4, in\]"),
        (f"{Q_PROJ}.lora_A.weight", torch.ones(4, 64).int(), "dtype I32"),
        (f"{Q_PROJ}.lora_A.weight", torch.full((4, 64), float("nan")), "hold NaN or infinity"),
        (f"{Q_PROJ}.lora_B.weight", torch.full((64, 4), 1e300, dtype=torch.float64), "hold NaN or infinity"),
        (f"{Q_PROJ}.weight", torch.ones(64, 64), "both changes and replaces"),
        (f"{Q_PROJ}.lora_B.bias", torch.ones(64), "does not merge"),
        (f"{Q_PROJ}.lora_A.default.weight", torch.ones(4, 64), "does not merge"),
        (f"{Q_PROJ}.lora_diag", torch.ones(4), "does not merge"),
        (f"{Q_PROJ}.base_layer.lora_A.weight", torch.ones(4, 64), "expected lora_A and lora_B"),
        ("base_model.model.lm_head.modules_to_save.weight", torch.ones(64), "does not merge"),
        ("base_model.model.token_adapter.trainable_tokens_delta", torch.ones(64), "does not merge"),
        ("model.norm.weight", torch.ones(64), "does not begin with 'base_model.model.'"),
        (
            "base_model.model.score.weight",
            torch.ones(2, 64),
            r"has a head of its own, 'score\.weight', which the checkpoint has no place for",
        ),
        ("base_model.model.lm_head.weight", torch.ones(130, 64), r"\[130, 64\], the checkpoint's has \[128, 64\]"),
        ("base_model.model.lm_head.weight", None, "modules_to_save cover 'lm_head.weight'"),
    ],
)
def test_tensors_that_do_not_fit(name: str, tensor: torch.Tensor | None, match: str, adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors.pop(name, None) if tensor is None else tensors.update({name: tensor}))
    refused(adapter, match)


def test_rank_beyond_both_sides(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.ones(65, 64), f"{key}.lora_B.weight": torch.ones(64, 65)}
    write_adapter(tmp_path, tensors, r=65)
    refused(tmp_path, "with in or out at least 65")


def test_module_that_is_not_targeted(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "wn_proj"])
    refused(adapter, "down_proj', which is not among the target_modules")


def test_dora_without_magnitudes(adapter: Path) -> None:
    edit_config(adapter, use_dora=True)
    refused(adapter, "expected lora_A and lora_B and lora_magnitude")


def test_magnitudes_of_another_length(tmp_path: Path) -> None:
    directory = save_adapter("llama", tmp_path, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    edit_tensors(directory, lambda tensors: tensors.update({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(1)}))
    refused(directory, r"magnitudes for .* are \[1\], expected \[64\]")


def test_dora_on_an_embedding(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)
    refused(save_adapter("llama", tmp_path, config), "DoRA on the embedding")


@pytest.mark.parametrize(
    "options", [{"target_modules": ["wte"]}, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}]
)
def test_tied_weights(options: dict[str, Any], tmp_path: Path) -> None:
    refused(save_adapter("gpt2", tmp_path, LoraConfig(r=4, **options)), "is tied", model_name="gpt2")


def test_adapter_of_another_model(adapter: Path) -> None:
    refused(adapter, r"4 of 5 tensors the adapter .* not in the checkpoint", model_name="gpt2")


def test_one_tensor_by_two_names(tmp_path: Path) -> None:
    tensors = {f"{module}.lora_{matrix}.weight": torch.ones(2, 2) for module in ("new", "old") for matrix in ("A", "B")}
    write_adapter(tmp_path, tensors, r=2)
    with pytest.raises(AdapterError, match=r"'old\.weight' twice"):
        place_adapter(open_adapter(tmp_path), {"new.weight": BaseTensor("old.weight", (2, 2))})


def test_directories_that_are_no_adapters(adapter: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "has no adapter_config.json")
    refused(adapter / "adapter_config.json", "has no adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "has no adapter_model.safetensors or adapter_model.bin")


def test_matrix_scattered_over_a_large_storage(tmp_path: Path) -> None:
    """A file that takes no room on the disk could spread two numbers over a terabyte."""
    large = torch.ones(64, 4000)
    tensors = {f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64), f"{Q_PROJ}.lora_B.weight": large[:, :4]}
    write_adapter(tmp_path, {}, r=4)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    refused(tmp_path, "lora_B.weight' is not contiguous")


def test_disk_that_fails(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("int8convert.planning.adapters.adapter.read_config", fail)
    refused(adapter, "cannot be read: Input/output error")


def test_mutants_are_read_or_refused(adapter: Path) -> None:
    """Whatever is in the files, no other error leaves than those that are raised on purpose."""
    edit_config(adapter, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.\d+.*": 3})
    names = ("adapter_config.json", "adapter_model.safetensors")
    config, weights = ((adapter / name).read_bytes() for name in names)
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    base = base_tensors(build_model("llama"))
    rng = random.Random(0)
    outcomes = Counter[str]()
    for _ in range(int(os.environ.get("INT8CONVERT_FUZZ_CASES", "400"))):
        mutant_config, mutant_header = config, header
        if rng.random() < 0.6:
            mutant_config = mutate_json_text(config, rng)
        else:
            mutant_header = mutate_json_text(header, rng)
        (adapter / names[0]).write_bytes(mutant_config)
        (adapter / names[1]).write_bytes(
            len(mutant_header).to_bytes(8, "little") + mutant_header + weights[8 + len(header) :]
        )
        try:
            for delta in place_adapter(open_adapter(adapter), base).deltas.values():
                delta.load().rows(0, 3)
            outcomes["read"] += 1
        except Int8ConvertError as error:
            outcomes[error.code] += 1
            assert all(line.isprintable() and len(line) < 1000 for line in (error.message, error.hint))
    assert {"read", "adapter", "corrupt_file"} <= outcomes.keys()


def test_adapter_without_tensors(tmp_path: Path) -> None:
    write_adapter(tmp_path, {}, r=2)
    refused(tmp_path, "holds no tensors")


def test_files_that_are_broken(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(adapter, "truncated", CorruptFileError)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(adapter, "Git LFS pointer", CorruptFileError)
    path.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("[1]")
    refused(adapter, "not an object", CorruptFileError)
    (adapter / "adapter_config.json").write_text('{"a":' * 100 + "1" + "}" * 100)
    refused(adapter, "levels deep", CorruptFileError)


def test_pickle_that_would_run_code(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, ("touch canary",)

    torch.save({"base_model.model.x": Attack()}, adapter / "adapter_model.bin")
    refused(adapter, "weights-only pickle", CorruptFileError)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_adapter(name: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    refused(adapter, "outside the checkpoint", SourceError)


def test_file_that_shrinks(adapter: Path) -> None:
    placed = place(adapter)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match="was changed since its header was read"):
        for delta in placed.deltas.values():
            delta.load()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_read_as_torch_converts_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(7, 3, dtype=torch.float64).to(dtype)
    write_adapter(tmp_path, {"x.weight": tensor})
    adapter = open_adapter(tmp_path)
    stored: StoredTensor = adapter.replacements["x.weight"]
    reader = adapter.shard.open()
    np.testing.assert_array_equal(read_float32(stored, reader), tensor.float().numpy())
    reader.close()
