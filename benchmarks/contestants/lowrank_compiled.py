"""lowrank with its layers compiled, as `training.torch_compile: true` does."""

from __future__ import annotations

from lowrank_run import main

if __name__ == "__main__":
    main(compiled=True)
