"""Door 2, the workers: `dramatiq tower.actors` imports this, and each of its processes becomes a worker."""

import gc
import sys

from actors.crew import Crew
from actors.handlers import load as load_handlers
from tower import faults, log
from tower.broker import open_broker
from tower.db import open_database
from tower.errors import SettingsError
from tower.settings import load

try:
    settings = load()
    if settings.embedded:
        raise SettingsError("A worker of its own needs REDIS_URL; without it the server runs the tasks itself (`tower up`).")
    log.configure(settings)
    faults.arm(settings.fault)
    open_database(settings)
except SettingsError as error:
    sys.exit(f"tower: {error}")

broker = open_broker(settings)
broker.add_middleware(Crew(settings, load_handlers(), broker))
gc.collect()
gc.freeze()  # as the server does
