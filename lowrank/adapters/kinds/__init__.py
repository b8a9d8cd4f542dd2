"""One file a kind of module: what W is there, and how a term is applied and merged."""
