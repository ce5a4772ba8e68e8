"""Running an int8 checkpoint: layers, loading, outliers, generation."""
