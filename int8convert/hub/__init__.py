"""Repositories on the Hugging Face Hub: found, listed, read by range, streamed or downloaded."""
