"""Train, sample and evaluate: ``python main.py`` alone explains itself."""

from score_sde.__main__ import main

if __name__ == "__main__":
    main()
