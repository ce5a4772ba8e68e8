"""vLLM, in an environment of its own, loads what is published and computes with it.

It does not install beside what int8convert needs: `scripts/setup_vllm` makes an environment for it, whose Python
INT8CONVERT_VLLM names. Without it, all of this is skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.runtime.text.texts import Text
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import SENTENCES, build_tokenizer
from tests.tools.options import print_nothing
from tests.tools.tiny_models import save_as_pickles

VLLM = os.environ.get("INT8CONVERT_VLLM")

pytestmark = [
    pytest.mark.skipif(VLLM is None, reason="no vLLM: see scripts/setup_vllm, and set INT8CONVERT_VLLM"),
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FORMATS = ("bitsandbytes", "compressed-tensors")

# vLLM's attention on CPUs knows no heads of fewer than 32 features.
SIZES = {"vocab_size": 400, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 512, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], Any]] = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=512, word_embed_proj_dim=256, max_position_embeddings=64)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=64)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**GROUPED, head_dim=64, sliding_window=8)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=512)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED, pad_token_id=0)),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=400, hidden_size=256, n_layer=2, n_head=4)
    ),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)),
}

NOT_BY_BITSANDBYTES = ("bloom", "falcon")
"""vLLM's plugin does not know the first; the layout has nothing of the second in int8."""

IDS = list(range(5, 25))

LOG_PROBABILITIES = f"""
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(sys.argv[1], enforce_eager=True, max_model_len=48)
    (answer,) = model.generate({{"prompt_token_ids": {IDS}}}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = [probabilities[i].logprob for i, probabilities in zip({IDS}[1:], answer.prompt_logprobs[1:])]
    print("\\n" + json.dumps(found))
"""


def save(name: str, directory: Path) -> Path:
    """A model that is sure of something, with a tokenizer; OPT as facebook/opt-66b, `.bin` and no `model.` in names."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in key and "wte" not in key:
                parameter.mul_(4)
    model.half().save_pretrained(directory)
    if name == "opt":
        directory = save_as_pickles(directory, directory / "bin", 2, lambda key: key.removeprefix("model."))
    build_tokenizer().save_pretrained(directory)
    return directory


def run(code: str, folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """As a script, which vLLM's processes import again; what it printed."""
    script = folder / "script.py"
    script.write_text(code)
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    quiet["PYTHONUNBUFFERED"] = "1"
    found = subprocess.run(
        [str(VLLM), str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet, **environment},
        check=False,
    )
    # Its threads abort the interpreter now and then, when all is said and done.
    is_through = found.stdout.strip() and found.stderr.endswith("terminate called without an active exception\n")
    assert found.returncode == 0 or is_through, found.stderr
    return found.stdout


@pytest.mark.parametrize("format_name", FORMATS)
def test_card_s_snippet_runs_as_it_stands(format_name: str, hub: Hub, connect: Connect, tmp_path: Path) -> None:
    """From a private repository, with outlier columns beside the weights, which vLLM is not to take for such."""
    source = save("opt", tmp_path / "source")
    out = tmp_path / "out"
    int8convert.quantize(source, out, int8convert.PlanOptions(format=format_name), on_event=lambda event: None)
    int8convert.store_outliers(source, out, {"model.decoder.layers.0.fc1": (3, 5)})
    connect(hub, hub.token)
    int8convert.upload(out, "me/int8", private=True, allow_unverified=True)
    card = hub.repo("me/int8").files["README.md"].decode()
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "vllm" in code)

    said = run(snippet, tmp_path, hub.client_environment(hub.token) | {"HF_HOME": str(tmp_path / "fresh")})

    assert said.strip()


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        (name, format_name)
        for name in MODELS
        for format_name in FORMATS
        if format_name != "bitsandbytes" or name not in NOT_BY_BITSANDBYTES
    ],
)
def test_log_probabilities_are_those_of_the_source(name: str, format_name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "source")
    int8convert.quantize(
        source, tmp_path / "out", int8convert.PlanOptions(format=format_name), on_event=lambda event: None
    )
    expected = log_probabilities(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))

    said = run(LOG_PROBABILITIES, tmp_path, {}, str(tmp_path / "out"))

    found = torch.tensor(json.loads(said.strip().splitlines()[-1]))
    assert (found - expected).std() < 0.15 * expected.std(), "activations are rounded, but no more"


NORMS = {
    "llama": {"input_layernorm": "self_attn.{q,k,v}_proj", "post_attention_layernorm": "mlp.{gate,up}_proj"},
    "qwen3": {"input_layernorm": "self_attn.{q,k,v}_proj", "post_attention_layernorm": "mlp.{gate,up}_proj"},
    "opt": {"self_attn_layer_norm": "self_attn.{q,k,v}_proj", "final_layer_norm": "fc{1}"},
}
"""Model -> norm of a layer -> the layers that read it."""


def with_outliers(name: str, directory: Path) -> Path:
    """A source whose norms give four channels 40 times their values, which the next layers' weights undo."""
    torch.manual_seed(0)
    model = MODELS[name]()
    layers = model.model.decoder.layers if name == "opt" else model.model.layers
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in key:
                parameter.mul_(4)
        for layer in layers:
            for norm, readers in NORMS[name].items():
                gain = layer.get_submodule(norm)
                before, names, after = re.split("[{}]", readers)
                for parameter in gain.parameters():
                    parameter[10:14] *= 40
                for reader in names.split(","):
                    layer.get_submodule(f"{before}{reader}{after}").weight[:, 10:14] /= 40
    model.half().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", NORMS)
def test_rotated_and_smoothed_models_come_nearer_as_our_runtime_predicts(name: str, tmp_path: Path) -> None:
    """What vLLM computes of one scale a token, our runtime computes with the outliers `none`."""
    source = with_outliers(name, tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 60), encoding="utf-8")
    calibration = tmp_path / "calibration"
    int8convert.calibrate(source, calibration, Text(text), with_moments=True, on_event=print_nothing)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = log_probabilities(model)

    errors: dict[str, float] = {}
    smoothed = {"calibration": calibration, "smooth": "calibrated"}
    for kind, changes in {"plain": {}, "rotated": {"rotate": True}, "smoothed": smoothed}.items():
        options = replace(int8convert.PlanOptions(format="compressed-tensors"), **changes)
        int8convert.quantize(source, tmp_path / kind, options, on_event=print_nothing)
        said = run(LOG_PROBABILITIES, tmp_path, {}, str(tmp_path / kind))
        found = torch.tensor(json.loads(said.strip().splitlines()[-1]))
        ours = log_probabilities(int8convert.load(tmp_path / kind, outliers="none", dtype=torch.float32))
        errors[kind] = float((found - expected).std())
        predicted = float((ours - expected).std())
        assert 0.5 * predicted < errors[kind] < 2 * predicted + 0.01, (kind, errors[kind], predicted)
    assert errors["rotated"] < 0.6 * errors["plain"], errors
    assert errors["smoothed"] < 0.6 * errors["plain"], errors


def log_probabilities(model: Any) -> torch.Tensor:
    """Those of each token of `IDS` but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
