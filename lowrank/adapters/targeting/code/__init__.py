"""What a model's own code does with its modules, read off its source."""
