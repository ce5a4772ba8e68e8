"""Every error int8convert raises on purpose.

    Int8ConvertError              exit 1: two lines, what and what to do
    ├── SourceError               the source cannot be used: missing, no weights, no usable config
    │   ├── CorruptFileError      a file contradicts what it, or the index, promises
    │   ├── MissingWeightsError   the model needs weights that are in no file
    │   ├── AlreadyQuantizedError nothing to do here: convert the 16-bit original instead
    │   └── NonFiniteWeightError  the weights hold NaN, infinity, or what fp16 cannot hold
    ├── AdapterError              the LoRA adapter cannot be merged: of another kind, or made for another model
    ├── ModelMapError             transformers cannot build the model the config describes
    │   └── RemoteCodeError       its class is code in the checkpoint, which runs only if the user says so
    ├── UnverifiedError           an output is to be published that nothing has shown to be good
    ├── OutputError               the place to write to cannot be used: taken, same as the source, not writable
    │   └── DiskFullError         it can, with more room
    ├── FormatError               the format asked for cannot hold this model
    ├── CoverageError             too little would become int8
    ├── HubError                  the Hub has not, or does not take, what was asked for: a name, a revision, a file
    │   ├── HubMissingError       there is no repository, or no revision, of that name
    │   ├── HubAccessError        it wants a token, one with more rights, or consent to a licence first
    │   └── HubConnectionError    it was not reached, or broke off again and again: the same command, later
    ├── PatternError              a --skip or --only pattern matches nothing
    ├── PromptError               a prompt cannot be put to the model: too long, empty, or no chat for it
    └── DeviceError               the device asked for is not usable here

A class exists because the caller would act differently. What a library raises while it reads or runs a stranger's
files becomes one of these in `int8convert.checkpoint.library_errors`. Anything else that escapes is a bug and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.text import printable


class Int8ConvertError(Exception):
    """The base of all.

    Args:
        message: what, where, expected against found. One line, no final stop.
        hint: the next step. One line.

    Both may quote a stranger: characters that do not print are escaped here, for every error.

    Attributes:
        state: what is on the disk, or on the Hub, now; "" where nothing could have been written. The command line
            prints it after the hint. See `stating`.
    """

    exit_code = 1
    state = ""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = printable(hint)

    @property
    def code(self) -> str:
        """The stable name used in `--json`: `CorruptFileError` -> `corrupt_file`."""
        words = type(self).__name__.removesuffix("Error")
        return "".join("_" + c.lower() if c.isupper() else c for c in words).lstrip("_")


@contextmanager
def stating(state: str) -> Iterator[None]:
    """Set the state of errors that pass, unless it is set already."""
    try:
        yield
    except Int8ConvertError as error:
        error.state = error.state or state
        raise


class SourceError(Int8ConvertError):
    """The source cannot be used."""


class CorruptFileError(SourceError):
    """A file contradicts what it, or the index, promises."""


class MissingWeightsError(SourceError):
    """The model needs weights that are in no file, and the user has not said that they may be missing."""


class AlreadyQuantizedError(SourceError):
    """The source is quantized already."""


class NonFiniteWeightError(SourceError):
    """The weights hold NaN, infinity, or what fp16 cannot hold.

    Attributes:
        module_name: the module they belong to, for those who would rather keep it 16-bit.
    """

    def __init__(self, message: str, hint: str, module_name: str) -> None:
        super().__init__(message, hint)
        self.module_name = module_name


class AdapterError(Int8ConvertError):
    """The LoRA adapter cannot be merged."""


class ModelMapError(Int8ConvertError):
    """transformers cannot build the model the config describes."""


class RemoteCodeError(ModelMapError):
    """The model's class is code in the checkpoint, and the user has not said that it may be run."""


class UnverifiedError(Int8ConvertError):
    """An output is to be published that nothing has shown to be good."""


class OutputError(Int8ConvertError):
    """The place to write to cannot be used."""


class DiskFullError(OutputError):
    """There is not enough room."""


class FormatError(Int8ConvertError):
    """The format asked for cannot hold this model."""


class CoverageError(Int8ConvertError):
    """Too little would become int8."""


class HubError(Int8ConvertError):
    """The Hub has not, or does not take, what was asked for."""


class HubMissingError(HubError):
    """The Hub has no repository, or no revision, of that name, or none for this token."""


class HubAccessError(HubError):
    """The Hub wants a token, one with more rights, or consent to a licence first."""


class HubConnectionError(HubError):
    """The Hub was not reached, or broke off again and again."""


class PatternError(Int8ConvertError):
    """A pattern matches no module."""


class PromptError(Int8ConvertError):
    """A prompt cannot be put to the model."""


class DeviceError(Int8ConvertError):
    """The device asked for is not usable here."""
