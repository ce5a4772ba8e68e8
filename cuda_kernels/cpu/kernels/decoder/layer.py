"""A decoder layer for one token of each sequence, in two calls: up to the new keys and values, and from there on.

In between, the caller stores the keys and values, and says where all of them are. The operations between the products
take a few microseconds here; in torch each of the thirty takes as much.

Every intermediate result is rounded to 16 bits where the models' own code rounds. So outputs differ from it only in
the order of sums within norms and attention.

Both functions get the address of a table, see `table`, and return 0 or what went wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuda_kernels.cpu.kernels.bits import narrow, widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.decoder import table as fields
from cuda_kernels.cpu.kernels.decoder.attend import Allowed, Heads, Stored, attend
from cuda_kernels.cpu.kernels.decoder.elementary import exponential, square_root
from cuda_kernels.cpu.kernels.float_linear import float_linear
from cuda_kernels.cpu.kernels.int8_linear import int8_linear
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import NO_MEMORY


class _Layer(NamedTuple):
    """A table, read: int64 arrays of scalars, [norms, fields] and [products, fields]."""

    scalars: object
    norms: object
    linears: object


@compiled()
def _read(table):  # type: ignore[no-untyped-def]
    norms = table + 8 * fields.N_SCALARS
    linears = norms + 8 * fields.N_NORMS * fields.N_NORM_FIELDS
    return _Layer(
        view(table, (fields.N_SCALARS,), np.int64(0)),
        view(norms, (fields.N_NORMS, fields.N_NORM_FIELDS), np.int64(0)),
        view(linears, (fields.N_LINEARS, fields.N_LINEAR_FIELDS), np.int64(0)),
    )


@compiled()
def _float(value):  # type: ignore[no-untyped-def]
    return widen(np.uint32(value))


@compiled()
def _multiply(linear, x, y_at, team):  # type: ignore[no-untyped-def]
    """Write y, bits [M, N] at an address, for x, bits [M, K]."""
    n_rows, n_columns = linear[fields.ROWS], linear[fields.COLUMNS]
    sizes, x_at, like = (x.shape[0], n_rows, n_columns), x.ctypes.data, x.dtype.type(0)
    if linear[fields.KIND] == fields.FLOAT:
        return float_linear(sizes, x_at, linear[fields.WEIGHT], linear[fields.BIAS], y_at, team, like)
    stored = (linear[fields.STORED], linear[fields.N_STORED])
    weight = (
        linear[fields.WEIGHT],
        linear[fields.ABSMAX],
        linear[fields.SIDE_WEIGHT],
        linear[fields.BIAS],
    )
    threshold, block_size = _float(linear[fields.THRESHOLD]), linear[fields.BLOCK_SIZE]
    return int8_linear(
        sizes, x_at, n_columns, stored, threshold, linear[fields.CAPACITY], block_size, weight, y_at, n_rows, team, like
    )


@compiled()
def _rms_norm(x, norm, wide, y):  # type: ignore[no-untyped-def]
    for k in range(x.size):
        wide[k] = widen(x[k])
    total = np.float32(0)
    # Sums in lanes, because one after the other takes as long as a product.
    n_whole, lanes = x.size // _N_LANES * _N_LANES, wide[x.size : x.size + _N_LANES]
    lanes[:] = 0
    for k in range(0, n_whole, _N_LANES):
        for i in range(_N_LANES):
            lanes[i] += wide[k + i] * wide[k + i]
    for i in range(_N_LANES):
        total += lanes[i]
    for k in range(n_whole, x.size):
        total += wide[k] * wide[k]
    inverse = np.float32(1) / square_root(total / np.float32(x.size) + _float(norm[fields.NORM_EPS]))
    weight = view(norm[fields.NORM_WEIGHT], (x.size,), x.dtype.type(0))
    for k in range(x.size):
        y[k] = narrow(widen(weight[k]) * widen(narrow(wide[k] * inverse, y[0])), y[0])


_N_LANES = 32


@compiled()
def _layer_norm(x, norm, y):  # type: ignore[no-untyped-def]
    total, squares = 0.0, 0.0
    for k in range(x.size):
        total += widen(x[k])
    mean = total / x.size
    for k in range(x.size):
        difference = widen(x[k]) - mean
        squares += difference * difference
    inverse = np.float32(1) / square_root(np.float32(squares / x.size) + _float(norm[fields.NORM_EPS]))
    middle = np.float32(mean)
    n_weights, n_biases = x.size if norm[fields.NORM_WEIGHT] else 0, x.size if norm[fields.NORM_BIAS] else 0
    weight = view(norm[fields.NORM_WEIGHT], (n_weights,), x.dtype.type(0))
    bias = view(norm[fields.NORM_BIAS], (n_biases,), x.dtype.type(0))
    for k in range(x.size):
        value = (widen(x[k]) - middle) * inverse
        if n_weights:
            value *= widen(weight[k])
        if n_biases:
            value += widen(bias[k])
        y[k] = narrow(value, y[0])


@compiled()
def _normalize(kind, x, norm, wide, y):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        if kind == fields.LAYER_NORM:
            _layer_norm(x[t], norm, y[t])
        else:
            _rms_norm(x[t], norm, wide, y[t])


@compiled()
def _copy(x, y):  # type: ignore[no-untyped-def]
    for k in range(x.size):
        y[k] = x[k]


@compiled()
def _rotate(x, cos, sin, rotated):  # type: ignore[no-untyped-def]
    """Turn the pairs (x[d], x[d + D / 2]) of a head: fl16(fl16(x * cos) + fl16(turned x * sin))."""
    half = x.size // 2
    for d in range(x.size):
        turned = -widen(x[d + half]) if d < half else widen(x[d - half])
        along, across = narrow(widen(x[d]) * widen(cos[d]), x[0]), narrow(turned * widen(sin[d]), x[0])
        rotated[d] = narrow(widen(along) + widen(across), x[0])
    _copy(rotated, x)


@compiled()
def _finish_heads(x, norm, angles, scale, scratch):  # type: ignore[no-untyped-def]
    """Normalize, rotate and scale heads of queries or keys in place, [M, heads, D], if the layer does."""
    wide, rotated = scratch
    cos, sin, angle_stride = angles
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            head = x[t, h]
            if norm[fields.NORM_WEIGHT]:
                _rms_norm(head, norm, wide, rotated)
                _copy(rotated, head)
            if cos.size:
                _rotate(head, cos[t * angle_stride :], sin[t * angle_stride :], rotated)
            if scale != np.float32(1):
                for d in range(head.size):
                    head[d] = narrow(widen(head[d]) * scale, head[d])


@compiled()
def queries_keys_values(table, n_tokens, x, cos, sin, angle_stride, q, k, v, team, like):  # type: ignore[no-untyped-def]
    """Write what the layer attends with.

    Args:
        x: address of bits [M, hidden size].
        cos, sin: addresses of bits, D for each token, or 0 if positions do not rotate.
        angle_stride: elements from one token's to the next one's.
        q, k, v: addresses of bits [M, heads, D].
    """
    layer = _read(table)
    scalars = layer.scalars
    hidden, size = scalars[fields.HIDDEN_SIZE], scalars[fields.HEAD_SIZE]
    memory = allocate(2 * n_tokens * hidden + 4 * (hidden + size + _N_LANES) + 2 * size + 3 * 64)
    if memory == 0:
        return NO_MEMORY
    at = aligned(memory)
    normed = view(at, (n_tokens, hidden), like)
    at = aligned(at + normed.nbytes)
    wide = view(at, (hidden + size + _N_LANES,), np.float32(0))
    rotated = view(aligned(at + wide.nbytes), (size,), like)
    tokens = view(x, (n_tokens, hidden), like)
    _normalize(scalars[fields.NORM], tokens, layer.norms[fields.INPUT_NORM], wide, normed)
    status = 0
    # One call in a loop: the compiler would put the whole product wherever it is called.
    for i in range(3):
        if status >= 0:
            status = _multiply(layer.linears[fields.QUERY + i], normed, (q, k, v)[i], team)
    n_angles = (n_tokens - 1) * angle_stride + size if cos else 0
    angles = (view(cos, (n_angles,), like), view(sin, (n_angles,), like), angle_stride)
    queries, keys = (
        view(q, (n_tokens, scalars[fields.N_HEADS], size), like),
        view(k, (n_tokens, scalars[fields.N_GROUPS], size), like),
    )
    scratch, one = (wide, rotated), np.float32(1)
    _finish_heads(queries, layer.norms[fields.QUERY_NORM], angles, _float(scalars[fields.QUERY_SCALE]), scratch)
    _finish_heads(keys, layer.norms[fields.KEY_NORM], angles, one, scratch)
    release(memory)
    return status


@compiled()
def _add(x, y, sums):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            sums[t, k] = narrow(widen(x[t, k]) + widen(y[t, k]), x[0, 0])


@compiled()
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (np.float32(1) + exponential(-x))


@compiled()
def _activate(kind, x):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            value = widen(x[t, k])
            value = _silu(value) if kind == fields.SILU else max(value, np.float32(0))
            x[t, k] = narrow(value, x[t, k])


@compiled()
def _multiply_into(x, y):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[t, k] = narrow(widen(x[t, k]) * widen(y[t, k]), x[t, k])


@compiled()
def attention_and_mlp(table, n_tokens, n_positions, x, q, keys, values, allowed, y, team, like):  # type: ignore[no-untyped-def]
    """Write the layer's outputs.

    Args:
        n_positions: of the keys and values.
        x, y: addresses of bits [M, hidden size].
        q: address of bits [M, heads, D].
        keys, values: the fields of `attend.Stored`.
        allowed: the fields of `attend.Allowed`.
    """
    layer = _read(table)
    scalars, linears = layer.scalars, layer.linears
    hidden, middle = scalars[fields.HIDDEN_SIZE], scalars[fields.MIDDLE_SIZE]
    heads = Heads(n_tokens, scalars[fields.N_HEADS], scalars[fields.N_GROUPS], scalars[fields.HEAD_SIZE], n_positions)
    n_query = heads.n_heads * heads.head_size
    memory = allocate(n_tokens * 2 * (n_query + 2 * hidden + 2 * middle) + 4 * (hidden + _N_LANES) + 6 * 64)
    if memory == 0:
        return NO_MEMORY
    at = aligned(memory)
    attended = view(at, (n_tokens, n_query), like)
    at = aligned(at + attended.nbytes)
    middle_x = view(at, (n_tokens, hidden), like)
    at = aligned(at + middle_x.nbytes)
    change = view(at, (n_tokens, hidden), like)
    at = aligned(at + change.nbytes)
    gate = view(at, (n_tokens, middle), like)
    at = aligned(at + gate.nbytes)
    up = view(at, (n_tokens, middle), like)
    wide = view(aligned(at + up.nbytes), (hidden + _N_LANES,), np.float32(0))
    tokens, outputs = view(x, (n_tokens, hidden), like), view(y, (n_tokens, hidden), like)

    queries, flat = view(q, (attended.size,), like), view(attended.ctypes.data, (attended.size,), like)
    scale = _float(scalars[fields.SCORE_SCALE])
    status = attend(heads, queries, Stored(*keys), Stored(*values), Allowed(*allowed), scale, flat, team)
    if status >= 0:
        status = _multiply(linears[fields.OUTPUT], attended, change.ctypes.data, team)
    _add(tokens, change, middle_x)
    _normalize(scalars[fields.NORM], middle_x, layer.norms[fields.MLP_NORM], wide, change)
    is_gated = linears[fields.UP, fields.KIND] != fields.NO_LINEAR
    for i in range(2 if is_gated else 1):
        if status >= 0:
            status = _multiply(linears[fields.GATE + i], change, (gate.ctypes.data, up.ctypes.data)[i], team)
    _activate(scalars[fields.ACTIVATION], gate)
    if is_gated:
        _multiply_into(gate, up)
    if status >= 0:
        status = _multiply(linears[fields.DOWN], gate, change.ctypes.data, team)
    _add(middle_x, change, outputs)
    release(memory)
    return status
