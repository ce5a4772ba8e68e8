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
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import build_tokenizer
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
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]

    said = run(LOG_PROBABILITIES, tmp_path, {}, str(tmp_path / "out"))

    found = torch.tensor(json.loads(said.strip().splitlines()[-1]))
    assert (found - expected).std() < 0.15 * expected.std(), "activations are rounded, but no more"
