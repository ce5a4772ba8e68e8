"""Shards in pickle files, read without running or importing anything that they name."""
