"""Names of the files of a checkpoint directory: weights, config, auxiliary files, and our own.

The directory looks as transformers writes it: `model.safetensors`, or `model-00001-of-0000N.safetensors` with
`model.safetensors.index.json`; `config.json` beside them. Our own files are in the folder `int8convert/`, which no
loader reads.

A checkpoint is a stranger's: its files are found by `find_file`, which follows no link out of it, and its names are
printed by `quoted`, which lets no control character through.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from int8convert.errors import CorruptFileError, SourceError
from int8convert.text import quoted

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
OWN_FOLDER = "int8convert"
OUTLIERS_FILE = f"{OWN_FOLDER}/outliers.safetensors"
"""File of the stored outlier columns, which `int8convert.runtime.stored_columns` reads."""

SMOOTHING_FILE = f"{OWN_FOLDER}/smoothing.safetensors"
"""File of the factors that are folded into the weights, see `int8convert.planning.smoothing`."""

MANIFEST_NAME = f"{OWN_FOLDER}/manifest.json"
VERIFY_FILE = f"{OWN_FOLDER}/verify.json"
"""File of the results of `int8convert verify`."""

REQUEST_FILE = f"{OWN_FOLDER}/conversion.json"
LOCAL_FILE = f"{OWN_FOLDER}/local.json"
LOCK_FILE = f"{OWN_FOLDER}/lock"

CALIBRATED_STEPS_AWAY = 0.99
"""Steps of a row by which a code that calibrated rounding chose may differ from its weight. It is under one, so that
the largest weight of a row keeps the code 127."""

MAX_STEPS_AWAY = 1.1
"""Steps of a row by which a stored outlier column may differ from its codes. Rounding is half a step, calibrated
rounding under one; bitsandbytes' rounding of float32 weights to float16 adds up to a sixteenth."""

TEMPLATES_FOLDER = "additional_chat_templates"
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".npz"),
    *(".index.json", ".incomplete", ".tflite", ".mlmodel", ".pkl", ".onnx_data", ".nemo", ".tar", ".gz", ".zip"),
)

MAX_AUXILIARY_BYTES = 200_000_000
"""Largest size of an auxiliary file. Tokenizers take up to 35 MB; larger files are weights in some form."""
MAX_POINTER_BYTES = 1024
"""Size of the largest Git LFS pointer, by its specification."""

_POINTER_START = b"version https://git-lfs"
POINTER_START_BYTES = len(_POINTER_START)
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def shard_name(i: int, n: int) -> str:
    """Return the file name of output shard i of n, counted from 0."""
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def find_file(directory: Path, name: str) -> Path | None:
    """Return the path of a checkpoint's file; None if there is no such file.

    A link must stay inside the directory, or lead to a blob of the Hugging Face cache the directory is a snapshot of:
    of its repository, or of those that all repositories share. Anywhere else it could point to a private file of this
    machine, which would then be read into error messages or copied into an output that gets published.

    Raises:
        SourceError: there is something of that name, but no regular file of this checkpoint.
        CorruptFileError: it is a Git LFS pointer.
    """
    path = directory / name
    try:
        path.lstat()
    except ValueError:
        return None  # the name holds a null byte, or what no file system can encode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise
    check_inside(path, directory, name)
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"{quoted(name)} is a link that leads nowhere: {error.strerror}",
            "fetch the file again, or remove the link",
        ) from None
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        # Looked at before it is opened: opening a named pipe waits for whoever may one day write into it.
        kind = "directory" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise SourceError(f"{quoted(name)} is a {kind}, expected a file", "fetch the file again, or remove it")
    if status.st_size <= MAX_POINTER_BYTES:
        refuse_pointer(path.read_bytes(), name)
    return path


def check_files(directory: Path) -> None:
    """Check the files of a checkpoint before a library opens them: it would follow any link and wait for a pipe."""
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith(".") or entry.is_dir() or (entry.name == CARD_NAME and not entry.is_symlink()):
            continue  # no library opens the card
        if is_weight_file(entry.name) and entry.is_symlink() and entry.is_file():
            continue  # weights on another disk; whatever they are, they are read as tensors only
        find_file(directory, entry.name)


def open_regular(path: Path) -> int:
    """Open a file of a stranger's directory for reading; return its descriptor.

    A named pipe, a socket or a device is not opened: a pipe waits for a writer, and opening a device can act on it.

    Raises:
        CorruptFileError: the path leads to no regular file.
        OSError: the file cannot be read.
    """
    if stat.S_ISREG(path.stat().st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # in case it has been replaced since
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise CorruptFileError(
        f"{quoted(path.name)} is a directory, pipe, socket or device, expected a file",
        "fetch the file again, or remove it",
    )


def refuse_pointer(content: bytes, name: str) -> None:
    """Refuse a file that Git LFS has not fetched: it holds a note of where the content is, which would be copied.

    Args:
        content: the file's first `POINTER_START_BYTES`, or more.
        name: the file's path in the checkpoint.

    Raises:
        CorruptFileError: it is such a note.
    """
    if content.startswith(_POINTER_START):
        raise CorruptFileError(
            f"{quoted(name)} is a Git LFS pointer, a note of where the file's content is, not the content",
            "run `git lfs pull` in the checkpoint, or fetch the file again",
        )


def check_inside(path: Path, directory: Path, name: str) -> None:
    """Refuse a link that leads out of a checkpoint's directory; see `find_file`."""
    target = Path(os.path.realpath(path))
    root = Path(os.path.realpath(directory))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots) and not _is_shared_blob(target, root):
        raise SourceError(
            f"{quoted(name)} is a link to {quoted(str(target))}, outside the checkpoint",
            "copy that file itself into the checkpoint's directory, or remove the link",
        )


def _is_shared_blob(target: Path, snapshot: Path) -> bool:
    """Return whether a file is a blob that the cache shares between its repositories, as with xet."""
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    shared = repository.parent / "blobs"
    name = target.relative_to(shared).as_posix() if target.is_relative_to(shared) else ""
    return _SHARED_BLOB.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Return whether a file holds weights in some framework's format, or belongs to such files."""
    return name.lower().endswith(_WEIGHT_SUFFIXES)


def is_loaded_as_weights(name: str) -> bool:
    """Return whether a loader, given a checkpoint with such a file, might load weights from it, or because of it."""
    if "/" in name:
        return False
    return name == ADAPTER_CONFIG or name.endswith((".safetensors", ".safetensors.index.json")) or _is_pickle(name)


def _is_pickle(name: str) -> bool:
    return name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))


def auxiliary_paths(directory: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Return the paths of auxiliary files, sorted.

    What is no file of the checkpoint - a link out of it, a pipe - is refused and not passed over in silence: an output
    without its tokenizer is broken, and one with a copy of this machine's `/etc/passwd` under that name is worse.

    Raises:
        SourceError: one is no regular file of this checkpoint, or its name does not print.
    """
    found = (find_file(directory, name) for name in names)
    paths = tuple(sorted(path for path in found if path is not None))
    for path in paths:
        if not path.name.isprintable():  # whoever lists the output would have it act on the terminal
            raise SourceError(
                f"the name of the file {quoted(path.name)} holds characters that cannot be printed",
                "rename the file, or remove it",
            )
    return paths
