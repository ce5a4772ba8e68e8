"""`plan`: the way from a user's options to a conversion plan, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.refused import check_readable
from int8convert.decoding.source_weights import is_decodable
from int8convert.errors import AdapterError
from int8convert.formats.format import DEFAULT_FORMAT, Format, quantize_format
from int8convert.formats.modules import module_of
from int8convert.planning.adapters.adapter import open_adapter
from int8convert.planning.calibrated_rounding import CALIBRATED, NEAREST, ROUNDINGS, open_rounding
from int8convert.planning.kept_modules import KeepBudget
from int8convert.planning.model_map.model_map import ModuleFilter, check_config
from int8convert.planning.needs import check_needs
from int8convert.planning.pending_plan import PlanRequest, plan_conversion
from int8convert.planning.plan import ROUNDED_DTYPES, ConversionPlan
from int8convert.planning.smoothing import Smoothing, open_calibrated, open_factors
from int8convert.sources import open_source
from int8convert.text import parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What of a checkpoint becomes int8, in which format and files. `plan` and `quantize` share these options.

    Attributes:
        skip: modules that stay 16-bit: full names or dotted tails of names, with shell wildcards.
        only: if not empty, no other module becomes int8.
        format: "bitsandbytes", which transformers loads, or "compressed-tensors", which vLLM serves, int8 experts
            included. SGLang serves those with `--quantization w8a8_int8`.
        max_shard_size: bytes, or a string such as "5GB"; None makes one output shard for each source shard.
        lora: directory of a PEFT adapter to merge into the weights, in float32, before they are quantized.
        rotate: fold a rotation of the residual stream and of the heads' values into the weights, after which int8 holds
            them and their inputs better. Every loader runs the result. Refused for models that allow none.
        rotate_inputs: like `rotate`, and the loader rotates inputs that no fold reaches, such as those of `down_proj`,
            while the model runs. Needs the format compressed-tensors. int8convert runs the result, and vLLM on one GPU;
            transformers computes something else.
        calibration: the folder that `calibrate` wrote, with second moments, for what is "calibrated".
        smooth: "calibrated" moves outliers from inputs into weights where that makes the error of the layers' outputs
            smaller, see `smoothing_search`; the path of a file takes the factors of an earlier conversion of the same
            source. Every loader runs the result.
        trust_remote_code: run the checkpoint's own code where transformers has no class of the model's name.
        allow_missing: patterns, as for `skip`, of tensors or modules that the source may lack although the model needs
            them. Loaders of the output make up their values, so it is for heads that are yet to be trained.
        min_coverage: share of the parameters, 0 to 1, that must become int8; None refuses only a plan that leaves
            nearly all Linear weights 16-bit. `plan` does not check it.
        revision: branch, tag or commit of a repository; None is its main branch.
        cache_dir: a Hub cache that keeps downloads.
        keep: keeps the modules 16-bit whose rounding costs most, as if `skip` named them; see
            `outliers.keep.keep_budget`. `quantize` continues with the choice of the run that it resumes. `plan` does
            not know the choice, and ignores this.
        round: "nearest", or "calibrated" to choose codes by the layers' outputs, where that is better on held-out
            inputs; see `conversion.calibrated_rows`.
        round_source: "bfloat16" or "float16" rounds decoded low-bit weights to that dtype before they become int8, as
            transformers' dequantization followed by bitsandbytes does; None quantizes the exact float32 weights.
    """

    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    format: str = DEFAULT_FORMAT
    max_shard_size: int | str | None = None
    lora: str | os.PathLike[str] | None = None
    rotate: bool = False
    rotate_inputs: bool = False
    smooth: str | os.PathLike[str] | None = None
    trust_remote_code: bool = False
    allow_missing: Sequence[str] = ()
    min_coverage: float | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    keep: KeepBudget | None = None
    round: str = NEAREST
    calibration: str | os.PathLike[str] | None = None
    round_source: str | None = None


def plan(src: str | os.PathLike[str], options: PlanOptions | None = None) -> ConversionPlan:
    """Return what `quantize` would do with a checkpoint. Reads headers alone, and writes nothing.

    Args:
        src: a directory, or the name of a repository on the Hub.
        options: None takes the defaults.

    Raises:
        Int8ConvertError: the source cannot be read, lacks weights, or a pattern matches nothing.
        ValueError: an option is out of its range.
    """
    options = options or PlanOptions()
    made = plan_unchecked(src, options)
    check_needs(made.model_map, made.source, options.allow_missing)
    return made


def plan_unchecked(src: str | os.PathLike[str], options: PlanOptions) -> ConversionPlan:
    """Plan like `plan`, also a checkpoint that lacks weights of its model; see `model_map.ModelNeeds`."""
    return plan_conversion(open_request(src, options))


def open_request(src: str | os.PathLike[str], options: PlanOptions) -> PlanRequest:
    """Open the source and the adapter, and check what is known without the model.

    Raises:
        Int8ConvertError: one of them cannot be read, or config.json names no model that could be mapped.
        ValueError: an option is out of its range.
    """
    if options.rotate_inputs and not module_of(quantize_format(options.format)).ROTATES_INPUTS:
        raise ValueError(f"rotate_inputs needs the format {Format.COMPRESSED_TENSORS}, not {options.format}")
    if options.round not in ROUNDINGS:
        raise ValueError(f"round must be {' or '.join(ROUNDINGS)}, not {options.round!r}")
    if CALIBRATED in (options.smooth, options.round) and options.calibration is None:
        raise ValueError("smooth and round calibrated need a calibration")
    if options.round_source not in (None, *ROUNDED_DTYPES):
        raise ValueError(f"round_source must be {' or '.join(ROUNDED_DTYPES)}, not {options.round_source!r}")
    modules = ModuleFilter(
        tuple(options.skip), tuple(options.only), quantize_format(options.format), options.trust_remote_code
    )
    max_shard_bytes = parse_size(options.max_shard_size)
    cache = Path(options.cache_dir) if options.cache_dir is not None else None
    source = open_source(src, options.revision, cache, ignores_adapter=True)
    check_readable(source)
    check_config(source.config, is_decodable(source))
    adapter = open_adapter(options.lora) if options.lora is not None else None
    if adapter is not None and (options.round == CALIBRATED or options.smooth is not None):
        raise AdapterError(
            f"an adapter changes the inputs by which {'--smooth' if options.smooth else '--round calibrated'} chooses",
            "merge the adapter with PEFT, then calibrate and convert the merged checkpoint",
        )
    folder = options.calibration if options.round == CALIBRATED else None
    return PlanRequest(
        source,
        modules,
        max_shard_bytes,
        adapter,
        rotates=options.rotate,
        rotates_inputs=options.rotate_inputs,
        rounding=open_rounding(folder, source) if folder is not None else None,
        rounds_to=ROUNDED_DTYPES[options.round_source] if options.round_source is not None else None,
        smoothing=_open_smoothing(options, source),
    )


def _open_smoothing(options: PlanOptions, source: CheckpointSource) -> Smoothing | None:
    if options.smooth == CALIBRATED and options.calibration is not None:
        return open_calibrated(options.calibration, source)
    return open_factors(options.smooth) if options.smooth is not None else None
