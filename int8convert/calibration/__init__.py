"""Runs text through a model, layer by layer, and keeps what its Linear layers read on the disk."""
