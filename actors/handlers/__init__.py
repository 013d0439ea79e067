"""The handlers, one task type per file; `load` finds them, and those of other packages."""

import importlib
import logging
import pkgutil
from importlib.metadata import entry_points

from tower.handler import Registry, registry

_log = logging.getLogger(__name__)


def load() -> Registry:
    """Import every handler here and behind the entry-point group `tower.handlers`, and return them all."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for point in entry_points(group="tower.handlers"):
        try:
            point.load()
        except Exception:
            _log.exception("the handlers of %s cannot be used: %s does not import", point.name, point.value)
    return registry
