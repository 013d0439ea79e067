"""When a file was written: the clock by which a file system dates files runs behind, here by 2 to 8 ms."""

import os
import statistics
import tempfile
import time
from functools import cache

_SAMPLES, _APART_S = 200, 0.0013


def written_at(path: str) -> float:
    """Return when a file was written, in seconds since the epoch, as far as that clock tells."""
    return os.stat(path).st_mtime_ns / 1e9 + _behind(os.path.dirname(os.path.dirname(path)))


@cache
def _behind(folder: str) -> float:
    """Return how many seconds that clock is behind in a folder, by the median of files that are written now."""
    late = list[float]()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as place:
        for number in range(_SAMPLES):
            time.sleep(_APART_S)
            now = time.time()
            with open(f"{place}/{number}", "w") as file:
                file.write("x")
            late.append(now - os.stat(f"{place}/{number}").st_mtime_ns / 1e9)
    return statistics.median(late)
