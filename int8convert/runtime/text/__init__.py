"""Text, tokenizers, prompts and windows of tokens."""
