"""The exact level of verify: compares an int8 checkpoint with its source, tensor by tensor. Runs no model."""
