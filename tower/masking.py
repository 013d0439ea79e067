"""Hides secrets in what a task says, in every form in which programs commonly print them."""

import html
import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

#: A shorter one would be found in everything, and hide what it does not stand for.
SHORTEST = 8
HIDDEN = "***"

_UPPER = re.compile(r"%[0-9A-F]{2}")
#: Where programs break lines of base64.
_WIDTHS = (64, 76)


class Mask:
    """Knows some secrets and hides them; it knows none at first."""

    def __init__(self) -> None:
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self._bytes: re.Pattern[bytes] | None = None
        #: The length of the longest form, in characters and in bytes.
        self.longest = self._longest_bytes = 0

    def add(self, secret: str) -> None:
        """Hide this one from now on."""
        self._forms |= set(_forms(secret))
        forms = sorted(self._forms, key=len, reverse=True)  # the longest first: another may begin alike
        self._pattern = re.compile("|".join(map(re.escape, forms)))
        self._bytes = re.compile(b"|".join(re.escape(form.encode()) for form in forms))
        self.longest = len(forms[0])
        self._longest_bytes = max(len(form.encode()) for form in forms)

    def text(self, text: str) -> str:
        """Return the text with every secret hidden."""
        return self._pattern.sub(HIDDEN, text) if self._pattern else text

    def value(self, value: Any) -> Any:
        """Return what JSON can hold with every secret hidden in it, in names and numbers too."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(name): self.value(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        is_hidden = isinstance(value, int | float) and self.text(repr(value)) != repr(value)
        return HIDDEN if is_hidden else value

    def stream(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Yield bytes with every secret hidden, also one that lies across two parts."""
        if self._bytes is None:
            yield from parts
            return
        kept, hidden = b"", HIDDEN.encode()
        for part in parts:
            kept = self._bytes.sub(hidden, kept + part)
            ready = max(0, len(kept) - self._longest_bytes)
            if ready:
                yield kept[:ready]
                kept = kept[ready:]
        yield kept


def _forms(secret: str) -> Iterator[str]:
    """Yield how a secret, and each line of one that has several, may look when it is printed."""
    for piece in dict.fromkeys([secret, *secret.splitlines()]):
        if len(piece) >= SHORTEST:
            yield from _quoted(piece)
            yield piece.encode().hex()
            yield piece.encode().hex().upper()
            yield from _base64(piece.encode())


def _quoted(text: str) -> Iterator[str]:
    yield text
    for quoted in (quote(text), quote(text, safe=""), quote_plus(text)):
        yield quoted
        yield _UPPER.sub(lambda found: found[0].lower(), quoted)
    for is_ascii in (True, False):
        once = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
        yield from (once, once.replace("/", "\\/"), json.dumps(once, ensure_ascii=is_ascii)[1:-1])
    yield html.escape(text)
    yield repr(text)[1:-1]


def _base64(data: bytes) -> Iterator[str]:
    """Yield the data's base64, what is certain of it wherever in a longer text it begins, and its lines where programs break them."""
    alone = b64encode(data).decode()
    yield from (*_for_urls_too(alone), *_for_urls_too(alone.rstrip("=")))
    for shift, first in ((0, 0), (1, 2), (2, 3)):
        whole = b64encode(b"\0" * shift + data).decode()[first : (shift + len(data)) * 8 // 6]
        for form in _for_urls_too(whole):
            yield form
            for width in _WIDTHS:
                yield from (line for line in (form[at : at + width] for at in range(0, len(form), width)) if len(line) >= SHORTEST)


def _for_urls_too(form: str) -> tuple[str, str]:
    return form, form.replace("+", "-").replace("/", "_")
