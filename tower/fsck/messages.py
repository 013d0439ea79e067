"""Whether the messages at the broker name tasks that want them."""

import time
from collections.abc import Iterator
from itertools import islice

from tower import db
from tower.broker import HANDLER, Letter, Mailbox
from tower.errors import Unavailable
from tower.fsck.findings import Finding, Result
from tower.models import Task
from tower.settings import Settings
from tower.terms import FINAL

_PAGE = 500
#: A message this young may be on its way: its task has just ended, or its actor has it in hand.
_YOUNG_S = 60.0


def check_messages(settings: Settings, *, repairs: bool) -> Iterator[Result]:
    """Yield the messages that nobody needs, dropped if repairs are asked for; none when the broker is embedded."""
    if settings.redis_url is None:
        return
    try:
        mailbox = Mailbox(settings.redis_url)
        letters = mailbox.letters()
        while page := list(islice(letters, _PAGE)):
            for letter, finding in _check_page(page):
                if repairs:
                    mailbox.drop(letter)
                yield Result(finding, is_repaired=repairs)
    except Unavailable as error:
        yield Result(Finding("broker_away", "REDIS_URL", error.message), is_repaired=False)


def _check_page(page: list[Letter]) -> Iterator[tuple[Letter, Finding]]:
    named = [letter.task_id for letter in page if letter.task_id]
    found = db.read(lambda: dict(Task.select(Task.id, Task.status).where(Task.id << named).tuples()))
    for letter in page:
        code = _judge(letter, found)
        if code:
            detail = f"{letter.actor or '?'} on queue {letter.queue}" + (f", task {letter.task_id}" if letter.task_id else "")
            yield letter, Finding(code, f"message {letter.id}", detail)


def _judge(letter: Letter, statuses: dict[str, str]) -> str | None:
    """Return what is wrong with a message; an ended task may well be why somebody is asked to look for the next."""
    if letter.is_dead:
        return "dead_letter"
    if letter.task_id is None:
        return "message_unreadable"
    if time.time() - letter.sent_at < _YOUNG_S:
        return None
    if letter.task_id not in statuses:
        return "message_of_no_task"
    is_to_run = (letter.actor or "").startswith(HANDLER)
    return "message_of_ended_task" if is_to_run and statuses[letter.task_id] in FINAL else None
