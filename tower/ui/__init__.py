"""The pages, at `/`: made on the server, kept live by a stream, and whole without a script."""

from tower.ui.install import install

__all__ = ["install"]
