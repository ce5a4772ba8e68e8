"""The kernels of a decoder layer for one token of each sequence."""
