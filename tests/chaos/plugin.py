"""Makes the handlers of `handlers.py` known to a tower as another package would: by the entry-point group `tower.handlers`."""

from pathlib import Path

DISTRIBUTION = "chaos_handlers-0.dist-info"
FILES = {
    "METADATA": "Metadata-Version: 2.1\nName: chaos-handlers\nVersion: 0\n",
    "entry_points.txt": "[tower.handlers]\nchaos = tests.chaos.handlers\n",
}


def install(folder: Path) -> Path:
    """Make the handlers known to whoever has this folder on its path; return it."""
    place = folder / "site" / DISTRIBUTION
    place.mkdir(parents=True)
    for name, text in FILES.items():
        (place / name).write_text(text)
    return place.parent
