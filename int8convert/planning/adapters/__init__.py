"""Reads PEFT adapters, and merges them into weights."""
