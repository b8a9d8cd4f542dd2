"""How good a model is: losses, answers, and which evaluation was the best."""
