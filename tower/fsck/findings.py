"""What fsck may find: a code for each difference, what it means, and the fixed rule it is repaired by."""

from dataclasses import dataclass
from typing import Any

#: code -> (what it means, what --repair does about it)
FINDINGS: dict[str, tuple[str, str]] = {
    # the folder of a task
    "no_folder": ("The folder is missing although the rows say that it was written.", "The folder is written again."),
    "file_missing": ("A file of the folder is missing.", "The folder is written again."),
    "file_differs": ("A file of the folder does not say what the rows say.", "The folder is written again."),
    "early_output": ("There is an output.json although the task has not ended.", "The folder is written again, without it."),
    "leftover": ("A crash left a temporary file.", "The folder is written again, without it."),
    "in_the_way": (
        "Something that is no folder or no plain file stands where one should be.",
        "The folder is moved to TRACE_DIR/.lost and written again.",
    ),
    "unreadable": ("The folder cannot be read.", "Nothing: see to the disk and its permissions."),
    "trace_late": ("The folder has lagged behind its rows for long; nobody writes it.", "The folder is written."),
    "trace_ahead": ("The row says that more was traced than there is.", "The folder is written again, and the row set right."),
    "orphan_folder": ("No task has the id of this folder.", "The folder is moved to TRACE_DIR/.lost; nothing is deleted."),
    # the rows of a task
    "no_first_event": ("The first event, `queued`, is missing.", "It is written anew, at the time at which the task was created."),
    "seq_gap": (
        "Numbers are missing among events and log chunks: something was lost.",
        "An event `lost` marks each place, at most a thousand per run.",
    ),
    "seq_beyond": ("Events or log chunks have numbers beyond the row's last.", "The row takes the highest number."),
    "no_end": ("The task has ended, but no event says so.", "The event is added, at the time at which the task ended."),
    "wrong_end": ("An event tells of an end that is not the row's one.", "The event is struck: it stays, as `struck`."),
    "after_end": ("An event comes after the task's end.", "The event is struck: it stays, as `struck`."),
    "attempt_untold": ("An attempt has no event `started`.", "An event `lost` is added for the attempt."),
    "attempt_twice": ("An attempt started twice, or never was.", "The event is struck: it stays, as `struck`."),
    "stray_chunk": ("A log chunk is of an attempt that never was.", "An event `struck` with its text takes its place."),
    "labels_differ": ("The rows to search labels by differ from the task's labels.", "They are written again from the task."),
    # who works on a task
    "no_worker": (
        "The task runs, but its worker is gone and its beat stands still.",
        "Nothing: the sweep of a running tower gives it to another worker; start one.",
    ),
    "not_nudged": (
        "The task was chosen to start, but nobody sends nudges for it.",
        "Nothing: the sweep of a running tower does; start one.",
    ),
    # messages
    "broker_away": ("The broker does not answer, so its messages were not looked at.", "Nothing: start it, or check REDIS_URL."),
    "message_unreadable": ("A message cannot be read.", "It is dropped: a message is only a nudge."),
    "message_of_no_task": ("A message names a task that does not exist.", "It is dropped: a message is only a nudge."),
    "message_of_ended_task": ("A message asks to run a task that has ended.", "It is dropped: nobody would run it."),
    "dead_letter": ("A message failed and was put away.", "It is dropped: the sweep sends what is needed."),
}


@dataclass(frozen=True)
class Finding:
    """One difference: what it is, of which task, folder or message, and where exactly."""

    code: str
    name: str
    detail: str = ""
    #: The number of the event or chunk it is about, if it is about one.
    seq: int = 0


@dataclass(frozen=True)
class Result:
    """A finding, and whether it has been put right."""

    finding: Finding
    is_repaired: bool

    def line(self, was_asked: bool) -> str:
        """Return it as a line for people; `was_asked` is whether repairs were asked for."""
        meaning, rule = FINDINGS[self.finding.code]
        detail = f" ({self.finding.detail})" if self.finding.detail else ""
        then = "Repaired" if self.is_repaired else "Left" if was_asked else "Repair"
        return f"{self.finding.name} {self.finding.code}: {meaning}{detail} {then}: {rule}"

    def document(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        meaning, rule = FINDINGS[self.finding.code]
        told = {"code": self.finding.code, "name": self.finding.name, "meaning": meaning, "detail": self.finding.detail}
        return {**told, "repair": rule, "repaired": self.is_repaired}
