"""The command as a process runs it: parsed, told, ended with its exit code."""

from __future__ import annotations

import os
import sys

from lowrank.cli.app import app
from lowrank.cli.failure import told
from lowrank.quantisers.registry import quieten
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
        quieten()
        try:
            app([argument for argument in given if argument != "--debug"], prog_name="lowrank")
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if debug:
                raise
            sys.exit(told(error))
