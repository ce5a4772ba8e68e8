"""Runs one decoder layer at a time, or the output head, inside the model's own forward.

Layers before the current one return their input, the last of them the stored hidden state. After the current layer the
forward is aborted. So each layer is loaded once, and masks, positions and other arguments are what the model makes of
them. These are computed again for each layer, which costs little.

Does not support layers that pass on more than one hidden state by another way than the forward: refuses them if seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any, NoReturn

import torch

from int8convert.errors import LayerwiseError, SourceError
from int8convert.runtime.layered.decoder_layers import hidden_state
from int8convert.runtime.layered.layered_model import LayeredModel
from int8convert.runtime.pretrained import model_errors

LOGITS_AT_A_TIME = 1 << 24
"""Elements of the logits that are computed at a time: 64 MiB in float32."""


_HINT = "run it where the whole model fits into memory, and without --stream"


class _LayerDone(BaseException):
    """Aborts `forward` after the requested layer. A BaseException, so that model code cannot catch it."""


class LayerRunner:
    """Runs one decoder layer at a time, or the output head, inside the model's own forward."""

    def __init__(self, layered: LayeredModel) -> None:
        self._model = layered.model
        self._layers = list(layered.layers.values())
        self._forwards = [layer.forward for layer in self._layers]
        self._current = 0
        self._state: torch.Tensor | None = None
        self._output: Any = None
        self._n_outputs: int | None = None
        self._called: list[int] = []
        self._is_checked = False
        self._others: tuple[Any, ...] = ()
        self.n_forwards = 0
        for i, layer in enumerate(self._layers):
            layer.forward = partial(self._forward, i)

    def run(self, layer: int, ids: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Return the hidden state of a window, or of several of one length, after a layer.

        Args:
            layer: index from 0.
            ids: int64 [length] or [windows, length].
            state: the hidden state after the layer before; None for the first layer.
        """
        self._current, self._state = layer, state
        try:
            self._call(ids)
        except _LayerDone:
            others = self._output[1:] if isinstance(self._output, tuple) else ()
            output, self._output, self._state = hidden_state(self._output), None, None
            if not isinstance(output, torch.Tensor):
                self._refuse(f"has no hidden state after its layer {layer}")
            if not self._is_checked:
                self._check_order(ids, others)
            return output
        self._refuse(f"does not run its layer {layer}")

    def _check_order(self, ids: torch.Tensor, others: tuple[Any, ...]) -> None:
        """Refuse a model that runs its layers twice or in another order, or whose layers see other outputs of a layer.

        The layers do nothing here.

        Args:
            others: what the first layer returned beside the hidden state.
        """
        self._is_checked = True
        base = self._model.base_model
        if base is self._model:
            return
        self._current, self._called = len(self._layers), []
        # Layers that get no indices from an earlier one choose their own, or raise an error.
        self._others = tuple(other if _is_float(other) else None for other in others)
        self._call(ids, base)
        self._others = ()
        if self._called != list(range(len(self._layers))):
            self._refuse("does not run each of its layers once, one after the other")

    def logits(self, ids: torch.Tensor, state: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield logits [positions, vocabulary] of a window, some positions at a time, from its last hidden state."""
        self._current, self._state = len(self._layers), state
        if "logits_to_keep" not in inspect.signature(self._model.forward).parameters:
            yield self._call(ids).logits[0]
            return
        step = max(1, LOGITS_AT_A_TIME // self._model.config.get_text_config().vocab_size)
        for positions in torch.arange(len(ids)).split(step):
            yield self._call(ids, logits_to_keep=positions.to(self._model.device)).logits[0]

    def run_rest(self, ids: torch.Tensor, state: torch.Tensor) -> None:
        """Run windows [windows, length] through all that comes after the last layer."""
        self._current, self._state = len(self._layers), state
        self._call(ids)

    def _refuse(self, what: str) -> NoReturn:
        raise LayerwiseError(
            f"{type(self._model).__name__} {what}: it cannot be run layer by layer",
            _HINT,
        )

    def _call(self, ids: torch.Tensor, model: Any = None, **options: Any) -> Any:
        ids = (ids if ids.dim() == 2 else ids[None]).to(self._model.device)
        try:
            with model_errors(self._model):
                return (model or self._model)(ids, use_cache=False, **options)
        except SourceError as error:
            # As whole models, some run that read a layer's weight, or its output, outside of the layer.
            raise error if isinstance(error, LayerwiseError) else LayerwiseError(error.message, _HINT) from error

    def _forward(self, i: int, *inputs: Any, **named: Any) -> Any:
        """Replace the forward of layer i."""
        received = next(iter((*inputs, *named.values())))
        if i == self._current:
            if self._state is not None and not torch.equal(received.cpu(), self._state.cpu()):
                self._refuse(f"changes the hidden state before its layer {i}")
            shared = [value for value in (*inputs, *named.values()) if isinstance(value, MutableMapping | list)]
            sizes = [len(value) for value in shared]
            self._output = self._forwards[i](*inputs, **named)
            if sizes != [len(value) for value in shared]:
                self._refuse(f"hands on more than a hidden state from its layer {i} to others")
            self._n_outputs = len(self._output) if isinstance(self._output, tuple) else None
            self.n_forwards += 1
            raise _LayerDone
        given = [value for value in (*inputs, *named.values()) if _is_float(value)]
        if any(value is other for value in given for other in self._others):
            self._refuse(f"hands on more than a hidden state to its layer {i}")
        self._called.append(i)
        state = self._state.to(received.device) if i == self._current - 1 and self._state is not None else received
        if self._n_outputs is None:
            return state
        return (state, *(self._others or (None,) * (self._n_outputs - 1)))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
