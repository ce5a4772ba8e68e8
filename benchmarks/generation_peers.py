"""CTranslate2 and llama.cpp as contestants of `bench_generation`: their files, and their decoding.

Their packages come from a folder of their own:

    pip install --target PEERS --no-deps ctranslate2 xllamacpp gguf

Both want a tokenizer and get a vocabulary of numbers: the prompt is token ids, and texts are not looked at.

llama.cpp knows no OPT. A checkpoint of OPT's is written as a GPT-2 of the same shape, which has the same products, but
another activation function between them; so its tokens are others.

Left out on purpose: families other than OPT's and Qwen2's.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

Generate = Callable[[list[int], int], list[int]]
"""Takes the ids of a prompt and the number of new tokens; returns the new tokens, the likeliest each time."""

_QWEN2 = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OPT = {
    "model.decoder.embed_tokens": "token_embd",
    "model.decoder.embed_positions": "position_embd",
    "model.decoder.final_layer_norm": "output_norm",
    "self_attn_layer_norm": "attn_norm",
    "final_layer_norm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.out_proj": "attn_output",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}


def write_ctranslate2(source: Path, target: Path) -> None:
    """Write a checkpoint as CTranslate2's int8 model."""
    from ctranslate2.converters import TransformersConverter

    class NumberConverter(TransformersConverter):  # type: ignore[misc]
        """Takes a vocabulary of numbers where the converter would read the checkpoint's tokenizer."""

        def load_tokenizer(self, tokenizer_class: object, path: str, **options: object) -> object:
            return _NumberTokenizer(json.loads((source / "config.json").read_text())["vocab_size"])

    # `force` would not make the folder whole or not at all.
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    NumberConverter(str(source), load_as_float16=False, low_cpu_mem_usage=True).convert(str(part), quantization="int8")
    part.rename(target)


class _NumberTokenizer:
    """What the converter asks a tokenizer for."""

    bos_token, eos_token, unk_token = "0", "1", "2"

    def __init__(self, n: int) -> None:
        self._vocabulary = {str(i): i for i in range(n)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def open_ctranslate2(folder: Path, n_threads: int) -> Generate:
    import ctranslate2

    generator = ctranslate2.Generator(str(folder), compute_type="int8", inter_threads=1, intra_threads=n_threads)

    def generate(prompt: list[int], n_new: int) -> list[int]:
        (result,) = generator.generate_batch(
            [[str(token) for token in prompt]],
            max_length=n_new,
            min_length=n_new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [int(token) for token in result.sequences[0]]

    return generate


def write_llama_cpp(source: Path, target: Path) -> None:
    """Write a checkpoint as llama.cpp's Q8_0 file: matrices in blocks of 32 int8 codes with a float16 scale."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    part = target.with_name(f"{target.name}.part")
    writer = gguf.GGUFWriter(part, {"qwen2": "qwen2", "opt": "gpt2"}[config["model_type"]])
    _add_config(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, values in _tensors(source, config):
        if values.ndim == 1 or name.startswith("position_embd"):
            writer.add_tensor(name, values)
        else:
            codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


def _add_config(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size") or config["ffn_dim"])
    writer.add_head_count(config["num_attention_heads"])
    if config["model_type"] == "opt":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])


def _tensors(source: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of a checkpoint in float32, under llama.cpp's names."""
    names = _QWEN2 if config["model_type"] == "qwen2" else _OPT
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                values, module = file.get_tensor(name).float(), name.rpartition(".")[0]
                if names is _OPT and module.endswith(("q_proj", "k_proj", "v_proj")):
                    whole = name.replace(module[-6:], "qkv_proj")
                    parts = fused.setdefault(whole, {})
                    parts[module[-6]] = values
                    if len(parts) == 3:
                        yield _name_of(whole, names), torch.cat([parts[part] for part in "qkv"]).numpy()
                elif module == "model.decoder.embed_positions":
                    yield _name_of(name, names), values[2:].numpy()  # OPT keeps two rows before its positions
                else:
                    yield _name_of(name, names), values.numpy()


def _name_of(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    _, is_layer, after = module.partition(".layers.")
    if not is_layer:
        return f"{names[module]}.{kind}"
    layer, _, inner = after.partition(".")
    return f"blk.{layer}.{names[inner]}.{kind}"


def open_llama_cpp(file: Path, n_threads: int) -> Generate:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(parameters)

    def generate(prompt: list[int], n_new: int) -> list[int]:
        request = {
            "prompt": prompt,
            "max_tokens": n_new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        text: str = server.handle_completions(request)["choices"][0]["text"]
        return [int(number) for number in text.split("t")[1:]]  # the tokens' texts are t0, t1, ...

    return generate
