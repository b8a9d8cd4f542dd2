"""The `lowrank` command: one file for each verb; each parses, calls a recipe, prints.

Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 130 interrupted. A run that a signal (SIGINT, SIGTERM,
SIGHUP, SIGUSR1) stopped after a step, with all that it learned saved, is done: 0.
"""

from lowrank.cli.command import main

__all__ = ["main"]
