"""The columns in 16 bits that lie beside the int8 weights, and how they were chosen, as far as the file tells."""

from __future__ import annotations

from dataclasses import dataclass

from int8convert.checkpoint.json_file import parse_json_object
from int8convert.checkpoint.names import OUTLIERS_FILE, find_file
from int8convert.checkpoint.safetensors_file import read_safetensors_header, read_safetensors_metadata
from int8convert.errors import CorruptFileError
from int8convert.publish.card_text import code
from int8convert.publish.finished import FinishedOutput


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """Stored outlier columns.

    Attributes:
        n_columns: of all weights together.
        n_weights: that have any.
        chosen: how they were, as a phrase.
    """

    n_columns: int
    n_weights: int
    chosen: str


def read_stored_columns(output: FinishedOutput) -> StoredColumns | None:
    """What is stored; None if nothing is."""
    path = find_file(output.path, OUTLIERS_FILE)
    if path is None:
        return None
    columns = [tensor for tensor in read_safetensors_header(path) if tensor.name.endswith(".outlier_columns")]
    encoded = read_safetensors_metadata(path).get("calibration", "")
    return StoredColumns(sum(tensor.n_elements for tensor in columns), len(columns), _chosen(encoded))


def _chosen(encoded: str) -> str:
    try:
        found = parse_json_object(encoded.encode(), "calibration", "")
    except CorruptFileError:
        found = {}
    match found:
        case {"text": str(text), "text_sha256": str(sha256), "n_sequences": int(n), "length": int(length)}:
            how = f"{n:,} windows of {length:,} tokens of {code(text)} (sha256 {code(sha256[:16])})"
            return f"chosen by running {how} through the model"
        case _:
            return "chosen in a way that the file does not tell"
