"""`python -m worlds.emoji STAGE --budget cpu|gpu`: from nothing to the shipped weights, a stage at
a time.
"""

from .stages import MAKING, main

if __name__ == "__main__":
    main("python -m worlds.emoji", __doc__, MAKING)
