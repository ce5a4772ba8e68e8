"""One family: its tiny model converted by us and by transformers + bitsandbytes, and the two compared.

1. Build the model, run it in fp32, save it in fp16 (in fp32 where it does not run in fp16).
2. Convert it here with `min_coverage=0`; a refusal must leave nothing that looks like a checkpoint.
3. Let bitsandbytes quantize, save, load and run the same source; whatever breaks there is noted, not ours.
4. Compare: keys, `weight` and `SCB` bytes, logits; our output must load with no missing and no unexpected key.
5. Where bitsandbytes gives nothing to compare with, each int8 weight is compared with its bare operation, and the
   logits with those of the source: close, not equal, but far from what wrong weights would give.

Where we keep modules 16-bit that bitsandbytes by itself does not, it is asked again, with our skip list.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers

import int8convert
from int8convert.errors import Int8ConvertError
from int8convert.planning import pending_plan
from int8convert.planning.model_map.model_map import ModelMap
from int8convert.planning.model_map.process import ModelMapProcess
from tests.conftest import InProcessMap
from tests.tools.family_models import Family, build_family
from tests.tools.tiny_models import read_tensors

Inputs = Callable[[Any], dict[str, torch.Tensor]]
"""What a model is run with."""

MIN_COSINE = 0.97
"""Between logits of source and output, where there is nothing exact to compare with; wrong weights give about 0."""


class Outcome(StrEnum):
    """How a family ended."""

    MATCHES = "converts and matches"
    MATCHES_FLAT = "converts and matches, given flat inputs"
    MATCHES_WITH_OUR_SKIPS = "converts, matches with our skip list"
    BEYOND_BITSANDBYTES = "converts and loads, bitsandbytes itself fails"
    REFUSED = "refused with the reason"
    NOT_RUN = "does not run in fp32"
    NOT_BUILT = "not built"
    WRONG = "wrong"


@dataclass
class FamilyResult:
    """What was found.

    Attributes:
        family: its name, task/model_type.
        class_name: of the model.
        outcome: how it ended.
        detail: the reason where it did not match.
        coverage: share of the parameters that became int8; None where nothing was converted.
        kept: reasons for what stays 16-bit, the most parameters first.
        bitsandbytes_fails: the step at which bitsandbytes itself broke, and how; "" if it did not.
    """

    family: str
    class_name: str
    outcome: Outcome = Outcome.WRONG
    detail: str = ""
    coverage: float | None = None
    kept: list[str] = field(default_factory=list)
    bitsandbytes_fails: str = ""


class MapInProcess(InProcessMap):
    """The map made in this process; where that fails, by the real child, which then falls back as it does for users."""

    def result(self) -> ModelMap:
        try:
            return super().result()
        except Int8ConvertError:
            raise
        except Exception:
            return ModelMapProcess(self._source, self._modules).result()


def map_in_this_process() -> None:
    """Let all conversions of this process make their maps here, and save the seconds a child takes to start."""
    pending_plan.ModelMapProcess = MapInProcess  # type: ignore[attr-defined, assignment]


class Mismatch(Exception):
    """Ours is not what it should be."""


def describe(error: BaseException) -> str:
    """Class and first line of an error, and where it was raised."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first[:160]} ({Path(frame.filename).name}:{frame.lineno})"


