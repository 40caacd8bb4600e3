"""Train, sample and evaluate: ``python main.py`` alone explains itself."""

import sys

from score_sde.cli import run

if __name__ == "__main__":
    sys.exit(run())
