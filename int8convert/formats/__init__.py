"""The on-disk contract: int8 checkpoints as bitsandbytes, compressed-tensors and torchao read them."""
