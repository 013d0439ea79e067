"""Starts the server; everything is in tower.main."""

import sys

from tower.main import main

if __name__ == "__main__":
    sys.exit(main())
