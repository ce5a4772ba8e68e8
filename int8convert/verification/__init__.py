"""Measuring what int8 does to a model."""
