"""An interpreter of the PTX that our kernels compile to, so that the code that ships is tested without a GPU.

    memory = Memory()
    address = memory.place(array)
    trace = execute(ptx_text, grid, block, args, memory, shared_bytes=0)

`execute` says what it catches; `toolchain.assemble` tells what ptxas makes of the same text.
"""

from tests.tools.ptx.interpreter import PtxError, execute
from tests.tools.ptx.memory import Memory
from tests.tools.ptx.threads import Trace

__all__ = ["Memory", "PtxError", "Trace", "execute"]
