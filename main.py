"""Train, sample and evaluate, as the program ``score_sde`` does: ``python main.py`` alone explains itself."""

from score_sde.__main__ import main

if __name__ == "__main__":
    main()
