"""What a stranger may put into a checkpoint directory, made on purpose."""
