"""Child process of `TrialRun`: runs a few tokens through an int8 model without its weights.

1. Build the model of config.json on the meta device, and put hollow layers where the loader of the format puts int8
   ones. A hollow layer has int8 codes for `weight`, requires a floating input, and returns a constant.
2. Give every other weight one number, expanded to the weight's shape. That takes no memory, whatever the model's size,
   and model code runs as usual on the CPU.
3. Run a forward pass, and with a cache a second one with one more token. Record each integer input of an int8 layer,
   each access to its codes, and each operation that returns int8.
4. If there are findings, a second run with ordinary Linear layers removes those that the model causes by itself.

If the model still does not run, because it needs images or sound or rejects constants, the answer says why.
Does not know layers that a text does not reach, and code that branches on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from int8convert.checkpoint.library_errors import library_errors
from int8convert.errors import ModelMapError, SourceError
from int8convert.formats.format import Format
from int8convert.formats.layers import is_conv1d_layer
from int8convert.formats.modules import module_of
from int8convert.planning.model_map.build import build_model
from int8convert.text import quoted
from int8convert.transformers_internals import mark_quantized

N_TOKENS = 8
FILLING = 0.01
"""Value of every weight; not zero, because norms and routers may divide by it."""
MAX_OWN_ELEMENTS = 65_536
"""Largest number of elements of a tensor with memory of its own: some model code writes into small buffers."""

_FACTS = frozenset({"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "layout", "is_cuda", "is_leaf"}) | {
    *("grad", "grad_fn", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "element_size"),
    *("is_complex", "_has_compatible_shallow_copy_type"),
}
"""Attributes that do not read the codes."""

_SAME = frozenset({"detach", "requires_grad_", "data"})
"""Attributes that return the same codes."""


class Record:
    """Operations of model code that int8 layers do not support.

    Attributes:
        running: names of the modules whose forward runs, the innermost last.
        mistakes: name of a hollow layer -> its misuse.
        int8_made: (module, operation) that returned an int8 tensor; some models do that by themselves.
        called: names of the hollow layers that were called.
        n_passes: number of completed forward passes.
    """

    def __init__(self) -> None:
        self.running: list[str] = []
        self.mistakes: dict[str, str] = {}
        self.int8_made: dict[tuple[str, str], None] = {}
        self.called: set[str] = set()
        self.n_passes = 0

    @property
    def place(self) -> str:
        return self.running[-1] if self.running else "the model"


class Codes(torch.Tensor):
    """The codes of a hollow layer. Model code that reads them gets floats instead, and is recorded."""

    module_name: str
    record: Record

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        kwargs = kwargs or {}
        # `module.to(torch.float32)`, as in Switch's router, leaves integers as they are.
        is_moved = name == "to" and not any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        if name in _SAME or is_moved:
            return args[0]
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args = _without_codes(args, name)
        return func(*args, **{key: _without_codes(value, name) for key, value in kwargs.items()})


def _name(func: Any) -> str:
    """Return the name of an operation, or of the attribute that is read."""
    name = getattr(func, "__name__", "")
    return str(getattr(func.__self__, "__name__", name)) if name in ("__get__", "__set__") else name or "an operation"


def _without_codes(value: Any, name: str) -> Any:
    if isinstance(value, Codes):
        value.record.mistakes.setdefault(value.module_name, f"its codes are read by {name} in {value.record.place}")
        return _constant(value.shape, torch.get_default_dtype())
    if isinstance(value, list | tuple):
        return type(value)(_without_codes(each, name) for each in value)
    return value


class HollowInt8Linear(nn.Linear):
    """A hollow layer, in place of the int8 layer of a loader."""

    def __init__(self, name: str, module: Any, record: Record) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        is_conv1d = is_conv1d_layer(module)
        self.in_features, self.out_features = module.weight.shape if is_conv1d else module.weight.shape[::-1]
        codes: Any = _constant((self.out_features, self.in_features), torch.int8).as_subclass(Codes)
        codes.module_name, codes.record = name, record
        codes.SCB = _constant((self.out_features,), torch.float32)  # as int8 weights have it; RWKV divides it
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = module.bias
        self._name, self._record = name, record

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._record.called.add(self._name)
        if not input.is_floating_point():
            self._record.mistakes.setdefault(self._name, f"an input of {input.dtype}")
            input = input.to(torch.get_default_dtype())
        if input.shape[-1] != self.in_features:
            raise ValueError(f"{self._name} takes {self.in_features} features, not {input.shape[-1]}")
        return torch.full((*input.shape[:-1], self.out_features), FILLING, dtype=input.dtype)


class Watch(TorchFunctionMode):
    """Skips Linear products, and records operations that return int8."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not any(isinstance(x, Codes) for x in (*args, *kwargs.values())):
            product = func(*map(_on_meta, args), **{key: _on_meta(value) for key, value in kwargs.items()})
            return torch.full(product.shape, FILLING, dtype=product.dtype)
        result = func(*args, **kwargs)
        for made in result if isinstance(result, list | tuple) else (result,):
            if isinstance(made, torch.Tensor) and made.dtype is torch.int8 and not isinstance(made, Codes):
                self._record.int8_made[self._record.place, _name(func)] = None
        return result


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _constant(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of one value, which takes memory only if it is small."""
    value = torch.full((), FILLING if dtype.is_floating_point else 0, dtype=dtype)
    shown = value.expand(shape)
    return shown.clone() if shown.numel() <= MAX_OWN_ELEMENTS else shown


def _fill(model: Any) -> None:
    """Give every weight and buffer on the meta device its constant."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                constant = _constant(parameter.shape, parameter.dtype)
                module._parameters[name] = nn.Parameter(constant, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _constant(buffer.shape, buffer.dtype)


@contextmanager
def _following(model: Any, record: Record) -> Iterator[None]:
    """Maintain `record.running`; after an error it ends with the module that raised it."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}

    def enter(module: Any, _: Any) -> None:
        record.running.append(names.get(id(module), type(module).__name__))

    def leave(*_: Any) -> None:
        record.running.pop()

    entering = nn.modules.module.register_module_forward_pre_hook(enter)
    leaving = nn.modules.module.register_module_forward_hook(leave)
    try:
        yield
    finally:
        entering.remove()
        leaving.remove()


def run_tokens(model: Any, record: Record) -> None:
    """Run a few tokens, and one more with the cache of the first if there is one. Raises what model code raises."""
    inputs = _tokens(model)
    with torch.no_grad(), _following(model, record), Watch(record):
        output = model(**inputs)
        record.n_passes = 1
        if model.config.is_encoder_decoder:
            return
        held = output if isinstance(output, dict) else {}
        name = next((name for name in ("cache", "past_key_values", "cache_params") if held.get(name) is not None), None)
        if name is not None:
            model(input_ids=inputs["input_ids"][:, -1:], **{name: held[name]})


def _tokens(model: Any) -> dict[str, torch.Tensor]:
    """Return tokens without those that stand for an image or the like."""
    config = model.config.to_dict()
    embedding = getattr(model.get_input_embeddings(), "weight", None)  # of MusicGen, a list of several
    n = embedding.shape[0] if embedding is not None else model.config.get_text_config().vocab_size
    special = set(_token_ids(config))
    ids = [i for i in range(min(n, N_TOKENS + 64 + len(special))) if i not in special][-N_TOKENS:]
    tokens = torch.tensor([ids])
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def _token_ids(entries: dict[str, Any]) -> Iterator[int]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif isinstance(value, int) and key.endswith(("_token_id", "_token_index")):
            yield value


def try_model(directory: str, output_format: Format, trusts_code: bool) -> dict[str, Any]:
    """Run the int8 model and, if there are findings, the model with its own Linear layers for comparison."""
    model, record = _build(directory, trusts_code), Record()
    block = model.config.to_dict()["quantization_config"]
    is_int8 = module_of(output_format).int8_modules(model, block)
    replaced = [name for name, module in model.named_modules() if is_int8(name, module)]
    mark_quantized(model)  # as the loader does; Jamba then calls a layer whose weight it would read
    for name in replaced:
        model.set_submodule(name, HollowInt8Linear(name, model.get_submodule(name), record))
    error = _attempt(model, record)
    found = list(record.mistakes.items())
    not_run = None
    if error is not None or (record.int8_made and not found):
        plain = Record()
        plain_error = _attempt(_build(directory, trusts_code), plain)
        if not found:
            found = [
                (place, f"int8 made by {name}")
                for place, name in record.int8_made
                if (place, name) not in plain.int8_made
            ]
        if plain_error is not None:
            not_run = plain_error if not record.n_passes else None  # a cache alone may reject constants
        elif error is not None and not found:
            found = [(record.place, error)]
    return {"n_replaced": len(replaced), "n_called": len(record.called), "found": found, "not_run": not_run}


def _build(directory: str, trusts_code: bool) -> Any:
    with library_errors("its model cannot be built", "fetch config.json again"):
        model, dtype, _ = build_model(directory, [], trusts_code)
    torch.set_default_dtype(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others put all experts' weights together, which takes memory
    return model


def _attempt(model: Any, record: Record) -> str | None:
    """Run a model; return its error in one line, or None."""
    _fill(model)
    try:
        run_tokens(model, record)
    except Exception as error:  # a model's code may raise anything
        return quoted(" ".join(f"{type(error).__name__}: {error}".split()), 200)
    return None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return try_model(request["directory"], Format(request["format"]), request["trusts_code"])
    except (SourceError, ModelMapError) as error:
        return {"n_replaced": 0, "n_called": 0, "found": [], "not_run": error.message}
