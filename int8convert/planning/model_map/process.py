"""Makes the model map of a checkpoint in a child process, in which transformers builds the model (`worker`).

The child may start slowly, grow large, or crash on an untrusted config, while this process stays small. Its answers are
cached (`cache`). For families that transformers knows, answers ship with the package (`seed`).
"""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.source_weights import as_loaded
from int8convert.errors import ModelMapError
from int8convert.planning.expert_layouts import ExpertLayout
from int8convert.planning.model_map.cache import ModelMapCache
from int8convert.planning.model_map.model_map import Action, MappedTensor, ModelMap, ModelNeeds, ModuleFilter
from int8convert.planning.model_map.seed import seed_answer
from int8convert.planning.weights_dtype import dtype_of_weights
from int8convert.runtime.worker_process import Worker, WorkerError
from int8convert.text import quoted


class ModelMapProcess:
    """The child process that maps one checkpoint. It is not started where the map is cached or seeded.

    Construction returns at once; `result` waits. The child uses no network, and runs code of the checkpoint only where
    the user trusts it and transformers has no class of that name.
    """

    def __init__(self, source: CheckpointSource, modules: ModuleFilter) -> None:
        self._source = source
        self._modules = modules
        self._request = worker_request(source, modules)
        self._cache = ModelMapCache(source.config, self._request)
        # Neither covers code of the checkpoint.
        known = None if modules.trusts_code else self._cache.read() or seed_answer(source.config, self._request)
        self._known = known
        self._worker = None if self._known else Worker("int8convert.planning.model_map.worker")

    @property
    def starts_child(self) -> bool:
        return self._worker is not None

    def result(self) -> ModelMap:
        """Return the map, or the name rules' where transformers cannot make one.

        Raises:
            RemoteCodeError: the model's class is code in the checkpoint, and the user does not trust it.
            ModelMapError: the child could not start or died, or what would be written could not be loaded.
            PatternError: a pattern of the user's matches nothing.
        """
        if self._worker is None:
            assert self._known is not None
            return parse_worker_answer(self._known, self._modules)
        try:
            answer = self._worker.result(self._request)
        except WorkerError as error:
            if error.exception in ("", "ImportError", "ModuleNotFoundError", "MemoryError"):
                raise ModelMapError(
                    f"the process that asks transformers for the model ended with status {error.status}"
                    + (f": {error.exception}: {error.message}" if error.exception else ""),
                    "check that `python -c 'import torch, transformers'` works and memory is free",
                ) from error
            return _map_by_name_rules(self._source, self._modules, error.message)
        model_map = parse_worker_answer(answer, self._modules)
        if not self._modules.trusts_code:
            self._cache.write(answer)
        return model_map

    def stop(self) -> None:
        """End the child if it still runs."""
        if self._worker is not None:
            self._worker.stop()


def tensor_places(source: CheckpointSource) -> dict[str, list[Any]]:
    """Return tensor name -> place of its elements, for tensors that may share them. Equal for two with the same bytes.

    The file is part of it, because each file counts its storages from its own start. So are the strides: a transposed
    view has the same storage, and if square the same shape.
    """
    return {
        t.name: [shard.path.name, t.storage, t.offset, t.strides and list(t.strides), t.dtype]
        for shard in source.shards
        for t in shard.tensors
        if t.storage is not None
    }


def worker_request(source: CheckpointSource, modules: ModuleFilter) -> dict[str, Any]:
    """Return the request for the child, as a JSON object."""
    places = tensor_places(source)
    return {
        "directory": str(source.directory),
        "dtype": dtype_of_weights(source),
        "tensors": [[t.name, t.dtype, list(t.shape), places.get(t.name)] for t in as_loaded(source)],
        "skip": modules.skip,
        "only": modules.only,
        "output_format": modules.output_format,
        "trusts_code": modules.trusts_code,
    }


def parse_worker_answer(answer: dict[str, Any], modules: ModuleFilter) -> ModelMap:
    """Return the map in a child's answer.

    Raises:
        PatternError: a pattern matches none of the modules the child found.
    """
    modules.check_used(answer["candidates"])
    return ModelMap(
        model_class=answer["model_class"],
        dtype=answer["dtype"],
        tensors={name: _mapped_tensor(*fields) for name, fields in answer["tensors"].items()},
        skip_modules=tuple(answer["skip_modules"]),
        output_format=modules.output_format,
        parameters={name: (key, is_transposed) for name, (key, is_transposed) in answer["parameters"].items()},
        notes=tuple(answer["notes"]),
        needs=_needs(answer["needs"]),
    )


def _needs(answer: dict[str, Any]) -> ModelNeeds:
    """Return the needs in a child's answer: JSON has lists for tuples."""
    mismatched = answer["mismatched"].items()
    return ModelNeeds(
        n_parameters=answer["n_parameters"],
        missing={name: tuple(shape) for name, shape in answer["missing"].items()},
        defaulted=tuple(answer["defaulted"]),
        counters=tuple(answer["counters"]),
        unexpected=tuple(answer["unexpected"]),
        mismatched={name: (found and tuple(found), tuple(has)) for name, (found, has) in mismatched},
        integers=answer["integers"],
    )


def _mapped_tensor(
    action: str, reason: str, output_name: str, output_dtype: str, experts: dict[str, Any] | None
) -> MappedTensor:
    layout = ExpertLayout(**{**experts, "projections": tuple(experts["projections"])}) if experts else None
    return MappedTensor(Action(action), reason, output_name, output_dtype, layout)


def _why(architecture: str, model_type: Any, complaint: str) -> str:
    """Return why there is no class; transformers' own text on an unknown type names remedies that do not apply."""
    if "does not recognize this architecture" in complaint and isinstance(model_type, str):
        return f"transformers does not know the model type {quoted(model_type, 60)}"
    return f"transformers cannot build {architecture} ({shorten(complaint, 200, placeholder=' ...')})"


def _map_by_name_rules(source: CheckpointSource, modules: ModuleFilter, why: str) -> ModelMap:
    from int8convert.planning.name_rules import map_by_name

    architecture = source.config["architectures"][0]
    dtype = source.config.get("dtype") or source.config.get("torch_dtype") or dtype_of_weights(source)
    return map_by_name(as_loaded(source), modules, dtype, _why(architecture, source.config.get("model_type"), why))
