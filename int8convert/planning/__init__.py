"""Decides what happens to each tensor of a checkpoint. Reads headers and configs, and writes nothing."""
