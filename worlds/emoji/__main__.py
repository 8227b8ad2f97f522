"""Make the packaged emoji model: `python -m worlds.emoji STAGE --budget cpu|gpu`.

Its stages lead from nothing to the shipped weights.
"""

from .stages import MAKING, main

if __name__ == "__main__":
    main("python -m worlds.emoji", __doc__, MAKING)
