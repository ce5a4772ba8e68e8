"""Attacks by config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from int8convert.errors import AlreadyQuantizedError, CorruptFileError, ModelMapError
from tests.tools.attacks.registry import CONFIG, attack, write_config, write_sparse


def quantized(block: Any) -> dict[str, Any]:
    return {**CONFIG, "quantization_config": block}


@attack(CorruptFileError, "not valid JSON")
def config_truncated(folder: Path) -> None:
    write_config(folder, json.dumps(CONFIG).encode()[:-5])


@attack(CorruptFileError, "not valid JSON")
def config_empty(folder: Path) -> None:
    write_config(folder, b"")


@attack(CorruptFileError, "JSON list, not an object")
def config_a_list(folder: Path) -> None:
    write_config(folder, [CONFIG])


@attack(CorruptFileError, "JSON NoneType, not an object")
def config_null(folder: Path) -> None:
    write_config(folder, b"null")


@attack(CorruptFileError, "the key 'architectures' occurs twice")
def config_with_a_key_twice(folder: Path) -> None:
    write_config(folder, b'{"architectures":["LlamaForCausalLM"],"architectures":["GPT2LMHeadModel"]}')


@attack(CorruptFileError, "'utf-8' codec")
def config_in_another_encoding(folder: Path) -> None:
    write_config(folder, json.dumps(CONFIG).encode("utf-16"))


@attack(CorruptFileError, "nested too deeply", is_heavy=True)
def config_nested_deep(folder: Path) -> None:
    write_config(folder, b'{"a":' * 900_000)


@attack(CorruptFileError, "nested more than")
def config_nested_to_where_the_encoder_breaks(folder: Path) -> None:
    write_config(folder, b'{"architectures":["LlamaForCausalLM"],"a":' + b"[" * 900 + b"]" * 900 + b"}")


@attack(CorruptFileError, "expected at most", is_heavy=True)
def config_of_gigabytes(folder: Path) -> None:
    write_sparse(folder / "checkpoint" / "config.json", 4_000_000_000, b"{")


@attack(CorruptFileError, "surrogates not allowed|half a character")
def config_with_half_a_character(folder: Path) -> None:
    write_config(folder, {**CONFIG, "name": "\ud800"})


@attack(CorruptFileError, "Exceeds the limit")
def config_with_a_number_of_many_digits(folder: Path) -> None:
    write_config(folder, b'{"architectures":["LlamaForCausalLM"],"vocab_size":' + b"9" * 5000 + b"}")


@attack(None)
def config_with_nan_as_some_have(folder: Path) -> None:
    write_config(folder, {**CONFIG, "rope_theta": float("nan"), "limit": float("-inf")})


@attack(ModelMapError, "config.json is missing")
def config_missing(folder: Path) -> None:
    (folder / "checkpoint" / "config.json").unlink()


@attack(ModelMapError, "names no architecture")
def config_with_an_architecture_that_is_text(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": "LlamaForCausalLM"})


@attack(ModelMapError, "names no architecture")
def config_with_no_architectures(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": []})


@attack(ModelMapError, "names no architecture")
def config_with_an_architecture_that_is_a_list(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": [["LlamaForCausalLM"]]})


@attack(ModelMapError)
def config_with_an_architecture_that_drives_the_terminal(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": ["Llama\x1b[2J\nerror: done"]})


@attack(ModelMapError)
def config_with_an_architecture_that_is_a_path(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": ["../../secret"]})


@attack(ModelMapError)
def config_with_an_endless_architecture(folder: Path) -> None:
    write_config(folder, {**CONFIG, "architectures": ["x" * 1_000_000]})


@attack(AlreadyQuantizedError, "'gptq'")
def config_quantized_by_others(folder: Path) -> None:
    write_config(folder, quantized({"quant_method": "gptq"}))


@attack(AlreadyQuantizedError)
def config_quantized_by_a_method_that_drives_the_terminal(folder: Path) -> None:
    write_config(folder, quantized({"quant_method": "\x1b[2J\n" * 100_000}))


@attack(AlreadyQuantizedError)
def config_quantized_by_a_method_that_is_a_map(folder: Path) -> None:
    write_config(folder, quantized({"quant_method": {"a": ["\n" * 1000] * 1000}}))


@attack(AlreadyQuantizedError)
def config_quantized_by_a_method_of_many_digits(folder: Path) -> None:
    write_config(folder, quantized({"quant_method": int("9" * 4000)}))


@attack(None)
def config_quantized_by_nothing(folder: Path) -> None:
    """What `model.config.quantization_config = None` leaves behind."""
    write_config(folder, quantized(None))


@attack(AlreadyQuantizedError)
def config_quantized_by_an_empty_block(folder: Path) -> None:
    write_config(folder, quantized({}))


@attack(AlreadyQuantizedError)
def config_quantized_by_a_list(folder: Path) -> None:
    write_config(folder, quantized([1, 2]))


@attack(AlreadyQuantizedError)
def config_quantized_by_text(folder: Path) -> None:
    write_config(folder, quantized("bitsandbytes"))


@attack(ModelMapError, r"model_type in config\.json is '\\x1b\[2J', expected a name")
def config_with_a_model_type_that_drives_the_terminal(folder: Path) -> None:
    """transformers repeats it in the complaint that it knows no such type."""
    write_config(folder, {**CONFIG, "model_type": "\x1b[2J"})


@attack(ModelMapError, r"model_type in config\.json is a list, expected a name")
def config_with_a_model_type_that_is_a_list(folder: Path) -> None:
    write_config(folder, {**CONFIG, "model_type": ["llama"]})


@attack(ModelMapError, r"torch_dtype in config\.json is 'float3\\x1b\[2J', expected a name")
def config_with_a_dtype_that_drives_the_terminal(folder: Path) -> None:
    write_config(folder, {**CONFIG, "torch_dtype": "float3\x1b[2J"})


@attack(ModelMapError, r"dtype in config\.json is a dict, expected a name")
def config_with_a_dtype_that_is_a_map(folder: Path) -> None:
    write_config(folder, {**CONFIG, "dtype": {"": "float16"}})


@attack(ModelMapError, r"dtype in config\.json is 'xxxx.*', expected a name")
def config_with_an_endless_dtype(folder: Path) -> None:
    write_config(folder, {**CONFIG, "dtype": "x" * 1_000_000})


@attack(None)
def config_with_names_that_are_null(folder: Path) -> None:
    write_config(folder, {**CONFIG, "dtype": None, "torch_dtype": None, "model_type": None})
