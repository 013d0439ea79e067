"""Browser sessions: a signed cookie that names a key, and the token that each form of its pages carries."""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tower import lifeline
from tower.errors import SettingsError

COOKIE = "tower_session"
#: How long one who logged in may stay.
LASTS_S = 12 * 3600

_VALUE = re.compile(r"([a-z0-9_]{1,40})\.([0-9]{1,12})\.([0-9a-f]{64})")
_FILE = "session.key"


class Sessions:
    """Signs and reads cookies; servers that share a secret read each other's."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode()
        self._clock = clock

    def begin(self, key_id: str) -> str:
        """Return the value of a cookie for whoever showed this key."""
        told = f"{key_id}.{int(self._clock() + LASTS_S)}"
        return f"{told}.{self._sign('session', told)}"

    def key_of(self, cookie: str) -> str | None:
        """Return the id of the key that a cookie names; None if we did not sign it, or it is over."""
        match = _VALUE.fullmatch(cookie)
        if not match or not hmac.compare_digest(self._sign("session", f"{match[1]}.{match[2]}"), match[3]):
            return None
        return match[1] if int(match[2]) > self._clock() else None

    def token(self, cookie: str) -> str:
        """Return what a form of this session must carry."""
        return self._sign("form", cookie)

    def is_token(self, cookie: str, token: str) -> bool:
        """Whether a form carries what it must."""
        return hmac.compare_digest(self.token(cookie).encode(), token.encode())

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret, f"{purpose}\n{text}".encode(), hashlib.sha256).hexdigest()


def kept_secret(folder: Path) -> str:
    """Return the secret that signs sessions, made at the first start and kept for this user alone; raise SettingsError."""
    path = folder / _FILE
    try:
        lifeline.make_own(folder)
        if not path.exists():
            _make(path)
        return path.read_text()
    except OSError as error:
        raise SettingsError(f"The secret of browser sessions cannot be kept in {folder}: {error}. Set TOWER_SESSION_SECRET.") from None


def _make(path: Path) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)  # of a crash in the midst of this
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secrets.token_urlsafe(32).encode())
        with suppress(FileExistsError):  # whoever comes first has made it
            os.link(beside, path)
    finally:
        os.close(file)
        beside.unlink()
