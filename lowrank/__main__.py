"""`python -m lowrank`: the same as the `lowrank` command, for torchrun and accelerate launch."""

from lowrank.cli import main

if __name__ == "__main__":
    main()
