"""Chooses the input columns that stay 16-bit, stores them, and draws them."""