def text_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Fixed tokens; text alone, whatever else the model could take."""
    tokens = torch.arange(3, 43).reshape(4, 10)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def run_model(model: Any, inputs: Inputs = text_inputs) -> torch.Tensor:
    """Logits, or the first tensor the model returns."""
    with torch.no_grad():
        output = model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs(model).items()})
    found = next((output[name] for name in ("logits", "logits_per_image") if name in output), output[0])
    if not isinstance(found, torch.Tensor):
        raise TypeError("the model returns no tensor")
    return found.float()


def check_family(family: Family, folder: Path) -> FamilyResult:
    """Convert and compare one family, in an empty folder."""
    try:
        model = build_family(family)
    except Exception as error:
        return FamilyResult(family.name, family.class_name, Outcome.NOT_BUILT, describe(error))
    return check_model(family.name, model, folder)


def check_model(name: str, model: Any, folder: Path, inputs: Inputs = text_inputs) -> FamilyResult:
    """Convert and compare a model built in fp32, in an empty folder."""
    result = FamilyResult(name, type(model).__name__)
    try:
        with_finite_weights(model)
        if not run_model(model, inputs).isfinite().all():
            raise FloatingPointError("the logits are not finite")
    except Exception as error:
        result.outcome, result.detail = Outcome.NOT_RUN, describe(error)
        return result
    try:
        compare(model, folder, result, inputs)
    except Mismatch as error:
        result.outcome, result.detail = Outcome.WRONG, str(error)
    except Exception as error:
        result.outcome, result.detail = Outcome.WRONG, describe(error)
    return result


def with_finite_weights(model: Any) -> None:
    """Replace what a class leaves uninitialised by small random values; the rest stays as the class made it."""
    for parameter in model.parameters():
        if parameter.numel() and not (parameter.isfinite().all() and parameter.abs().max() < 1000):
            parameter.data.normal_(0, 0.02)


def compare(model: Any, folder: Path, result: FamilyResult, inputs: Inputs) -> None:
    """Convert by both and compare; fills in the result."""
    source, ours = folder / "source", folder / "ours"
    source_logits = save_source(model, source, inputs)
    model_class = type(model)
    del model
    try:
        report = int8convert.quantize(
            source, ours, int8convert.PlanOptions(min_coverage=0), on_event=lambda event: None
        )
    except Int8ConvertError as error:
        if (ours / "config.json").exists() or any(ours.glob("*.safetensors")):
            raise Mismatch(f"refused, but left files: {error.message}") from error
        result.outcome, result.detail = Outcome.REFUSED, f"{error.message}; {error.hint}"
        return
    if report.model_class is None:
        raise Mismatch("; ".join(report.notes))
    result.coverage = report.coverage
    result.kept = [kept.reason for kept in report.kept]
    our_tensors = read_tensors(ours)
    check_against_bare_operation(our_tensors, ours, source)
    our_model, info = model_class.from_pretrained(ours, device_map="cpu", output_loading_info=True)
    if any(info.values()):
        raise Mismatch("on loading ours: " + "; ".join(f"{k}: {sorted(map(str, v))[:3]}" for k, v in info.items() if v))
    n_modules = sum(isinstance(module, bitsandbytes.nn.Linear8bitLt) for module in our_model.modules())
    n_codes = sum(tensor.dtype == torch.int8 for tensor in our_tensors.values())
    if n_modules < n_codes:
        raise Mismatch(f"{n_codes} int8 weights, but the loader makes {n_modules} int8 modules of them")
    theirs = Theirs(model_class, source, folder / "theirs", inputs)
    result.bitsandbytes_fails = theirs.failure
    is_flat = False
    try:
        our_logits = run_model(our_model, inputs)
    except Exception as error:
        if not theirs.fails_to_run():
            raise Mismatch(f"ours does not run: {describe(error)}") from error
        with flattened_inputs():
            our_logits = run_model(our_model, inputs)
            theirs = Theirs(model_class, source, folder / "theirs flat", inputs)
            is_flat = True
    check_close(our_logits, source_logits)
    if theirs.matches(our_tensors, our_logits):
        result.outcome = Outcome.MATCHES_FLAT if is_flat else Outcome.MATCHES
        return
    skips = our_model.config.quantization_config.llm_int8_skip_modules
    with flattened_inputs() if is_flat else nullcontext():
        asked_again = Theirs(model_class, source, folder / "theirs with skips", inputs, skips)
    if asked_again.matches(our_tensors, our_logits):
        result.outcome = Outcome.MATCHES_WITH_OUR_SKIPS
        result.detail = "" if theirs.failure else theirs.difference
    elif theirs.failure:
        result.outcome = Outcome.BEYOND_BITSANDBYTES
    else:
        raise Mismatch(theirs.difference)


def save_source(model: Any, directory: Path, inputs: Inputs) -> torch.Tensor:
    """Write the model in the first dtype of fp16, bf16, fp32 in which it can be loaded again and run; its logits."""
    for parameter in model.parameters():
        # bitsandbytes rounds fp32 weights to fp16 before it quantizes a model, which we do not.
        parameter.data = parameter.data.half().float()
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained(directory)
        try:
            loaded = type(model).from_pretrained(directory, device_map="cpu")
            logits = run_model(loaded, inputs)
            if not logits.isfinite().all():
                raise FloatingPointError("the logits are not finite")
            return logits
        except Exception as error:
            errors.append(f"{dtype}: {describe(error)}")
            model.float().load_state_dict(state_dict)
    raise Mismatch("the source itself cannot be saved, loaded and run: " + "; ".join(errors))


def check_against_bare_operation(tensors: dict[str, torch.Tensor], ours: Path, source: Path) -> None:
    """Each int8 weight of ours must be what bitsandbytes' operation makes of the source's values.

    Weights that transformers renames are left to the comparison with bitsandbytes' own output.
    """
    source_tensors = read_tensors(source)
    for name, codes in tensors.items():
        if codes.dtype != torch.int8:
            continue
        weight = source_tensors.get(name)
        if weight is None:
            continue
        if weight.shape != codes.shape or weight.shape[0] == weight.shape[1]:
            candidates = [w for w in (weight, weight.t().contiguous()) if w.shape == codes.shape]
        else:
            candidates = [weight]
        if not any(is_quantized_from(codes, tensors[name.removesuffix(".weight") + ".SCB"], w) for w in candidates):
            raise Mismatch(f"{name} is not what bitsandbytes' operation makes of it")


def is_quantized_from(codes: torch.Tensor, absmax: torch.Tensor, weight: torch.Tensor) -> bool:
    for values in (weight, weight.to(torch.float16)):
        expected, expected_absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(values)
        if torch.equal(codes, expected) and torch.equal(absmax, expected_absmax):
            return True
    return False


def check_close(logits: torch.Tensor, source_logits: torch.Tensor) -> None:
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), source_logits.flatten(), dim=0).item()
    if not cosine >= MIN_COSINE:
        raise Mismatch(f"logits of ours and of the source have cosine {cosine:.4f}")


@contextmanager
def flattened_inputs() -> Iterator[None]:
    """bitsandbytes' CPU operation takes inputs of two and three dimensions; here, any number."""
    forward = bitsandbytes.nn.Linear8bitLt.forward

    def flat_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = forward(self, x.reshape(-1, x.shape[-1]))
        return result.reshape(*x.shape[:-1], -1)

    bitsandbytes.nn.Linear8bitLt.forward = flat_forward
    try:
        yield
    finally:
        bitsandbytes.nn.Linear8bitLt.forward = forward


