"""What is learned beside the next token: one file a task, from a row to a batch, a loss, figures and an answer."""
