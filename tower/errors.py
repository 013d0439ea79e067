"""The errors the tower raises, and the table of codes a task may fail with.

TowerError
├── SettingsError        the environment does not describe a tower that can start
├── InvalidTask          what was asked for can never become a task
├── InvalidRule          no limit can be like this
├── InvalidKey           no key can be like this
├── Refused              whoever asks may not
├── NotFound             nothing has that name
├── Conflict             it exists, but not in a state that allows this
├── TooLarge             over a limit
└── Unavailable          not now; the same request may work in a moment
"""

from typing import Any


class TowerError(Exception):
    """Base of every error the tower raises on purpose: a machine-readable code and a sentence with the cure."""

    def __init__(self, message: str, *, code: str, field: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        #: The field of the request at fault, as a path such as ``payload.argv``.
        self.field = field
        #: More members for the problem document.
        self.extra = extra


class SettingsError(TowerError):
    """The environment does not describe a tower that can start."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="settings")


class InvalidTask(TowerError):
    """What was asked for can never become a task."""


class InvalidRule(TowerError):
    """No limit can be like this."""


class InvalidKey(TowerError):
    """No key can be like this."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message, code="invalid_field", field=field)


class Refused(TowerError):
    """Whoever asks may not: there is no key, it opens nothing, or not this."""


class NotFound(TowerError):
    """Nothing has that name."""


class Conflict(TowerError):
    """It exists, but not in a state that allows this."""


class TooLarge(TowerError):
    """Over a limit."""


class Unavailable(TowerError):
    """Not now; the same request may work in a moment."""

    def __init__(self, message: str, *, code: str = "unavailable", retry_after_s: int = 2) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


#: Every code the tower itself gives a task that did not succeed, with what to do about it.
FAILURES: dict[str, str] = {
    "handler_error": "The handler raised an exception; its traceback is at the end of log.txt.",
    "invalid_payload": "The payload no longer fits the handler's model; enqueue it again as GET /handlers describes.",
    "unknown_type": "No worker that took this task knows its type; start workers with the same handlers as the server.",
    "timeout": "Raise timeout_s or make the work smaller.",
    "silence": "It said nothing for silence_s seconds: see where log.txt ends, or raise silence_s.",
    "expired": "It waited until its expires_at: ask GET /tasks/{id}/why of its like, add workers, or give it more time.",
    "cancelled": "Somebody asked for it to stop; retry it if that was a mistake.",
    "worker_lost": "Look at what it did and at its worker's log and memory, then retry; with max_attempts=1 one lost worker is the end.",
    "secret_unusable": "Set TOWER_SECRET_<name> where workers run, or put a file of that name in TOWER_SECRETS_DIR; 8 characters or more.",
    "exit_nonzero": "The command ran and failed; its last lines are with the error, as `tail`, the rest in log.txt.",
    "command_not_found": "Check argv[0] and the worker's PATH.",
    "command_not_started": "The worker could not start the program; check cwd and permissions.",
    "unexpected_status": "The server answered with another status than expect_status; the answer is in error.",
    "http_error": "No usable answer came from the server; check the URL, the network and the certificate.",
    "redirect_refused": "The server redirected to another scheme or too often; call the final URL directly.",
    "response_too_large": "The answer was over max_bytes; raise it or ask for less.",
    "result_too_large": "The handler's result was over the limit; leave big results as artifacts.",
    "result_not_json": "The handler returned something JSON cannot hold; return dicts, lists, strings and finite numbers.",
    "artifact_name": "A file to keep has a name the trace cannot take; no hidden names, no `..`, 200 bytes at most.",
    "artifact_missing": "Check the path against cwd.",
    "artifact_too_large": "The files to keep are over TOWER_ARTIFACT_LIMIT_MB; keep fewer or raise it.",
}
