"""Int8 layers for transformers' loader: `from_pretrained(..., quantization_config=Int8ConvertConfig())`.

1. `Int8Linear` replaces the modules that the checkpoint holds as int8, before any weight is read. These are the modules
   that the layout's own loader replaces, by the list in config.json.
2. transformers reads every tensor straight to its device. Parameters have the names of the tensors, so nothing is
   converted, and offloaded modules are read from the checkpoint's files.
3. A checkpoint that is not quantized is quantized tensor by tensor while it loads.

A saved config.json has the block of the model's layout, never the method `int8convert`: loaders that do not know it
would take the codes for weights.

Importing this module registers the loader with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.errors import FormatError
from int8convert.formats.config import read_format, read_threshold
from int8convert.formats.format import QUANTIZE_FORMATS, Format
from int8convert.formats.layers import is_conv1d_layer
from int8convert.formats.modules import module_of
from int8convert.formats.transforms import BLOCK_SIZE, rotated_inputs
from int8convert.runtime.experts import Int8Experts, experts_form, experts_in
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.weight_reads import modules_with_read_weights
from int8convert.text import quoted
from int8convert.transformers_internals import (
    ConversionOps,
    WeightConverter,
    get_module_from_name,
    is_marked_loaded,
    kept_in_fp32,
    mark_loaded,
    prefer_callers_config,
    should_convert_module,
)

METHOD = "int8convert"


@register_quantization_config(METHOD)
class Int8ConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The options of an int8 model's layers, and the block of its checkpoint.

    Args:
        outliers: the choice of 16-bit columns, see `OutlierMode`; None is static+guard where the checkpoint has stored
            outlier columns, else dynamic.
        threshold: magnitude from which a column is an outlier; None takes the checkpoint's, or 6.
        skip_modules: modules that stay 16-bit where a checkpoint is quantized while it loads; None leaves the choice to
            transformers. Ignored for an int8 checkpoint.

    Attributes:
        block: `quantization_config` of the checkpoint's config.json; None if it has none.
    """

    def __init__(
        self,
        outliers: str | None = None,
        threshold: float | None = None,
        skip_modules: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.outliers = outliers
        self.threshold = threshold
        self.skip_modules = skip_modules
        self.block: dict[str, Any] | None = None
        self.layout = Format.BITSANDBYTES

    def for_checkpoint(self, block: Mapping[str, Any] | Any) -> Int8ConvertConfig:
        """Return a copy for a checkpoint whose config.json has this block.

        Raises:
            SourceError: the checkpoint is quantized in a way that this runtime does not read.
            FormatError: it is int8 in a layout that this runtime does not read.
        """
        if isinstance(block, QuantizationConfigMixin):
            block = block.to_dict()
        found = read_format({"quantization_config": block}, "it")
        if not module_of(found).RUNTIME_LOADS:
            raise FormatError(
                f"the runtime reads the formats {' and '.join(QUANTIZE_FORMATS)}, and this checkpoint is {found}",
                "run `int8convert export OUT NEW --format bitsandbytes`; the codes stay the same",
            )
        chosen = Int8ConvertConfig(self.outliers, self.threshold)
        chosen.block = dict(block)
        chosen.layout = found
        return chosen

    @property
    def mode(self) -> OutlierMode:
        return OutlierMode(self.outliers) if self.outliers else OutlierMode.DYNAMIC

    @property
    def outlier_threshold(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return read_threshold({"quantization_config": self.block or {}}, OUTLIER_THRESHOLD)

    def to_dict(self) -> dict[str, Any]:
        """Return the layout's block for config.json."""
        module = module_of(self.layout)
        if self.block is None:
            return module.block(self.skip_modules or (), self.outlier_threshold)
        return {**self.block, **({"llm_int8_threshold": self.outlier_threshold} if module.HAS_THRESHOLD else {})}


@register_quantizer(METHOD)
class Int8ConvertQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' hooks for loading a model with an `Int8ConvertConfig`."""

    quantization_config: Int8ConvertConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        module_of_format = module_of(config.layout)
        if module_of_format.HOLDS_EXPERTS:
            _replace_experts(model, config, _tensor_names(checkpoint_files or ()))
        if config.block is not None:
            is_int8 = module_of_format.int8_modules(model, config.block)
        else:
            is_int8 = self._modules_to_quantize(model)
        self._conv1d: set[str] = set()
        for name, module in list(model.named_modules()):
            if not isinstance(module, Int8Linear) and is_int8(name, module):
                if is_conv1d_layer(module):
                    self._conv1d.add(name)
                model.set_submodule(name, _empty_layer(module, config))
        _rotate_inputs(model, config.block or {})
        layers: list[Any] = [module for module in model.modules() if isinstance(module, Int8Linear)]
        for layer in layers:
            mark_loaded(layer)  # transformers would draw random weights for one that is on the disk

    def _modules_to_quantize(self, model: Any) -> Callable[[str, nn.Module], bool]:
        """Return which modules of a checkpoint that is not int8 become it; record the others for its config.json."""
        config = self.quantization_config
        replaces = module_of(config.layout).replaces
        skips = self.get_modules_to_not_convert(model, config.skip_modules, kept_in_fp32(model))
        read = modules_with_read_weights(model)
        chosen = {
            name
            for name, module in model.named_modules()
            if replaces(module) and should_convert_module(name, skips) and name not in read
        }
        left = (n for n, m in model.named_modules() if replaces(m) and n not in chosen)
        config.skip_modules = sorted(left)
        return lambda name, _: name in chosen

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the conversions without those that merge experts which are separate layers here."""
        names = "\n".join(name for name, _ in model.named_parameters())
        return [
            transform
            for transform in weight_conversions
            if not isinstance(transform, WeightConverter)
            or any(re.search(f"{target}$", names, re.MULTILINE) for target in transform.target_patterns)
        ]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                module.requires_grad_(False)
                module.show_scale()
                order = getattr(module, "weight_format", None)
                if order is None or order.device.type == "meta":
                    continue
                if not is_marked_loaded(order):
                    order.zero_()  # not in the checkpoint: transformers leaves here what was in memory
                if int(order):
                    raise FormatError(
                        f"{name}.weight_format is {int(order)}, expected 0: the codes are in an order of old GPUs",
                        "write the checkpoint again with a current bitsandbytes, or quantize its source",
                    )
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(frozenset(self._conv1d))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _QuantizeWeight(ConversionOps):  # type: ignore[misc]
    """Turns the float weight of a replaced module into the tensors of its `Int8Linear`.

    Args:
        conv1d: the modules whose weights are stored [in, out].
    """

    def __init__(self, conv1d: frozenset[str]) -> None:
        self._conv1d = conv1d

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        from cuda_kernels import ops

        converted: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            if path in self._conv1d:
                weight = weight.t().contiguous()
            rows = ops.row_quantize(weight)
            order = torch.zeros((), dtype=torch.uint8, device=weight.device)
            converted |= {name: rows.codes, f"{path}.SCB": rows.absmax, f"{path}.weight_format": order}
        return converted


def _rotate_inputs(model: Any, block: Mapping[str, Any]) -> None:
    """Make the layers that a block names rotate their inputs."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    for name in rotated_inputs(block):
        if name not in layers or layers[name].in_features % BLOCK_SIZE:
            raise FormatError(
                f"config.json rotates the inputs of {quoted(name)} in blocks of {BLOCK_SIZE}, but it is no int8 layer, "
                "or its width is no multiple of that",
                "fetch config.json again, or convert the source again",
            )
        layers[name].input_block = BLOCK_SIZE


def _tensor_names(files: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def _replace_experts(model: Any, config: Int8ConvertConfig, tensor_names: set[str]) -> None:
    """Replace the experts that the checkpoint holds as int8. config.json does not name them."""
    for name, names in experts_in(model, tensor_names).items():
        module = model.get_submodule(name)
        form = experts_form(module)
        if form is not None and names.keys() == form.projections.keys():
            model.set_submodule(name, Int8Experts(module, form, names, config.mode, config.outlier_threshold))


def _empty_layer(module: Any, config: Int8ConvertConfig) -> Int8Linear:
    """Return an `Int8Linear` on the meta device for a Linear or a Conv1D."""
    n_in, n_out = module.weight.shape if is_conv1d_layer(module) else module.weight.shape[::-1]
    has_bias = module.bias is not None
    return Int8Linear(
        n_in,
        n_out,
        has_bias,
        "meta",
        module.weight.dtype,
        layout=config.layout,
        mode=config.mode,
        threshold=config.outlier_threshold,
    )


prefer_callers_config(Int8ConvertConfig)
