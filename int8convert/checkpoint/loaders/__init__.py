"""The files of a checkpoint that loaders read."""
