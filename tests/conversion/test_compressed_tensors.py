"""What `--format compressed-tensors` writes, read by compressed-tensors and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from int8convert.errors import CoverageError
from int8convert.verification.verify import verify
from tests.tools.family_models import build_family, families
from tests.tools.options import quantize
from tests.tools.tiny_models import build_model, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

TOKENS = torch.arange(3, 35)[None]


def convert(source: Path, out: Path, output_format: str = "compressed-tensors", **options: Any) -> Any:
    return quantize(source, out, format=output_format, **options)


def save_falcon(directory: Path, dtype: torch.dtype) -> Path:
    """All its Linear layers are of a subclass."""
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.FalconForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gemma3", "gpt_neox", "bloom", "t5", "phi3", "falcon"])
def test_loads_with_the_weights_that_were_meant(name: str, tmp_path: Path) -> None:
    """Every parameter of the loaded model, decompressed by compressed-tensors itself, against codes x scale."""
    pytest.importorskip("compressed_tensors")
    dtype = torch.bfloat16
    source = tmp_path / "source"
    save_falcon(source, dtype) if name == "falcon" else save_checkpoint(name, source, dtype)
    report = convert(source, tmp_path / "out")
    assert report.coverage > 0.5
    written = read_tensors(tmp_path / "out")
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs: dict[str, Any] = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if name == "t5" else {})
    plain = auto.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        expected = plain(**inputs).logits.float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
    n_checked = 0
    for module_name, module in model.named_modules():
        if f"{module_name}.weight_scale" in written:
            meant = written[f"{module_name}.weight"].float() * written[f"{module_name}.weight_scale"]
            torch.testing.assert_close(module.weight.float(), meant, rtol=2**-7, atol=0)  # it holds bf16
            n_checked += 1
    assert n_checked == sum(error.n_tensors for error in report.errors)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_codes_are_those_of_the_bitsandbytes_format(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "source")
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "b", "bitsandbytes")
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    scales = [key for key in b if key.endswith(".SCB")]
    assert scales
    for key in scales:
        module = key.removesuffix(".SCB")
        assert torch.equal(a[f"{module}.weight"], b[f"{module}.weight"])
        assert torch.equal(a[f"{module}.weight_scale"], (b[key] / 127)[:, None])
    others = {key for key in b if not key.endswith((".SCB", ".weight_format"))}
    assert set(a) == others | {key.removesuffix("SCB") + "weight_scale" for key in scales}


def test_logits_are_as_close_to_the_source_as_those_of_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("bitsandbytes")
    source = save_checkpoint("llama", tmp_path / "source")
    with torch.no_grad():
        exact = build_model("llama", torch.float32)
        exact.load_state_dict({key: value.float() for key, value in read_tensors(source).items()}, strict=False)
        expected = exact(TOKENS).logits
        errors = {}
        for output_format in ("bitsandbytes", "compressed-tensors"):
            convert(source, tmp_path / output_format, output_format)
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / output_format)
            errors[output_format] = (model(TOKENS).logits.float() - expected).norm()
    assert errors["compressed-tensors"] < 1.5 * errors["bitsandbytes"] < 0.1 * expected.norm()


def test_config_names_every_linear_that_stays_16_bit(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    convert(source, tmp_path / "out", skip=["layers.1.mlp.down_proj"])
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "int-quantized")


def test_conv1d_has_no_form_in_it(tmp_path: Path) -> None:
    source = save_checkpoint("gpt2", tmp_path / "source")
    with pytest.raises(CoverageError) as caught:
        convert(source, tmp_path / "out", min_coverage=0)
    assert "Conv1D: compressed-tensors has no form for it" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_weight_whose_name_has_no_place_for_a_scale_stays_16_bit(tmp_path: Path) -> None:
    """`...k_sconv.weight_proj` in the file, `...k_sconv.weight_proj.weight` in the model."""
    family = next(family for family in families() if family.name == "causal/inkling2_text")
    build_family(family).half().save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", min_coverage=0)
    assert "renamed on loading, its scale is not" in {group.reason for group in report.kept}
    written = read_tensors(tmp_path / "out")
    kept = [name for name in written if name.endswith(".weight_proj")]
    assert kept and all(written[name].dtype == torch.float16 for name in kept)
    assert verify(tmp_path / "out", level="exact").is_passed
