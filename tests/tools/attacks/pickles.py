"""Attacks by the pickle of a `.bin` file: code, and tensors that lie."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from int8convert.errors import CorruptFileError
from tests.tools.attacks.assembler import (
    COMMAND,
    call,
    global_,
    legacy_file,
    legacy_storage,
    pickled,
    push,
    storage,
    tensor,
    torch_file,
    torch_records,
    zip_archive,
)
from tests.tools.attacks.registry import attack, write_sparse

REFUSED = "cannot be read as a weights-only pickle"


def write_bin(folder: Path, content: bytes) -> None:
    (folder / "checkpoint" / "model.safetensors").unlink()
    (folder / "checkpoint" / "pytorch_model.bin").write_bytes(content)


def define(
    name: str, value: Any, error: type[CorruptFileError] | None = CorruptFileError, match: str = REFUSED
) -> None:
    """An attack whose file is a modern one that holds this value."""
    _define_file(name, lambda: torch_file(value), error, match)


def _define_file(
    name: str, content: Any, error: type[CorruptFileError] | None, match: str, is_heavy: bool = False
) -> None:
    def make(folder: Path) -> None:
        write_bin(folder, content())

    make.__name__ = name
    attack(error, match if error else "", is_heavy)(make)


def define_heavy(name: str, value: Any) -> None:
    """An attack that asks for memory or time out of proportion to its file."""
    _define_file(name, lambda: torch_file(value() if callable(value) else value), CorruptFileError, REFUSED, True)


def define_legacy(name: str, content: Any, is_heavy: bool = False) -> None:
    """An attack by a file of the old format."""
    _define_file(name, content, CorruptFileError, REFUSED, is_heavy)


def weights(**changes: Any) -> dict[str, bytes]:
    return {"a.weight": tensor(**changes)}


# Code, by every opcode that can call something.
RUNS = {
    "reduce": call("os", "system", COMMAND),
    "reduce_posix": call("posix", "system", COMMAND),
    "reduce_eval": call("builtins", "eval", f"__import__('os').system({COMMAND!r})"),
    "reduce_python2_builtin": call("__builtin__", "eval", f"__import__('os').system({COMMAND!r})"),
    "reduce_getattr": call("builtins", "getattr", global_("os", "path"), "os"),
    "reduce_subprocess": call("subprocess", "Popen", ["touch", COMMAND.split()[1]]),
    "reduce_torch_load": call("torch.serialization", "load", "x", False),
    "reduce_torch_hub": call("torch.hub", "load", ".", "x"),
    "reduce_dotted_global": call("torch", "os.system", COMMAND),
    "inst": b"(" + push(COMMAND) + b"ios\nsystem\n",
    "obj": b"(" + global_("os", "system") + push(COMMAND) + b"o",
    "newobj": global_("subprocess", "Popen") + push((["touch", COMMAND.split()[1]],)) + b"\x81",
    "newobj_ex": global_("subprocess", "Popen") + push((["touch", COMMAND.split()[1]],)) + b"}\x92",
    "stack_global": b"\x8c\x02os\x8c\x06system\x93" + push((COMMAND,)) + b"R",
    "ext1": b"\x82\x01" + push((COMMAND,)) + b"R",
    "ext4": b"\x84\xff\xff\xff\x7f" + push((COMMAND,)) + b"R",
    "build": call("collections", "OrderedDict") + push({"__class__": global_("os", "system")}) + b"b",
    "build_setstate": global_("torch", "Tensor") + push({"__setstate__": global_("os", "system")}) + b"b",
    "rebuild_from_type": call(
        "torch._tensor",
        "_rebuild_from_type_v2",
        global_("os", "system"),
        global_("torch", "Tensor"),
        (COMMAND,),
        None,
    ),
    "wrapper_subclass": call("torch._utils", "_rebuild_wrapper_subclass", global_("os", "system"), 0, (1,), (1,), 0),
    "numpy_reconstruct": call("numpy.core.multiarray", "_reconstruct", global_("numpy", "ndarray"), (0,), "b"),
    "class_of_a_model": call("transformers.models.llama.modeling_llama", "LlamaForCausalLM"),
    "persistent_id_of_a_module": push(("module", global_("os", "system"), "x", "y")) + b"Q",
    "as_key": push((call("os", "system", COMMAND),)),
}
for _name, _opcodes in RUNS.items():
    define(f"pickle_runs_code_by_{_name}", {"a.weight": tensor(), "b": _opcodes})
    if _name in ("reduce", "reduce_eval", "inst", "stack_global", "build", "persistent_id_of_a_module"):
        define_legacy(f"legacy_runs_code_by_{_name}", lambda opcodes=_opcodes: legacy_file({"b": opcodes}))
define("pickle_runs_code_instead_of_a_dictionary", call("os", "system", COMMAND))
define("pickle_runs_code_and_drops_the_result", call("os", "system", COMMAND) + b"0" + push(weights()))

# What is no flat dictionary of dense tensors.
define("pickle_of_a_list", [tensor()])
define("pickle_of_a_number", 7)
define("pickle_of_a_nested_dictionary", {"model": weights()})
define("pickle_of_a_number_beside_tensors", {**weights(), "epoch": 3})
define("pickle_with_a_number_as_key", push({7: tensor()}))
define("pickle_with_a_tuple_as_key", push({("a", "b"): tensor()}))
define("pickle_with_a_list_as_key", b"}(]" + tensor() + b"u")
define("pickle_with_a_key_twice", b"}(" + (push("a") + tensor()) + push("a") + tensor(shape=(2, 2)) + b"u", match="")
define(
    "pickle_of_a_sparse_tensor", {"a": call("torch._utils", "_rebuild_sparse_tensor", 0, (tensor(), tensor(), (1,)))}
)
define(
    "pickle_of_a_quantized_tensor", {"a": call("torch._utils", "_rebuild_qtensor", storage(), 0, (4,), (1,), (0, 1))}
)
define("pickle_of_a_tensor_without_data", {"a": call("torch._utils", "_rebuild_meta_tensor_no_storage", 0, (1,), (1,))})
define("pickle_of_a_subclass_of_str", {"a": call("numpy", "str_", "a")})
define("pickle_of_a_storage", {"a": storage()})

# Names that no model has: as for safetensors.
for _name, _key in {
    "null_byte": "a\x00b",
    "newline": "a\nerror: done",
    "escape": "\x1b[2J",
    "half_a_character": "a\ud800",
    "path": "../../owned",
    "nothing": "",
    "million_characters": "a" * 1_000_000,
    "the_key_of_the_metadata": "__metadata__",
}.items():
    define(f"pickle_name_with_{_name}", {_key: tensor()}, match="")

# Tensors that lie about where they are.
for _name, _changes in {
    "beyond_its_storage": {"shape": (5, 4)},
    "behind_its_storage": {"offset": 16},
    "at_a_negative_offset": {"offset": -1},
    "at_a_gigantic_offset": {"offset": 2**62},
    "at_an_offset_of_128_bits": {"offset": 2**127},
    "at_an_offset_that_is_a_fraction": {"offset": 0.0},
    "at_an_offset_that_is_text": {"offset": "0"},
    "of_negative_strides": {"strides": (-4, 1), "offset": 12},
    "of_gigantic_strides": {"strides": (2**62, 2**62)},
    "of_strides_that_wrap": {"shape": (3, 1), "strides": (2**63, 1)},
    "of_fewer_strides_than_dimensions": {"strides": (1,)},
    "of_negative_dimensions": {"shape": (-4, -4)},
    "of_gigantic_dimensions": {"shape": (2**62,), "strides": (1,)},
    "of_gigantic_dimensions_in_one_place": {"shape": (2**40,), "strides": (0,)},
    "of_dimensions_whose_product_wraps": {"shape": (2**32, 2**32), "strides": (0, 0)},
    "of_a_hundred_thousand_dimensions": {"shape": (1,) * 100_000, "strides": (1,) * 100_000},
    "of_dimensions_that_are_text": {"shape": ("4",), "strides": (1,)},
    "of_dimensions_that_are_a_number": {"shape": 4, "strides": 1},
    "of_no_storage": {"of": push(None)},
    "of_a_storage_that_is_a_number": {"of": push(7) + b"Q"},
    "of_a_storage_that_is_not_there": {"of": storage("99")},
    "of_a_storage_that_is_another_record": {"of": storage("../data.pkl")},
    "of_a_storage_whose_key_is_a_number": {"of": storage(0)},
    "of_a_storage_of_negative_size": {"of": storage(n_elements=-16)},
    "of_a_storage_larger_than_its_record": {"of": storage(n_elements=17)},
    "of_a_storage_of_exabytes": {"of": storage(n_elements=2**62)},
    "of_a_storage_of_a_fraction": {"of": storage(n_elements=16.0)},
    "of_a_storage_of_an_unknown_kind": {"of": storage(kind="OctupleStorage")},
}.items():
    define(f"pickle_tensor_{_name}", weights(**_changes), match="")  # type: ignore[arg-type]

define(
    "pickle_tensor_that_repeats_one_element", weights(shape=(4096, 4096), strides=(0, 0)), match="repeats its elements"
)
define(
    "pickle_storage_read_as_two_dtypes",
    {"a": tensor(), "b": tensor(shape=(4,), strides=(1,), of=storage(n_elements=8, kind="FloatStorage"))},
    match="in two ways",
)
define("pickle_with_a_value_left_over", push(7) + push(weights()), match="more or less than one value")
define("pickle_that_pops_what_is_not_there", b"t", match=REFUSED)

# More than the file could pay for.
define_heavy("pickle_that_allocates_a_bytearray", {"a": call("builtins", "bytearray", 2**36)})
define_heavy("pickle_that_allocates_a_tensor", {"a": call("torch", "Tensor", 2**34)})
define_heavy("pickle_that_allocates_a_storage", {"a": call("torch.storage", "UntypedStorage", 2**36)})
define_heavy("pickle_that_counts_a_gigantic_number", {"a": call("builtins", "complex", "9" * 1_000_000)})
define_heavy("pickle_nested_a_million_deep", lambda: b"N" + b"\x85" * 1_000_000)
define_heavy("pickle_of_lists_a_million_deep", lambda: b"]" * 1_000_000 + b"a" * 999_999)
define_heavy(
    # Each tuple holds the one before twice: 2**60 leaves to whoever looks inside, hashes or prints it.
    "pickle_of_tuples_that_double",
    lambda: b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"\x85",
)
define_heavy(
    "pickle_whose_key_takes_forever_to_hash",
    lambda: b"}N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + tensor() + b"s",
)
define_heavy("pickle_of_a_million_open_marks", lambda: b"(" * 1_000_000 + push(weights()))
define_heavy("pickle_of_millions_of_entries", lambda: b"}(" + b"NN" * 15_000_000 + b"u")
define_heavy(
    "pickle_of_millions_of_memo_entries",
    lambda: b"N" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(6_000_000)),
)
define_heavy("pickle_of_millions_of_strings", lambda: b"(" + b"U\x02ab" * 7_500_000)
define_heavy("pickle_with_a_string_of_gigabytes", lambda: b"X\xff\xff\xff\xff" + b"x" * 100)
define_heavy("pickle_with_a_memo_entry_of_billions", lambda: b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff")
define_heavy("pickle_that_doubles_a_tuple_by_its_size", lambda: b"N" + b"2" * 100_000 + push(weights()))
define_heavy(
    # A tuple of two million arguments, made once and called with 20,000 times: each call may copy it.
    "pickle_that_calls_with_millions_of_arguments",
    lambda: (
        global_("torch._utils", "_rebuild_tensor_v2")
        + b"q\x00("
        + (storage() + push(0) + push((4, 4)) + push((4, 1)) + push(False) + push({}) + b"}")
        + (b"N" * 2_000_000 + b"tq\x01](" + b"h\x00h\x01R" * 20_000 + b"e")
    ),
)
define_heavy("pickle_of_dictionaries_a_million_deep", lambda: b"}N" * 600_000 + b"}" + b"s" * 600_000)
define_heavy("pickle_of_an_endless_global", lambda: b"c" + b"x" * 3_000_000)

# The old format, which torch can only load whole.
define_legacy("legacy_storage_of_terabytes", lambda: _legacy(storage_of=2**42), is_heavy=True)
define_legacy("legacy_storage_of_gigabytes", lambda: _legacy(storage_of=2**33), is_heavy=True)
define_legacy("legacy_storage_of_negative_size", lambda: _legacy(storage_of=-5))
define_legacy("legacy_storage_whose_data_claims_less", lambda: _legacy(claimed=8))
define_legacy("legacy_storage_whose_data_claims_exabytes", lambda: _legacy(claimed=2**62), is_heavy=True)
define_legacy("legacy_many_storages_of_gigabytes", lambda: _many_legacy_storages(), is_heavy=True)
define_legacy("legacy_keys_that_are_not_there", lambda: _legacy(keys=["7"]))
define_legacy("legacy_keys_that_are_no_list", lambda: _legacy(keys=7))
define_legacy("legacy_without_keys", lambda: _legacy(keys=[]))
define_legacy("legacy_view_beyond_its_storage", lambda: _legacy(view=("v", 8, 2**40)))
define_legacy("legacy_truncated", lambda: _legacy()[:-8])
define_legacy("legacy_with_another_magic_number", lambda: pickled(7) + _legacy())
define_legacy("legacy_tar_archive", lambda: _tar())
define_legacy("legacy_no_pickle_at_all", lambda: b"not a pickle, not a zip")
define_legacy("legacy_empty", lambda: b"")
define_legacy("legacy_plain_pickle", lambda: pickled({"a": 1}))
define_legacy("legacy_nested_a_million_deep", lambda: legacy_file(b"N" + b"\x85" * 1_000_000), is_heavy=True)

# What people have.
define("pickle_as_torch_writes_it", weights(), error=None)
_NO_HOOKS = call("collections", "OrderedDict")
define("pickle_of_a_parameter", {"a": call("torch._utils", "_rebuild_parameter", tensor(), True, _NO_HOOKS)}, None)
define("pickle_of_an_ordered_dictionary", call("collections", "OrderedDict") + b"(" + push("a") + tensor() + b"u", None)
define("pickle_of_tensors_that_share_a_storage", {"a": tensor(), "b": tensor((2, 4), (4, 1), 8)}, error=None)
_define_file("legacy_as_torch_wrote_it", lambda: _legacy(), None, "")


def _legacy(storage_of: int = 16, claimed: int = 16, keys: Any = None, view: Any = None) -> bytes:
    place = legacy_storage(n_elements=storage_of, view=view)
    return legacy_file({"a": tensor(of=place)}, {"0": (claimed, bytes(32))}, keys)


def _many_legacy_storages() -> bytes:
    value = {f"t{i}": tensor(of=legacy_storage(str(i), 2**30)) for i in range(64)}
    return legacy_file(value, {str(i): (2**30, b"") for i in range(64)})


def _tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", f"../{COMMAND.split()[1]}"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return content.getvalue()


@attack(CorruptFileError, is_heavy=True)
def pickle_of_a_hundred_megabytes_of_nothing(folder: Path) -> None:
    write_bin(folder, zip_archive(torch_records(b"\x80\x02" + b"(" * 20_000_000 + b".")))


@attack(None, is_heavy=True)
def pickle_of_twenty_thousand_tensors(folder: Path) -> None:
    write_bin(folder, torch_file({f"layers.{i}.weight": tensor() for i in range(20_000)}))


def write_sparse_legacy(folder: Path, n_elements: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """One tensor in a storage of empty room."""
    value = {"a": tensor(shape, strides, of=legacy_storage(n_elements=n_elements))}
    content = legacy_file(value, {"0": (n_elements, b"")})
    write_bin(folder, b"")
    write_sparse(folder / "checkpoint" / "pytorch_model.bin", len(content) + 2 * n_elements, content)


@attack(CorruptFileError, "is no plain run of bytes and lies among 400,000,000,000", is_heavy=True)
def pickle_tensor_of_two_elements_far_apart(folder: Path) -> None:
    write_sparse_legacy(folder, 200_000_000_000, (2,), (199_999_999_999,))


@attack(CorruptFileError, "is no plain run of bytes and lies among 400,000,000,000", is_heavy=True)
def pickle_tensor_that_repeats_one_element_as_often_as_the_file_is_long(folder: Path) -> None:
    write_sparse_legacy(folder, 200_000_000_000, (200_000_000_000,), (0,))


@attack(None, is_heavy=True)
def pickle_tensor_of_gigabytes_transposed(folder: Path) -> None:
    write_sparse_legacy(folder, 4_000_000_000, (40_000, 100_000), (1, 40_000))
