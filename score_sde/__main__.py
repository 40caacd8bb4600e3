"""The program: ``score_sde``, ``python -m score_sde`` and ``python main.py`` run the command line as an absl app.

absl names the process after the command, for the kernel's log where memory runs out, and prints where Python was when
compiled code crashes.
"""

import logging

from absl import app, flags
from absl.logging import get_absl_handler

from .cli import run


def main() -> None:
    """Run the command line on the program's arguments; ends with its exit code."""
    app.run(_run, flags_parser=_arguments)


def _arguments(words: list[str]) -> list[str]:
    """All arguments as they are: absl's own flags are no options here, and are refused like other unknown ones."""
    flags.FLAGS.mark_as_parsed()
    return words[1:]


def _run(arguments: list[str]) -> int:
    logging.getLogger().removeHandler(get_absl_handler())  # the log goes to the terminal once, in its own form
    return run(arguments)


if __name__ == "__main__":
    main()
