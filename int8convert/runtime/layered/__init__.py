"""Running a model with one decoder layer in memory at a time."""
