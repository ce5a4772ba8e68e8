"""What the manifest keeps of a converted tensor, from its event and back."""

from __future__ import annotations

import math
from collections.abc import Iterator

from int8convert.checkpoint.manifest import ShardRecord, TensorRecord
from int8convert.conversion.events import TensorKept, TensorQuantized
from int8convert.planning.plan import PlannedShard

_DECIMALS = 3
"""Of decibels: the last digits of a float32 sum depend on the width of a processor's vectors."""


def tensor_record(event: TensorQuantized | TensorKept) -> tuple[str, TensorRecord]:
    """The output name of the tensor and its record."""
    tensor = event.tensor
    zeros = event.n_zero_rows
    if isinstance(event, TensorKept):
        source, dtype = tensor.source.name, tensor.output_dtype
        return tensor.output_name, TensorRecord(
            source, dtype, tensor.reason, n_non_finite=event.n_non_finite, n_zero_rows=zeros
        )
    sqnr_db = round(event.sqnr_db, _DECIMALS) if math.isfinite(event.sqnr_db) else None
    return tensor.output_name, TensorRecord(
        tensor.source.name, "I8", None, sqnr_db, event.absmax_min, event.absmax_max, n_zero_rows=zeros
    )


def replay_events(shard: PlannedShard, record: ShardRecord) -> Iterator[TensorQuantized | TensorKept]:
    """The events of a shard that was finished earlier."""
    for tensor in shard.tensors:
        found = record.tensors.get(tensor.output_name)
        if not tensor.is_quantized or found is None:
            yield TensorKept(tensor, found.n_non_finite if found else 0, found.n_zero_rows if found else 0)
        else:
            sqnr_db = math.inf if found.sqnr_db is None else found.sqnr_db
            absmax_range = found.absmax_min or 0.0, found.absmax_max or 0.0
            yield TensorQuantized(tensor, sqnr_db, *absmax_range, found.n_zero_rows)
