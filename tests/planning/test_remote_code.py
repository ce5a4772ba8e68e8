"""A class that is code in the checkpoint: never run unasked, and what decides once the user trusts it.

The second test asks in a process of its own, as users do; the others ask the same code in this one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.errors import ModelMapError, RemoteCodeError
from int8convert.planning.model_map.build import build_model
from int8convert.planning.plan_checkpoint import PlanOptions
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.fidelity.level import measure_fidelity
from int8convert.verification.options import Execution
from tests.conftest import InProcessWorker
from tests.tools.tiny_models import save_checkpoint

CONFIGURATION = """
from transformers import LlamaConfig

class NovelConfig(LlamaConfig):
    model_type = "novel"
"""

# By name and shape o_proj is a Linear; only the class can tell that no loader would replace it.
MODELING = """
import pathlib
import torch
from transformers import LlamaForCausalLM
from .configuration_novel import NovelConfig

pathlib.Path({trace!r}).touch()

class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.o_proj = ScaledLinear(64, 64, bias=False)
        self.post_init()

class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file the checkpoint's code makes when it runs."""
    return tmp_path / "trace"


@pytest.fixture
def novel(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose class is in it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # an earlier test's
    directory = save_checkpoint("llama", tmp_path / "novel")
    edit_config(
        directory,
        architectures=["NovelForCausalLM"],
        model_type="novel",
        auto_map={
            "AutoConfig": "configuration_novel.NovelConfig",
            "AutoModelForCausalLM": "modeling_novel.NovelForCausalLM",
        },
    )
    (directory / "configuration_novel.py").write_text(CONFIGURATION)
    (directory / "modeling_novel.py").write_text(MODELING.format(trace=str(trace)))
    return directory


def edit_config(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **entries}))


def test_code_of_the_checkpoint_is_refused_unless_the_user_trusts_it(
    novel: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.planning.model_map.process.Worker", InProcessWorker)
    for run in (lambda: int8convert.plan(novel), lambda: int8convert.quantize(novel, tmp_path / "out")):
        with pytest.raises(RemoteCodeError, match=r"NovelForCausalLM is code in the checkpoint \(auto_map") as caught:
            run()
        assert "--trust-remote-code" in caught.value.hint
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trusted_code_decides_as_it_does_for_the_loader(novel: Path, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    report = int8convert.quantize(novel, tmp_path / "out", int8convert.PlanOptions(trust_remote_code=True))
    assert report.model_class == "NovelForCausalLM"
    assert trace.exists() and any("was run" in text for text in report.notes)
    assert any("own code was not searched for weights that it reads itself" in text for text in report.notes)
    plain = {"device_map": "cpu", "trust_remote_code": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **plain)
    assert not any(info.values()), info
    assert type(model.model.layers[0].self_attn.o_proj).__name__ == "ScaledLinear"  # a subclass: it stays 16-bit
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        novel, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), **plain
    )
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, theirs(tokens).logits)


def test_transformers_that_is_newer_than_the_table_of_reads_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("llama", tmp_path)
    before = torch.get_default_dtype()
    assert build_model(str(tmp_path), [], trusts_code=False)[2] == []
    monkeypatch.setattr("int8convert.planning.model_map.build.READS_VERSION", "5.9")
    _, _, (note,) = build_model(str(tmp_path), [], trusts_code=False)
    torch.set_default_dtype(before)
    assert note == (
        f"transformers {transformers.__version__}, newer than 5.9, was not searched for weights that it reads itself: "
        "run `int8convert verify`, which tries the output"
    )


def test_code_that_transformers_has_a_class_for_is_not_run_even_if_trusted(
    trace: Path, tmp_path: Path, map_in_process: None
) -> None:
    directory = save_checkpoint("llama", tmp_path / "llama")
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (directory / "modeling_llama.py").write_text(MODELING.format(trace=str(trace)))
    for trusts in (False, True):
        assert (
            int8convert.plan(directory, PlanOptions(trust_remote_code=trusts)).model_map.model_class
            == "LlamaForCausalLM"
        )
    assert not trace.exists()


@pytest.mark.parametrize(
    ("code", "complaint"),
    [("raise KeyError('odd')", "KeyError: 'odd'"), ("import no_such_package", "no_such_package"), (None, "OSError")],
)
def test_trusted_code_that_fails_is_an_error_not_a_guess(
    code: str | None, complaint: str, novel: Path, map_in_process: None
) -> None:
    if code is None:
        (novel / "modeling_novel.py").unlink()
    else:
        (novel / "modeling_novel.py").write_text(code)
    with pytest.raises(ModelMapError, match=f"own code for NovelForCausalLM.* raises .*{complaint}"):
        int8convert.plan(novel, PlanOptions(trust_remote_code=True))


@pytest.mark.parametrize("auto_map", [["modeling_novel.NovelForCausalLM"], {"AutoModel": 7}, {"AutoConfig": "a.B"}])
def test_auto_map_that_names_no_class(auto_map: Any, novel: Path, map_in_process: None) -> None:
    edit_config(novel, auto_map=auto_map)
    with pytest.raises(RemoteCodeError):
        int8convert.plan(novel)
    with pytest.raises(ModelMapError, match=r"auto_map in config\.json names no class"):
        int8convert.plan(novel, PlanOptions(trust_remote_code=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fidelity_is_measured_with_trusted_code_only(
    novel: Path, trace: Path, tmp_path: Path, map_in_process: None
) -> None:
    int8convert.quantize(novel, tmp_path / "out", int8convert.PlanOptions(trust_remote_code=True))
    trace.unlink()
    windows = TokenWindows(torch.arange(3, 43).view(2, 20), "numbers", "", 40)
    with pytest.raises(RemoteCodeError, match=r"novel' is code in the checkpoint \(auto_map"):
        measure_fidelity(novel, tmp_path / "out", windows)
    assert not trace.exists()
    kls = []
    for stream in (False, True):
        (report,) = measure_fidelity(novel, tmp_path / "out", windows, Execution(stream=stream), trust_remote_code=True)
        kls.append(report.mean_kl)
    assert kls[0] == pytest.approx(kls[1], rel=1e-6)
    assert 0 < kls[0] < 1e-3
