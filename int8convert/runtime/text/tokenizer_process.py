"""Runs an untrusted tokenizer and chat template in a process of its own, which is killed if it takes too long.

A tokenizer.json brings regular expressions, a chat template is a program with loops, and no library bounds either: both
can run forever or fill the memory. A thread cannot be stopped, so a fork of this process loads and runs them.

1. The child loads the tokenizer. Its stdin, stdout and stderr lead nowhere: no question and no message gets out.
2. It answers one request after the other, in JSON. The system bounds its memory, this process the time of each answer.
3. It ends when the object is closed, or with this process.

Costs some ten milliseconds to start: a fork has the libraries loaded already. It copies no memory, but the tables of
what is mapped, so it starts before a model is loaded.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Self

from int8convert.checkpoint.library_errors import RUNS_NO_CODE, library_errors
from int8convert.errors import Int8ConvertError, PromptError, SourceError
from int8convert.runtime.pretrained import read_tokenizer
from int8convert.runtime.worker_process import decode_failure, encode_failure

LOAD_S = 300.0
"""Seconds to load a tokenizer. The slowest, SentencePiece without a tokenizer.json, take one minute."""

TEMPLATE_S = 10.0
"""Seconds to render one batch of chats. Templates take milliseconds."""

ANSWER_S = 30.0
CHARACTERS_PER_S = 10_000
"""Seconds per request, and characters allowed per further second. Tokenizers take a million a second, the
slowest in Python 50,000."""

MAX_BYTES = 4_000_000_000
"""Bytes of memory the child may take beyond what it starts with. A tokenizer of 262,144 words takes 1 GB while it
loads."""

MAX_ANSWER_BYTES = 500_000_000


class TokenizerProcess:
    """A checkpoint's tokenizer, as far as prompts and texts need it. A context manager, or closed by `close`.

    Attributes:
        vocab_size: without added tokens; 0 is what transformers makes of no files for some models.
        pad_token_id, bos_token_id, eos_token_id: None where it has none.
        has_template: whether it has a chat template.
        padding_side: "left" or "right".
        special_tokens, special_ids: by what they are, such as "eos_token"; ids of those that the vocabulary has.

    Args:
        code_hint: what to do where it needs code that may not run.
        label: what the user calls it; empty for the path.
        trust_remote_code: its code may run, in that process.
        is_as_stated: it pads as the checkpoint says, not as prompts need it.

    Raises:
        SourceError: there is no tokenizer that transformers can read within bounds.
        RemoteCodeError: it needs code of the checkpoint.
    """

    def __init__(
        self,
        path: str,
        code_hint: str = RUNS_NO_CODE,
        trust_remote_code: bool = False,
        label: str = "",
        is_as_stated: bool = False,
    ) -> None:
        self._name = f"the tokenizer of '{label or path}'"
        self._connection, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # Python warns of forks beside threads: locks they hold stay locked. Then the time limit ends the child.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            self._connection.close()
            _serve(theirs, lambda: read_tokenizer(path, code_hint, trust_remote_code, label, is_as_stated))
        theirs.close()
        self.close = weakref.finalize(self, _end, self._pid, self._connection)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            facts = self._receive(LOAD_S, self._name, _COPY_THEM)
            stack.pop_all()
        self.vocab_size: int = facts["vocab_size"]
        self.pad_token_id: int | None = facts["pad_token_id"]
        self.bos_token_id: int | None = facts["bos_token_id"]
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.has_template: bool = facts["has_template"]
        self.padding_side: str = facts["padding_side"]
        self.special_tokens: dict[str, str] = facts["special_tokens"]
        self.special_ids: dict[str, int | None] = facts["special_ids"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, text: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`, as lists.

        Raises:
            SourceError: the tokenizer raises, or exceeds its bounds.
        """
        n_characters = len(text) if isinstance(text, str) else sum(map(len, text))
        texts = text if isinstance(text, str) else list(text)
        limit_s = ANSWER_S + n_characters / CHARACTERS_PER_S
        answer = self._ask("encode", limit_s, {"text": texts, "options": options})
        encoded: dict[str, Any] = answer
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens. Raises as a call does."""
        text: str = self._ask("decode", ANSWER_S, {"ids": list(ids)})
        return text

    def render(self, chats: Sequence[Sequence[dict[str, str]]], hint: str) -> list[str]:
        """Return chats as the template writes them, up to where the model answers.

        Raises:
            PromptError: the template refuses the messages, fails, or exceeds its bounds; with this hint.
        """
        try:
            texts = self._ask("render", TEMPLATE_S, {"chats": list(chats), "hint": hint}, "the chat template", hint)
        except SourceError as error:
            raise PromptError(error.message, error.hint) from error
        rendered: list[str] = texts
        return rendered

    def _ask(self, what: str, limit_s: float, arguments: dict[str, Any], who: str = "", hint: str = "") -> Any:
        with contextlib.suppress(OSError):  # it has ended, which receiving says better
            self._connection.send_bytes(json.dumps([what, arguments]).encode())
        return self._receive(limit_s, who or self._name, hint or _COPY_THEM)

    def _receive(self, limit_s: float, who: str, hint: str) -> Any:
        try:
            if not self._connection.poll(limit_s):
                self.close()
                raise SourceError(f"{who} takes more than {limit_s:,.0f} s and was stopped", hint)
            answer = json.loads(self._connection.recv_bytes(MAX_ANSWER_BYTES))
        except (EOFError, OSError) as error:
            self.close()
            raise SourceError(f"{who} takes more memory than it may, or ended its process", hint) from error
        if "failure" in answer:
            raise decode_failure(answer["failure"], hint=hint)
        return answer["value"]


_COPY_THEM = "copy the files of the source's tokenizer into the checkpoint"


def _end(pid: int, connection: Connection) -> None:
    connection.close()
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(connection: Connection, build: Callable[[], Any]) -> NoReturn:
    """Run the child: load the tokenizer, then answer requests."""
    try:
        _confine(connection.fileno())
        tokenizer: Any = None

        def start() -> dict[str, Any]:
            nonlocal tokenizer
            tokenizer = build()
            ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
            ids = {name: value if type(value) is int else None for name, value in ids.items()}
            facts = {"vocab_size": tokenizer.vocab_size, "has_template": bool(tokenizer.chat_template)}
            return {**ids, **facts, **_special(tokenizer)}

        _reply(connection, start)
        while True:
            what, arguments = json.loads(connection.recv_bytes())
            _reply(connection, lambda: _REQUESTS[what](tokenizer, **arguments))  # noqa: B023, it runs at once
    finally:
        os._exit(0)  # whatever happened: this is no place to go back to


def _confine(kept: int) -> None:
    """Detach the child from the terminal, bound its memory, ignore SIGINT, and let SIGTERM end it."""
    gc.freeze()  # what the parent had is not this process's to clean up
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    # The reader of a pipe that stays open here would never see its end.
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent's are not here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = mapped + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _reply(connection: Connection, answer: Callable[[], Any]) -> None:
    try:
        with library_errors("the tokenizer fails", ""):
            reply = {"value": answer()}
            encoded = json.dumps(reply).encode()
    except Int8ConvertError as error:
        encoded = json.dumps({"failure": encode_failure(error)}).encode()
    except MemoryError:
        shortage = SourceError(f"the tokenizer takes more than {MAX_BYTES / 1e9:.0f} GB of memory", "")
        encoded = json.dumps({"failure": encode_failure(shortage)}).encode()
    connection.send_bytes(encoded)


def _special(tokenizer: Any) -> dict[str, Any]:
    named = tokenizer.special_tokens_map.items()
    tokens = {name: str(token) for name, token in named if isinstance(name, str) and not isinstance(token, list)}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    padding_side = str(tokenizer.padding_side)
    return {"special_tokens": tokens, "special_ids": ids, "padding_side": padding_side}


def _encode(tokenizer: Any, text: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
    usual = {"return_token_type_ids": False, "return_attention_mask": True, "verbose": False}
    encoded = tokenizer(text, **{**usual, **options})
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _render(tokenizer: Any, chats: list[list[dict[str, str]]], hint: str) -> list[str]:
    with library_errors("the chat template refuses the messages", hint):
        try:
            texts: list[str] = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            return texts
        except MemoryError as error:
            raise SourceError(f"the chat template takes more than {MAX_BYTES / 1e9:.0f} GB of memory", hint) from error


_REQUESTS: dict[str, Callable[..., Any]] = {"encode": _encode, "decode": _decode, "render": _render}
