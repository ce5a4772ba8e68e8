"""Finds the rotations that a model's class allows, proves them on a small model, and turns them into folds."""
