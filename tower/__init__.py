"""The control plane of DevOps Control Tower: rows, transitions, nudges, the API and the command line."""

__version__ = "0.1.0"
