"""From a repository like facebook/opt-66b to an int8 repository that a fresh machine downloads and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import int8convert
from int8convert.runtime.text.texts import Text
from int8convert.verification.earlier_runs import write_report
from int8convert.verification.options import Execution
from tests.publish.conftest import LOOSE
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import outlier_model, save
from tests.tools.tiny_models import file_bytes, save_as_pickles

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SOURCE, REPO = "facebook/opt-66b", "me/opt-66b-int8"
END = "that is all of it"


@pytest.fixture
def published(hub: Hub, connect: Connect, tmp_path: Path) -> Path:
    """Converted by each reader, verified and uploaded, private; the output."""
    tokenizer = build_tokenizer()
    safe = save(outlier_model(tokenizer), tmp_path / "safe", tokenizer)
    pickles = save_as_pickles(safe, tmp_path / "pickles", 3, lambda name: name.removeprefix("model."))
    files = {path.name: path for path in pickles.iterdir()} | {path.name: path for path in safe.glob("*token*")}
    assert not any(name.endswith(".safetensors") for name in files)
    hub.add_repo(SOURCE, files | {"flax_model.msgpack": b"flax" * 100, "README.md": b"---\nlicense: other\n---\n"})
    connect(hub, hub.token)
    for reader in ("stream", "download"):
        int8convert.quantize(SOURCE, tmp_path / reader, reader=reader, on_event=lambda event: None)
    assert file_bytes(tmp_path / "stream") == file_bytes(tmp_path / "download")

    out = tmp_path / "stream"
    report = int8convert.verify(out, text=Text(n_sequences=4, length=16), execution=Execution("cpu"), gates=LOOSE)
    assert report.is_passed, report.failures
    write_report(report)
    int8convert.upload(out, REPO, private=True)
    hub.repo(SOURCE).visibility = Visibility.PRIVATE  # nothing of what follows may need it
    return out


def run_fresh(codes: list[str], hub: Hub, tmp_path: Path) -> list[str]:
    """What each prints, with no names of those before, in a process with an empty cache and a token."""
    code = "\n".join(f"exec({each!r}, {{'__name__': '__main__'}}); print({END!r})" for each in codes)
    environment = os.environ | hub.client_environment(hub.token) | {"HF_HOME": str(tmp_path / "fresh")}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr
    assert hub.token not in found.stdout + found.stderr
    return found.stdout.split(END)[:-1]


def test_card_s_snippets_run_as_they_stand_and_the_logits_are_those_of_the_output(
    published: Path, hub: Hub, tmp_path: Path
) -> None:
    """By transformers with bitsandbytes, and by int8convert; by vLLM in `test_vllm`."""
    card = hub.repo(REPO).files["README.md"].decode()
    assert "base_model: facebook/opt-66b" in card and "license: other" in card
    transformers, own, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    logits = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids = torch.arange(1, 17)[None]\n"
        "models = [AutoModelForCausalLM.from_pretrained(name, device_map='cpu') for name in sys.argv[1:]]\n"
        "logits = [model(ids).logits for model in models]\n"
        "assert torch.equal(*logits), (logits[0] - logits[1]).abs().max()\n"
        "print(type(models[0].model.decoder.layers[0].fc1).__name__)\n"
    )
    logits = logits.replace("sys.argv[1:]", repr([REPO, str(published)]))
    by_transformers = transformers.replace('device_map="auto"', 'device_map="cpu"')

    said = run_fresh([by_transformers, own, logits], hub, tmp_path)

    assert len(said) == 3
    assert "The answer is" in said[0] and "The answer is" in said[1]
    assert said[2].strip() == "Linear8bitLt"
