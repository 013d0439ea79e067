"""Compares rows, folders and messages with each other, explains each difference and repairs it by a fixed rule."""

from tower.fsck.findings import FINDINGS, Finding, Result
from tower.fsck.walk import run

__all__ = ["FINDINGS", "Finding", "Result", "run"]
