"""Layers of a loaded model that are faster on a CPU for few tokens than those of torch and transformers."""
