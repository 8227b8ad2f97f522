"""Names that go into files' names."""

import hashlib
import re
from collections.abc import Iterable
from itertools import count

# bytes: a file's name has at most 255 nearly everywhere, and a seed and a suffix come behind
LONGEST = 150


def unique_names(names: Iterable[str]) -> list[str]:
    """Names as parts of files' names, each another, also where capitals do not count: one that is
    taken gets a number.
    """
    taken: set[str] = set()
    apart = []
    for name in map(filed, names):
        number = count(2)
        free = name
        while free.casefold() in taken:
            free = f"{name}-{next(number)}"
        taken.add(free.casefold())
        apart.append(free)
    return apart


def filed(name: str) -> str:
    """With nothing but letters, digits and _ . + = , - in it.

    Cut to LONGEST, with a hash of the whole.
    """
    plain = re.sub(r"[^\w.+=,-]+", "-", name)
    data = plain.encode()
    if len(data) <= LONGEST:
        return plain
    return f"{data[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"
