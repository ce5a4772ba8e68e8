"""Obeys plans: quantizes and exports checkpoints, shard by shard."""
