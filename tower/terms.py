"""The words that rows, requests and commands share: what a task can be, and what a key may do."""

QUEUED, DISPATCHED, RUNNING = "queued", "dispatched", "running"
SUCCEEDED, FAILED, CANCELLED, TIMED_OUT = "succeeded", "failed", "cancelled", "timed_out"

FINAL = (SUCCEEDED, FAILED, CANCELLED, TIMED_OUT)
#: What may be worth another try.
BROKEN = (FAILED, CANCELLED, TIMED_OUT)
IN_FLIGHT = (DISPATCHED, RUNNING)
STATUSES = (QUEUED, *IN_FLIGHT, *FINAL)

#: Each may do what those before it may: look, run and stop tasks, set rules and make keys.
VIEWER, OPERATOR, ADMIN = ROLES = ("viewer", "operator", "admin")
