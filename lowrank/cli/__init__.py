"""The `lowrank` command: one file for each verb; each parses, calls a recipe, prints.

Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 130 interrupted. A run that a signal (SIGINT, SIGTERM,
SIGHUP, SIGUSR1) stopped after a step, with all that it learned saved, is done: 0.
"""

from __future__ import annotations

import os
import sys

from lowrank.cli.app import app
from lowrank.cli.failure import told
from lowrank.recipes.parts.streams import unfailing_output


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits.

    Args:
        arguments: What follows `lowrank`; the process's own arguments by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    with unfailing_output():
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would fill a log file
        try:
            app([argument for argument in given if argument != "--debug"], prog_name="lowrank")
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if debug:
                raise
            sys.exit(told(error))
