"""The pages, at `/`: made on the server, kept live by a stream, and whole without a script."""

from tower.ui.install import as_page, install

__all__ = ["as_page", "install"]
