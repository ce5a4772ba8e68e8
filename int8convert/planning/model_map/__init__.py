"""Maps the tensors of a checkpoint to the modules of its model, in a child process that imports transformers."""
