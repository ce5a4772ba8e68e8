"""Finds the rotations and the smoothing that a model's class allows, proves them, and turns them into folds."""
