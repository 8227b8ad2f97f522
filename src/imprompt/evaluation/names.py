"""Make names for files."""

import hashlib
import re
from collections.abc import Iterable
from itertools import count

# bytes: most file systems allow 255, and a seed and a suffix are appended
LONGEST = 150


def unique_names(names: Iterable[str]) -> list[str]:
    """Return names as parts of file names, all different even if case is ignored.

    A name that is taken gets a number.
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
    """Replace all characters except letters, digits and _ . + = , - in a name.

    A name longer than LONGEST bytes is cut and ends in a hash of the whole.
    """
    plain = re.sub(r"[^\w.+=,-]+", "-", name)
    data = plain.encode()
    if len(data) <= LONGEST:
        return plain
    return f"{data[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"
