"""Bytes on disk: files, shards, headers, layouts. Knows nothing of models or arithmetic."""
