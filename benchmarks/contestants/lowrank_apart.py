"""lowrank with every row computed from its beginning, as `data.share_prefixes: false` does."""

from __future__ import annotations

from lowrank_run import main

if __name__ == "__main__":
    main(share=False)
