"""From a row to its tokens, and which of them carry loss: templates, turns, borders."""
