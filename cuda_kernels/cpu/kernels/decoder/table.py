"""How a caller describes a decoder layer to `layer`: a table of int64. Imports nothing.

Floats stand there as the bits of float32, tensors as their addresses, and 0 for one that is not there.
"""

N_HEADS, N_GROUPS, HEAD_SIZE, HIDDEN_SIZE, MIDDLE_SIZE, NORM, ACTIVATION, QUERY_SCALE, SCORE_SCALE = range(9)
"""Places of the scalars. Groups are the heads of keys and values. The middle is the width between the MLP's products.
Queries are multiplied by their scale before they are rounded, scores by theirs afterwards."""

N_SCALARS = 9

RMS_NORM, LAYER_NORM = 0, 1
"""weight * fl16(x / sqrt(mean(x^2) + eps)), and LayerNorm."""

SILU, RELU = 0, 1

INPUT_NORM, QUERY_NORM, KEY_NORM, MLP_NORM = range(4)
N_NORMS = 4
NORM_WEIGHT, NORM_BIAS, NORM_EPS = range(3)
"""Fields of a norm, whose tensors are of 16 bits. Those of queries and keys work on each head, and may be absent."""

N_NORM_FIELDS = 3

QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)
N_LINEARS = 7
"""Products of the layer. An MLP that is not gated has no `UP`."""

KIND, ROWS, COLUMNS, WEIGHT, ABSMAX, SIDE_WEIGHT, BIAS, STORED, N_STORED, CAPACITY, BLOCK_SIZE, THRESHOLD = range(12)
"""Fields of a product, named as in `int8_linear`."""

N_LINEAR_FIELDS = 12

NO_LINEAR, INT8, FLOAT = 0, 1, 2
"""Kinds of a product: none, `int8_linear` and `float_linear`."""

TABLE_SIZE = N_SCALARS + N_NORMS * N_NORM_FIELDS + N_LINEARS * N_LINEAR_FIELDS
