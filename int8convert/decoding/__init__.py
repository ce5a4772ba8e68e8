"""Low-bit sources: stored codes and scales to rows of floats."""
