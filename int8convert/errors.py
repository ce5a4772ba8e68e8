"""The errors that int8convert raises on purpose.

    Int8ConvertError              exit 1; printed as two lines: what is wrong, and what to do
    ├── SourceError               the source is not usable: missing, no weights, no usable config
    │   ├── CorruptFileError      a file contradicts itself or the index
    │   ├── MissingWeightsError   no file holds weights that the model needs
    │   ├── AlreadyQuantizedError the source is quantized already
    │   ├── LayerwiseError        the model cannot be run layer by layer
    │   └── NonFiniteWeightError  weights hold NaN, infinity, or values beyond fp16
    ├── AdapterError              the LoRA adapter cannot be merged
    ├── ModelMapError             transformers cannot build the model that the config describes
    │   └── RemoteCodeError       the model's class is code in the checkpoint, which may not run
    ├── UnverifiedError           the output to publish has not passed `verify`
    ├── OutputError               the output cannot be written: occupied, same as the source, not writable
    │   └── DiskFullError         the disk has too little room
    ├── FormatError               the output format cannot hold this model
    ├── CoverageError             too little would become int8
    ├── HubError                  the Hub refuses a request, or lacks a name, a revision or a file
    │   ├── HubMissingError       the repository or the revision does not exist
    │   ├── HubAccessError        the Hub requires a token, more rights, or consent to a licence
    │   └── HubConnectionError    the Hub cannot be reached, or connections break repeatedly
    ├── PatternError              a --skip or --only pattern matches nothing
    ├── PromptError               the model cannot take a prompt: too long, empty, or no chat template
    └── DeviceError               the device is not usable here

Each class exists because a caller would act differently on it. `int8convert.checkpoint.library_errors` translates what
libraries raise while they read a stranger's files. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.text import printable


class Int8ConvertError(Exception):
    """Base of all errors.

    Args:
        message: what is wrong and where, expected against found. One line without a full stop.
        hint: the next step. One line.

    Both may quote a stranger's text, so characters that do not print are escaped here.

    Attributes:
        state: what is now on the disk or on the Hub; "" where nothing could have been written. The command line prints
            it after the hint. See `stating`.
    """

    exit_code = 1
    state = ""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = printable(hint)

    @property
    def code(self) -> str:
        """The stable name in `--json`: `corrupt_file` of `CorruptFileError`."""
        words = type(self).__name__.removesuffix("Error")
        return "".join("_" + c.lower() if c.isupper() else c for c in words).lstrip("_")


NOTHING_WRITTEN = "nothing was written"


@contextmanager
def stating(state: str) -> Iterator[None]:
    """Set the state of errors that pass, unless they have one."""
    try:
        yield
    except Int8ConvertError as error:
        error.state = error.state or state
        raise


class SourceError(Int8ConvertError):
    """The source is not usable."""


class CorruptFileError(SourceError):
    """A file contradicts itself or the index."""


class MissingWeightsError(SourceError):
    """No file holds weights that the model needs, and the user has not allowed that."""


class AlreadyQuantizedError(SourceError):
    """The source is quantized already."""


class LayerwiseError(SourceError):
    """The model cannot be run layer by layer; it may run as a whole."""


class NonFiniteWeightError(SourceError):
    """Weights hold NaN, infinity, or values beyond fp16.

    Attributes:
        module_name: the module of the weights, which a caller may keep 16-bit instead.
    """

    def __init__(self, message: str, hint: str, module_name: str) -> None:
        super().__init__(message, hint)
        self.module_name = module_name


class AdapterError(Int8ConvertError):
    """The LoRA adapter cannot be merged."""


class ModelMapError(Int8ConvertError):
    """transformers cannot build the model that the config describes."""


class RemoteCodeError(ModelMapError):
    """The model's class is code in the checkpoint, and the user has not allowed it to run."""


class UnverifiedError(Int8ConvertError):
    """The output to publish has not passed `verify`."""


class OutputError(Int8ConvertError):
    """The output cannot be written."""


class DiskFullError(OutputError):
    """The disk has too little room."""


class FormatError(Int8ConvertError):
    """The output format cannot hold this model."""


class CoverageError(Int8ConvertError):
    """Too little would become int8."""


class HubError(Int8ConvertError):
    """The Hub refuses a request, or lacks a name, a revision or a file."""


class HubMissingError(HubError):
    """The repository or the revision does not exist, or not for this token."""


class HubAccessError(HubError):
    """The Hub requires a token, more rights, or consent to a licence."""


class HubConnectionError(HubError):
    """The Hub cannot be reached, or connections break repeatedly."""


class PatternError(Int8ConvertError):
    """A pattern matches no module."""


class PromptError(Int8ConvertError):
    """The model cannot take a prompt."""


class DeviceError(Int8ConvertError):
    """The device is not usable here."""
