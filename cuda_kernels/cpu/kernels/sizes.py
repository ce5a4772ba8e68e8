"""What kernels and their callers both know: sizes, and what a kernel returns instead of a result. Imports nothing."""

N_FLOATS = 32
"""float32 of a vector, two registers of 512 bits: the weight rows that are finished at a time, columns of a panel."""

N_CODES = 64
"""int8 codes of a vector: columns of a tail."""

N_TILE_TOKENS = 8
"""Tokens of a tile: with 32 rows their sums take 16 registers of 512 bits."""

NO_MEMORY, NOT_ASCENDING = -1, -2
"""A kernel found no memory for its own use; stored outlier columns are no ascending column indices."""
