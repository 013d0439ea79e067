"""Colours of a terminal, as a program wrote them into its log, told by classes: the page allows no styles in its text."""

import re
from collections.abc import Iterator
from itertools import islice

from markupsafe import Markup, escape

_ESCAPE = re.compile(r"\x1b(?:\[([0-9;:]*)([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_]|.?)", re.DOTALL)
#: Control characters that would be seen, or turn the direction of what follows.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: Colours of one line that are shown; a line with more goes on in the last.
_MOST_TURNS = 100
_STYLES = {1: "b", 2: "dim", 3: "i", 4: "u", 7: "inv", 9: "s"}
_OFF = {22: ("b", "dim"), 23: ("i",), 24: ("u",), 27: ("inv",), 29: ("s",)}
#: The sixteen colours that a page has, as red, green, blue; 256 colours and true colour take the nearest.
_BASE = (
    *((0, 0, 0), (170, 0, 0), (0, 170, 0), (170, 85, 0), (0, 0, 170), (170, 0, 170), (0, 170, 170), (170, 170, 170)),
    *((85, 85, 85), (255, 85, 85), (85, 255, 85), (255, 255, 85), (85, 85, 255), (255, 85, 255), (85, 255, 255), (255, 255, 255)),
)


def coloured(line: str) -> Markup:
    """Return one line of a log as HTML in which its colours are classes and nothing else of it acts."""
    if "\x1b" not in line:  # most have none
        return _piece(line, {})
    found, classes, at = [], dict[str, str](), 0
    for match in islice(_ESCAPE.finditer(line), _MOST_TURNS):
        found.append(_piece(line[at : match.start()], classes))
        if match[2] == "m":
            _turn(classes, match[1])
        at = match.end()
    found.append(_piece(_ESCAPE.sub("", line[at:]), classes))
    return Markup("").join(found)


def plain(line: str) -> str:
    """Return one line of a log without its colours."""
    return ACTING.sub("", _ESCAPE.sub("", line))


def _piece(text: str, classes: dict[str, str]) -> Markup:
    told = escape(ACTING.sub("�", text))
    if not told or not classes:
        return told
    return Markup('<span class="{}">{}</span>').format(" ".join(f"a-{name}" for name in classes.values()), told)


def _turn(classes: dict[str, str], codes: str) -> None:
    """Take what an SGR sequence says into the classes of what follows."""
    numbers = iter([int(code or 0) if len(code) < 4 else 0 for code in re.split("[;:]", codes)])
    for number in numbers:
        if number == 0:
            classes.clear()
        elif number in _STYLES:
            classes[_STYLES[number]] = _STYLES[number]
        elif number in _OFF:
            for name in _OFF[number]:
                classes.pop(name, None)
        elif number in (38, 48):
            if (colour := _chosen(numbers)) is not None:
                classes["fg" if number == 38 else "bg"] = f"{'f' if number == 38 else 'g'}{colour}"
        elif number in (39, 49):
            classes.pop("fg" if number == 39 else "bg", None)
        else:
            _turn_colour(classes, number)


def _turn_colour(classes: dict[str, str], number: int) -> None:
    for first, place, letter, bright in ((30, "fg", "f", 0), (40, "bg", "g", 0), (90, "fg", "f", 8), (100, "bg", "g", 8)):
        if first <= number < first + 8:
            classes[place] = f"{letter}{number - first + bright}"


def _chosen(numbers: Iterator[int]) -> int | None:
    """Return which of the sixteen colours the rest of `38;5;n` or `38;2;r;g;b` means."""
    kind = next(numbers, None)
    if kind == 5:
        if (number := next(numbers, None)) is None:
            return None
        number = min(number, 255)
        return number if number < 16 else _nearest(_of_256(number))
    if kind == 2:
        return _nearest((next(numbers, 0), next(numbers, 0), next(numbers, 0)))
    return None


def _of_256(number: int) -> tuple[int, int, int]:
    if number >= 232:
        grey = 8 + (number - 232) * 10
        return grey, grey, grey
    cube = number - 16
    red, green, blue = (0 if step == 0 else 55 + 40 * step for step in (cube // 36, cube // 6 % 6, cube % 6))
    return red, green, blue


def _nearest(colour: tuple[int, int, int]) -> int:
    return min(range(16), key=lambda number: sum((one - other) ** 2 for one, other in zip(_BASE[number], colour, strict=True)))
