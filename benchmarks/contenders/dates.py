"""When a file was written: the clock by which files are dated runs some milliseconds behind, unless somebody looks at them meanwhile."""

import os
import statistics
import tempfile
import time
from functools import cache

_SAMPLES, _APART_S = 60, 0.05


def written_at(path: str) -> float:
    """Return when a file was written, in seconds since the epoch, as far as that clock tells."""
    return os.stat(path).st_mtime_ns / 1e9 + _behind(os.path.dirname(os.path.dirname(path)))


@cache
def _behind(folder: str) -> float:
    """Return how many seconds that clock is behind in a folder, by the median of files that are written now, as far apart as tasks are."""
    late = list[float]()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as place:
        for number in range(_SAMPLES):
            time.sleep(_APART_S)
            now = time.time()
            file = os.open(f"{place}/{number}", os.O_CREAT | os.O_WRONLY)  # `open` would look at it
            os.write(file, b"x")
            os.close(file)
            late.append(now - os.stat(f"{place}/{number}").st_mtime_ns / 1e9)
    return statistics.median(late)
