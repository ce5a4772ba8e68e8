"""Checks that a subclass of nn.Linear computes the same as nn.Linear, and so as an int8 layer in its place.

Falcon's does, by other operations. DeepSeek V4's multiplies groups of its input by parts of its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def computes_as_linear(module: Any) -> bool:
    """Return whether a module computes x @ weight^T + bias. True of every module that keeps nn.Linear's `forward`.

    The `forward` of a subclass is run on a small weight with the module's other attributes. Does not know code that
    takes another way for other sizes.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    small = object.__new__(type(module))
    small.__dict__.update({**vars(module), "_parameters": {}, "_modules": {}, "_buffers": {}})
    weight = torch.arange(15, dtype=torch.float32).reshape(5, 3)
    bias = torch.arange(5, dtype=torch.float32) if module.bias is not None else None
    small._parameters.update(weight=nn.Parameter(weight), bias=bias if bias is None else nn.Parameter(bias))
    small.in_features, small.out_features = 3, 5
    x = torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)
    with torch.device("cpu"), torch.no_grad():
        try:
            return torch.equal(small(x), functional.linear(x, weight, bias))
        except Exception:  # a model's code may raise anything, of sizes that it was not made for
            return False
