"""The HTTP API: `create_app` and one router per noun; a route translates a request, asks the orchestrator or the rows, and answers."""

from tower.api.app import create_app

__all__ = ["create_app"]
