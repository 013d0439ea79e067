"""How fast the tower is, measured on the real stack; see docs/performance.md."""
