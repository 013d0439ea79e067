"""The fault matrix: each row of it, what is expected, and the tests that show it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_DEGRADED = "tests/acceptance/test_degraded.py"
_EMBEDDED = "tests/acceptance/test_embedded.py"
_GUARDIAN = "tests/acceptance/test_guardian.py"
_LIFECYCLE = "tests/test_lifecycle.py"
_PROCESSES = "tests/chaos/test_matrix_processes.py"
_SERVERS = "tests/chaos/test_matrix_servers.py"
_SERVICES = "tests/acceptance/test_services.py"
_TRACE = "tests/actors/test_trace.py"

#: Both runs of tests/chaos break things at random moments, and hold everything against all promises afterwards.
_CHAOS = (
    "tests/chaos/test_chaos_services.py::test_services_keep_their_promises_under_fire",
    "tests/chaos/test_chaos_embedded.py::test_an_embedded_tower_keeps_its_promises_under_fire",
)
_AT_EVERY_POINT = (
    "tests/chaos/test_nth_embedded.py::test_a_server_that_dies_anywhere_keeps_every_promise",
    "tests/chaos/test_nth_services.py::test_a_worker_that_dies_at_some_point_of_a_command_keeps_every_promise",
)
_ACCEPTING = f"{_PROCESSES}::test_a_server_killed_while_it_accepts_keeps_what_it_committed"
_AT_ONE_MOMENT = f"{_PROCESSES}::test_a_worker_killed_at_one_moment_leaves_a_task_that_ends_once"
_OUTAGE = f"{_SERVERS}::test_a_postgres_that_stops_under_requests_loses_none_it_answered"
_NOT_BUILT = "not built yet"

ROWS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("server killed before it inserts: no row, or one when asked again", (_ACCEPTING,)),
    2: ("server killed after the commit: started without a message", (_ACCEPTING,)),
    3: ("server killed after the nudge: asked again, the same task", (_ACCEPTING,)),
    4: ("worker killed before its claim: the task is nudged again", (_AT_ONE_MOMENT, *_AT_EVERY_POINT)),
    5: (
        "worker killed between claim and child: no child ever runs",
        (_AT_ONE_MOMENT, f"{_GUARDIAN}::test_a_worker_that_is_killed_leaves_no_process"),
    ),
    6: (
        "worker killed under its children: all end, no overlap",
        (f"{_GUARDIAN}::test_a_worker_that_is_killed_leaves_no_process", f"{_SERVICES}::test_a_worker_that_is_killed_loses_nothing"),
    ),
    7: ("worker killed before the end is written: runs again, ends once", (_AT_ONE_MOMENT,)),
    8: ("worker killed after the end is written: the end stands", (_AT_ONE_MOMENT,)),
    9: ("guardian killed: the worker notices and has another", (f"{_GUARDIAN}::test_a_guardian_that_is_killed_is_replaced", *_CHAOS)),
    10: (
        "guardian and worker killed: the next life ends what is left",
        (f"{_GUARDIAN}::test_what_survives_both_is_ended_by_the_next_life",),
    ),
    11: ("starter of the workers killed: they stop", (f"{_SERVICES}::test_workers_stop_when_the_process_that_started_them_is_killed",)),
    12: (
        "asked to stop: tasks are handed back, uncounted",
        (
            f"{_SERVICES}::test_a_worker_that_is_asked_to_stop_hands_its_tasks_back",
            f"{_EMBEDDED}::test_it_ends_cleanly_and_goes_on_where_it_was",
        ),
    ),
    13: (
        "worker frozen longer than its lease: another one takes over, the late one is refused",
        (
            f"{_GUARDIAN}::test_a_frozen_worker_is_fenced_by_its_guardian",
            f"{_GUARDIAN}::test_attempts_do_not_overlap_when_a_worker_freezes",
        ),
    ),
    14: (
        "everything frozen: nothing is taken from anybody",
        (f"{_PROCESSES}::test_a_tower_that_is_frozen_as_a_whole_takes_nothing_from_anybody",),
    ),
    15: (
        "Redis flushed: everything is sent again",
        (f"{_SERVICES}::test_messages_that_vanish_are_sent_again", f"{_DEGRADED}::test_a_redis_that_was_wiped_is_told_everything_again"),
    ),
    16: ("Redis restarted empty", (f"{_SERVERS}::test_a_redis_that_restarts_empty_loses_nothing",)),
    17: ("no Redis at all: work goes on", (f"{_SERVICES}::test_without_redis_tasks_are_accepted_run_and_traced",)),
    18: ("Redis hangs", (f"{_DEGRADED}::test_a_redis_that_hangs_holds_up_no_request_for_long",)),
    19: ("Redis full or read-only", (f"{_DEGRADED}::test_a_redis_that_takes_nothing_delays_tasks_and_loses_none",)),
    20: ("nudges doubled, late, out of order", (f"{_SERVERS}::test_nudges_that_come_twice_or_late_or_in_any_order_change_nothing",)),
    21: ("Postgres stopped under POSTs: what was answered is kept", (_OUTAGE,)),
    22: (
        "Postgres stopped under claims and ends: nobody expires, commits are recognised",
        (
            _OUTAGE,
            f"{_LIFECYCLE}::test_a_claim_whose_answer_was_lost_is_recognised",
            f"{_LIFECYCLE}::test_a_finish_whose_answer_was_lost_is_recognised",
        ),
    ),
    23: (
        "Postgres away for longer than a lease",
        (
            f"{_GUARDIAN}::test_a_worker_without_a_database_ends_its_own_work_in_time",
            f"{_DEGRADED}::test_a_database_that_is_away_for_longer_than_a_lease_loses_nothing",
            f"{_SERVERS}::test_a_postgres_that_is_away_for_longer_than_leases_last_costs_no_task_a_loss",
        ),
    ),
    24: (
        "connections cut, rows and tables locked",
        (
            f"{_DEGRADED}::test_connections_that_are_cut_lose_nothing",
            f"{_DEGRADED}::test_a_table_that_somebody_locks_delays_what_needs_it",
            f"{_SERVERS}::test_a_row_that_somebody_locks_waits_and_nothing_else_does",
        ),
    ),
    25: (
        "SQLite locked, read-only, taken away",
        (
            f"{_SERVERS}::test_a_sqlite_file_that_somebody_locks_is_waited_for",
            f"{_SERVERS}::test_a_database_on_a_disk_that_became_read_only_takes_nothing_and_says_so",
            f"{_DEGRADED}::test_a_sqlite_file_that_cannot_be_written_refuses_tasks_until_it_can",
            f"{_DEGRADED}::test_a_sqlite_file_that_is_taken_away_refuses_tasks",
        ),
    ),
    26: ("disk of the traces full", (f"{_TRACE}::test_a_disk_that_fails_delays_the_trace_and_loses_nothing", *_CHAOS)),
    27: ("folders read-only, links in the way", (f"{_TRACE}::test_a_symbolic_link_in_the_way_is_never_followed",)),
    28: (
        "output without end or newline, binary",
        (
            "tests/actors/handlers/test_command.py::test_a_gigantic_line_is_cut_into_pieces",
            "tests/actors/handlers/test_command.py::test_bytes_that_are_not_text_are_shown_as_such",
            "tests/actors/test_runner.py::test_a_log_over_its_limit_is_cut_with_a_mark",
        ),
    ),
    29: (
        "the clock steps by an hour",
        (
            f"{_SERVERS}::test_a_clock_that_steps_takes_no_task_from_its_worker",
            f"{_SERVERS}::test_a_start_time_is_one_of_the_databases_clock",
            "tests/test_races.py::test_a_step_of_the_wall_clock_makes_no_process_look_dead",
        ),
    ),
    30: ("a task kills its workers: it fails, the others go on", (f"{_PROCESSES}::test_a_poison_task_ends_and_stops_nothing_else",)),
    31: ("a task outlasts its lease: one run", (f"{_PROCESSES}::test_a_task_that_outlasts_its_lease_runs_once",)),
    32: (
        "a handler holds the interpreter: its late result is refused",
        (f"{_PROCESSES}::test_a_handler_that_holds_the_interpreter_loses_its_lease_and_its_result",),
    ),
    33: (
        "timeout of what ignores SIGTERM, forks, leaves its session",
        ("tests/actors/handlers/test_command.py::test_the_whole_process_tree_ends_with_the_attempt", *_CHAOS),
    ),
    34: (
        "cancel in each state",
        (
            "tests/api/test_tasks.py::test_a_waiting_task_is_cancelled_at_once_and_only_once",
            "tests/api/test_tasks.py::test_a_running_task_is_asked_to_stop",
            "tests/api/test_tasks.py::test_a_task_that_ended_otherwise_cannot_be_cancelled",
            "tests/test_races.py::test_a_cancel_that_comes_while_a_task_goes_back_to_the_queue_is_not_lost",
        ),
    ),
    35: (
        "several sweeps, dispatchers, claimants at once",
        ("tests/test_sweep.py::test_two_sweeps_do_no_more_than_one", f"{_LIFECYCLE}::test_only_one_of_many_workers_gets_a_task"),
    ),
    36: (
        "all start at once on an empty database",
        (f"{_PROCESSES}::test_processes_that_start_at_once_on_an_empty_database_migrate_it_once",),
    ),
    37: (
        "payloads and results at and over their limits",
        (
            "tests/api/test_guard.py::test_a_body_over_the_limit_is_refused_before_it_is_read",
            "tests/actors/test_runner.py::test_a_result_that_cannot_be_kept_fails_the_task",
        ),
    ),
    38: ("a workflow's parent killed between steps", (_NOT_BUILT,)),
    39: ("disk of the database full", (f"{_DEGRADED}::test_a_full_disk_under_sqlite_refuses_tasks_and_keeps_those_it_has",)),
    40: ("no more files or processes", (f"{_PROCESSES}::test_a_worker_that_can_open_no_more_files_lives_on",)),
}


def test_every_row_is_there() -> None:
    """All forty, each with what shows it."""
    assert sorted(ROWS) == list(range(1, 41))
    assert [number for number, (_, tests) in ROWS.items() if not tests] == []


@pytest.mark.parametrize("number", sorted(ROWS))
def test_every_row_is_shown_by_tests_that_exist(number: int) -> None:
    """A test that is renamed takes its row with it."""
    for pointer in ROWS[number][1]:
        path, _, name = pointer.partition("::")
        if pointer != _NOT_BUILT:
            defined = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
            assert name in defined, f"row {number} points to {pointer}, which is not there"