class Theirs:
    """What transformers + bitsandbytes makes of a source.

    Attributes:
        failure: the step at which it breaks, and how; "" if it does not.
        difference: what was found to differ from ours; "" if nothing.
    """

    def __init__(
        self, model_class: Any, source: Path, directory: Path, inputs: Inputs, skips: list[str] | None = None
    ) -> None:
        self._inputs = inputs
        self.failure = ""
        self.difference = ""
        self._tensors: dict[str, torch.Tensor] | None = None
        self._logits: torch.Tensor | None = None
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skips)
        model = self._step(
            "quantizing",
            lambda: model_class.from_pretrained(source, quantization_config=config, device_map="cpu"),
        )
        if model is None:
            return
        self._logits = self._step("running", lambda: run_model(model, inputs))
        if self._step("saving", lambda: model.save_pretrained(directory) or True):
            self._tensors = read_tensors(directory)
            self._step("loading again", lambda: self._reload(model_class, directory))

    def _step(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self.failure = self.failure or f"{name}: {describe(error)}"
            return None

    def _reload(self, model_class: Any, directory: Path) -> None:
        model, info = model_class.from_pretrained(directory, device_map="cpu", output_loading_info=True)
        if any(info.values()):
            raise LookupError("; ".join(f"{k}: {sorted(map(str, v))[:2]}" for k, v in info.items() if v))
        logits = run_model(model, self._inputs)
        if self._logits is not None and not torch.equal(logits, self._logits):
            raise ArithmeticError("logits differ from those before saving")

    def fails_to_run(self) -> bool:
        return self._logits is None

    def matches(self, tensors: dict[str, torch.Tensor], logits: torch.Tensor) -> bool:
        """Whether keys, int8 bytes and logits are equal, as far as bitsandbytes gets."""
        if self._logits is None or self._tensors is None:
            self.difference = "bitsandbytes gives nothing to compare with"
            return False
        if set(tensors) != set(self._tensors):
            extra, missing = set(tensors) - set(self._tensors), set(self._tensors) - set(tensors)
            self.difference = f"keys only in ours: {sorted(extra)[:3]}, only in theirs: {sorted(missing)[:3]}"
            return False
        for name, tensor in self._tensors.items():
            if tensors[name].dtype != tensor.dtype:
                self.difference = f"{name} is {tensors[name].dtype} here, {tensor.dtype} there"
                return False
            if not torch.equal(tensors[name], tensor):
                self.difference = f"{name} holds other bytes"
                return False
        if not torch.equal(logits, self._logits):
            self.difference = f"logits differ by {(logits - self._logits).abs().max():.3g}"
            return False
        return True
