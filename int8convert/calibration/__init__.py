"""Runs text through a model, layer by layer, and writes statistics of what its Linear layers read."""
