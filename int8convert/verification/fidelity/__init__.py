"""The fidelity level of verify: runs an int8 checkpoint and its source on the same tokens."""
