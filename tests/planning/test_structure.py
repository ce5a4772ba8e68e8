"""A checkpoint of another size is answered for as transformers would, and of another structure not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from int8convert.formats.format import Format
from int8convert.planning.model_map import cache, process, seed
from int8convert.planning.model_map.links import Links, evaluate
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.planning.model_map.process import ModelMapProcess, worker_request
from int8convert.planning.model_map.sizes import UnknownStructureError, read_config
from int8convert.planning.model_map.structure import Sample, find_structure
from int8convert.planning.model_map.structure_match import apply_structure
from int8convert.sources import open_source
from scripts.make_seed_maps import Prober, comparable
from tests.conftest import InProcessMap
from tests.tools.family_models import Family
from tests.tools.tiny_models import edit_config, save_checkpoint

LLAMA = Family("causal", "llama", "LlamaForCausalLM")
MIXTRAL = Family("causal", "mixtral", "MixtralForCausalLM")
SMALL = {
    **{"vocab_size": 172, "hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
LARGER = {
    **{"vocab_size": 352, "hidden_size": 192, "intermediate_size": 416, "num_hidden_layers": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 640},
}


def sample(
    family: Family, output_format: Format = Format.BITSANDBYTES, dtype: str = "float16", **entries: Any
) -> Sample:
    config = transformers.CONFIG_MAPPING[family.model_type](**entries).to_dict()
    return Prober(family).sample(config, output_format, dtype)


def answer_by(structure: Mapping[str, Any] | None, other: Sample) -> Any:
    """The answer on another checkpoint, None where it is not of the structure."""
    assert structure is not None
    try:
        return apply_structure(structure, other.config, other.request)
    except UnknownStructureError:
        return None


def changed(source: Sample, tensors: list[Any] | None = None, **entries: Any) -> Sample:
    request = {**source.request, "tensors": tensors or source.request["tensors"]}
    return Sample({**source.config, **entries}, request, source.answer)


def test_one_llama_answers_for_a_deeper_and_wider_one() -> None:
    structure = find_structure([sample(LLAMA, **SMALL)])
    larger = sample(LLAMA, **LARGER)
    assert answer_by(structure, larger) == comparable(larger.answer)
    assert len(larger.answer["tensors"]) == 12 * 9 + 3


@pytest.mark.parametrize("output_format", [Format.BITSANDBYTES, Format.COMPRESSED_TENSORS])
def test_one_mixture_of_experts_answers_for_one_of_more_experts(output_format: Format) -> None:
    structure = find_structure([sample(MIXTRAL, output_format, **SMALL, num_local_experts=5)])
    larger = sample(MIXTRAL, output_format, **LARGER, num_local_experts=7)
    assert answer_by(structure, larger) == comparable(larger.answer)


@pytest.mark.parametrize(
    "entries",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"pad_token_id": 352},
        {"num_hidden_layers": 13},
        {"num_hidden_layers": 12.0},
        {"hidden_size": 196},
        {"num_key_value_heads": 2},
        {"head_dim": 96},
        {"vocab_size": 353},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": "small"},
        {"attention_dropout": 0.5},
        {"of_another_version": 1},
        {"model_type": "mistral"},
        {"architectures": ["MistralForCausalLM"]},
    ],
)
def test_config_that_says_something_else_is_new(entries: dict[str, Any]) -> None:
    assert answer_by(find_structure([sample(LLAMA, **SMALL)]), changed(sample(LLAMA, **LARGER), **entries)) is None


@pytest.mark.parametrize(
    "entries",
    [
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 351},
        {"transformers_version": "4.40", "_name_or_path": "x", "use_cache": False, "initializer_range": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_config_whose_differences_change_no_module_is_known(entries: dict[str, Any]) -> None:
    larger = sample(LLAMA, **LARGER)
    expected = sample(LLAMA, **LARGER, **{k: v for k, v in entries.items() if not k.endswith(("version", "path"))})
    made = answer_by(find_structure([sample(LLAMA, **SMALL)]), changed(larger, **entries))
    assert made == comparable(expected.answer)


def test_tensors_that_are_others_are_new() -> None:
    structure = find_structure([sample(LLAMA, **SMALL)])
    larger = sample(LLAMA, **LARGER)
    (name, dtype, shape, place), *rest = larger.request["tensors"]
    assert answer_by(structure, changed(larger, rest)) is None
    assert answer_by(structure, changed(larger, [*rest, [name + "s", dtype, shape, place]])) is None
    assert answer_by(structure, changed(larger, [*rest, [name, "F32", shape, place]])) is None
    assert answer_by(structure, changed(larger, [*rest, [name, "I64", shape, place]])) is None
    assert answer_by(structure, changed(larger, [*rest, [name, dtype, [shape[0] + 1, *shape[1:]], place]])) is None
    assert answer_by(structure, changed(larger, [*rest, [name, dtype, shape, ["a", 0]]])) is None
    assert answer_by(structure, changed(larger, [*rest, [name, dtype, shape, place]])) is not None


def test_checkpoint_that_lacks_something_has_no_structure() -> None:
    whole = sample(LLAMA, **SMALL)
    assert find_structure([whole]) is not None
    for key, value in (("missing", {"a": [1]}), ("unexpected", ["a"]), ("defaulted", ["a"]), ("n_parameters", 1)):
        needs = {**whole.answer["needs"], key: value}
        assert find_structure([Sample(whole.config, whole.request, {**whole.answer, "needs": needs})]) is None


def test_layers_that_the_config_tells_apart() -> None:
    """DeepSeek's first layers are dense, the others hold experts."""
    family = Family("causal", "deepseek_v3", "DeepseekV3ForCausalLM")
    sizes = {
        **{"q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10},
        **{
            "n_routed_experts": 5,
            "moe_intermediate_size": 72,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
    }
    small = sample(family, Format.COMPRESSED_TENSORS, **{**SMALL, **sizes, "num_key_value_heads": 6})
    larger = sample(
        family, Format.COMPRESSED_TENSORS, **{**SMALL, **sizes, "num_key_value_heads": 6, "num_hidden_layers": 7}
    )
    structure = find_structure([small])
    assert structure is not None and structure["layers"] == "by config"
    assert answer_by(structure, larger) == comparable(larger.answer)
    assert answer_by(structure, changed(larger, first_k_dense_replace=3)) is None


def test_links() -> None:
    links = Links([{"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 160}])
    assert links.of_shape((96,)) == ["hidden_size"]
    assert links.of_shape((288,)) == ["3*hidden_size"]
    assert links.of_shape((16,)) == ["hidden_size/num_attention_heads"]
    assert links.of_shape((7,)) == ["7"]
    assert evaluate("3*hidden_size+2", {"hidden_size": 5}) == 17
    with pytest.raises(UnknownStructureError):
        evaluate("hidden_size/num_attention_heads", {"hidden_size": 5, "num_attention_heads": 2})
    with pytest.raises(UnknownStructureError):
        Links([{"hidden_size": 96}, {"hidden_size": 64}]).of_shape((5, 6))


def test_config_of_a_stranger_is_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    assert len(read_config({"architectures": ["A"], "deep": deep}).flags) == 2
    odd = {"vocab_size": None, "pad_token_id": 3, "hidden_size": -1, "rope_scaling": [], "layer_types": [1]}
    assert len(read_config({"architectures": ["A"], **odd}).flags) == 6
    with pytest.raises(UnknownStructureError):
        read_config({"architectures": ["A"], **{f"{i}_heads": 1 for i in range(300)}})


SEEDED = [
    ("causal", "llama", {}),
    ("causal", "mistral", {}),
    ("causal", "qwen2", {"tie_word_embeddings": True}),
    ("causal", "qwen3", {"head_dim": 24}),
    ("causal", "qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 80}),
    ("causal", "qwen2_moe", {"num_experts": 6, "moe_intermediate_size": 80}),
    ("causal", "phi3", {"pad_token_id": 0}),
    ("causal", "gemma2", {"head_dim": 24}),
    ("causal", "opt", {"ffn_dim": 208, "word_embed_proj_dim": 96}),
    ("causal", "gpt_neox", {}),
    ("causal", "gpt2", {}),
    ("causal", "mixtral", {"num_local_experts": 5}),
    (
        "seq2seq",
        "t5",
        {"d_model": 96, "d_kv": 16, "d_ff": 208, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 6},
    ),
    ("masked", "bert", {}),
]


@pytest.mark.parametrize(("task", "model_type", "entries"), SEEDED)
@pytest.mark.parametrize("output_format", [Format.BITSANDBYTES, Format.COMPRESSED_TENSORS])
def test_seed_answers_as_transformers_does(
    task: str, model_type: str, entries: dict[str, Any], output_format: Format
) -> None:
    """At sizes that it was not made at, and with a config.json from which the class's defaults are left out."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    config = config_class(**{k: v for k, v in {**SMALL, **entries}.items() if k in known})
    family = next(f for f in _families() if (f.task, f.model_type) == (task, model_type))
    for dtype, stated in (("bfloat16", config.to_dict()), ("float16", config.to_diff_dict())):
        known_to_class = Prober(family).sample(stated, output_format, dtype)
        found = seed.seed_answer(known_to_class.config, known_to_class.request)
        assert found == comparable(known_to_class.answer)


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
        (LLAMA, {"position_embedding_type": "relative_key", "use_mrope": False}),
        (Family("causal", "gemma2", "Gemma2ForCausalLM"), {"hidden_act": "gelu", "cache_implementation": "hybrid"}),
        (Family("causal", "qwen3_moe", "Qwen3MoeForCausalLM"), {"head_dim": 24}),
    ],
)
def test_seed_knows_what_else_config_json_may_say(family: Family, entries: dict[str, Any]) -> None:
    config = transformers.CONFIG_MAPPING[family.model_type](**SMALL).to_dict()
    other = Prober(family).sample({**config, **entries}, Format.BITSANDBYTES, "float16")
    assert seed.seed_answer(other.config, other.request) == comparable(other.answer)


def _families() -> list[Family]:
    from tests.tools.family_models import families

    return families()


@pytest.mark.parametrize(
    "entries",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"mlp_bias": True},
        {"num_key_value_heads": 6},
        {"head_dim": 24},
    ],
)
def test_changed_flag_is_no_other_answer_than_that_of_transformers(entries: dict[str, Any]) -> None:
    other = sample(LLAMA, **{**SMALL, **entries})
    assert seed.seed_answer(other.config, other.request) in (None, comparable(other.answer))
    stated_only = changed(sample(LLAMA, **SMALL), **entries)
    if entries != {"num_key_value_heads": 6}:
        assert seed.seed_answer(stated_only.config, stated_only.request) is None


def test_seed_is_made_with_this_code_and_version() -> None:
    """If this fails after a change to the modules that shape maps: run `python -m scripts.make_seed_maps`."""
    assert len(seed._structures("LlamaForCausalLM", cache.installed_version("transformers"))) >= 4
    assert seed.SEED.stat().st_size < 500_000


def test_seed_of_another_version_or_code_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = sample(LLAMA, **SMALL)
    assert seed.seed_answer(llama.config, llama.request) is not None
    with monkeypatch.context() as patch:
        patch.setattr(seed, "installed_version", lambda package: "5.99.0")
        assert seed.seed_answer(llama.config, llama.request) is None
    with monkeypatch.context() as patch:
        patch.setattr(seed, "code_hashes", lambda: ["0"])
        assert seed.seed_answer(llama.config, llama.request) is None
    monkeypatch.setattr(seed, "installed_version", lambda package: "")
    found = seed.seed_answer(llama.config, llama.request)
    assert found is not None and found["notes"] == ["transformers is not installed to confirm the map of the model"]


def test_seeded_model_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save_checkpoint("llama", tmp_path / "llama"))

    def refuse(module: str) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process, "Worker", refuse)
    found = ModelMapProcess(source, ModuleFilter()).result()
    assert found == InProcessMap(source, ModuleFilter()).result()


def test_seeded_model_is_planned_without_torch(tmp_path: Path) -> None:
    save_checkpoint("opt", tmp_path / "opt")
    code = (
        "import sys, int8convert\n"
        f"plan = int8convert.plan({str(tmp_path / 'opt')!r})\n"
        "print(plan.model_map.model_class, {'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OPTForCausalLM", "set()"]


def test_cached_structure_is_that_of_another_size(tmp_path: Path) -> None:
    """A Llama with biases is not in the seed."""
    known = sample(LLAMA, **SMALL, attention_bias=True)
    other = sample(LLAMA, **LARGER, attention_bias=True)
    assert seed.seed_answer(known.config, known.request) is None
    cache.ModelMapCache(known.config, known.request).write(dict(known.answer))
    assert cache.ModelMapCache(other.config, other.request).read() == comparable(other.answer)
    mismatched = changed(other, hidden_size=196)
    assert cache.ModelMapCache(mismatched.config, mismatched.request).read() is None


def test_second_model_that_does_not_fit_is_cached_by_itself(tmp_path: Path) -> None:
    """In the first one the width of heads times 4 is that of the keys by coincidence."""
    first = sample(LLAMA, **{**SMALL, "num_key_value_heads": 3}, attention_bias=True)
    second = sample(LLAMA, **LARGER, attention_bias=True)
    for each in (first, second):
        cache.ModelMapCache(each.config, each.request).write(dict(each.answer))
    for each in (first, second):
        read = cache.ModelMapCache(each.config, each.request).read()
        assert read is not None and comparable(read) | {"candidates": []} == comparable(each.answer)


def test_unseeded_model_still_asks_transformers(tmp_path: Path) -> None:
    directory = save_checkpoint("llama", tmp_path / "llama")
    edit_config(directory, of_another_version=1)
    source = open_source(directory)
    request = json.loads(json.dumps(worker_request(source, ModuleFilter())))
    assert seed.seed_answer(source.config, request) is None
