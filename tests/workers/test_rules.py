"""The twelve rules of jobs and the pool, and the tests that fail when one is broken.

The rules themselves are told in docs/explanation/jobs.md. Here stands, for each, where it is tested; that these tests
exist, and are run by default or as slow ones, is checked.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
JOBS_PAGE = TESTS.parent / "docs" / "explanation" / "jobs.md"

RULES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {  # a job is a row; it, its first event and its key are one transaction
        "app/test_submission_rules.py": ("test_a_job_its_first_event_and_its_key_are_one_transaction",),
        "app/test_merge.py": ("test_the_same_idempotency_key_at_once_makes_one_job",),
        "storage/test_jobs.py": ("test_the_job_and_its_first_event_are_one_transaction",),
        "storage/test_idempotency.py": ("test_key_job_and_answer_are_one_transaction",),
    },
    2: {  # claims give a job once; every write of an attempt is fenced
        "storage/test_claims.py": ("test_claims_go_by_priority_then_age", "test_a_stale_attempt_writes_nothing"),
        "storage/test_contention.py": (
            "test_processes_claim_each_job_once",
            "test_threads_claim_each_job_once",
            "test_an_old_and_a_new_attempt_publish_at_once_and_the_new_one_wins",
        ),
        "storage/test_fencing.py": (
            "test_every_function_that_takes_an_attempt_is_known_here",
            "test_a_stale_attempt_changes_no_row",
        ),
        "workers/test_context.py": (
            "test_progress_of_a_stale_attempt_writes_nothing",
            "test_an_attempt_that_may_not_publish_leaves_no_row",
        ),
        "workers/test_log_shipping.py": ("test_a_shipper_stops_when_its_attempt_counts_no_more",),
    },
    3: {  # long-lived, forked worker processes; replaced after a cancel, a crash or a time-out; CUDA untouched
        "workers/test_worker_processes.py": (
            "test_workers_are_forked_from_a_process_that_has_loaded_everything",
            "test_a_process_that_was_stopped_serves_no_other_attempt",
            "test_a_process_whose_job_was_refused_is_kept",
            "test_a_preloaded_module_that_touches_cuda_is_told",
            "test_a_message_that_comes_with_the_end_of_its_worker_harms_no_other",
        ),
        "workers/test_supervisor.py": (
            "test_a_worker_serves_one_attempt_after_another",
            "test_a_worker_killed_by_a_signal_is_replaced_and_the_job_retried",
            "test_device_memory_is_retried_once_with_the_hint_in_a_new_process",
        ),
        "workers/test_local.py": ("test_workers_have_torch_loaded_and_cuda_untouched",),
    },
    4: {  # two providers behind one seam
        "contract/test_worker_provider.py": (
            "test_it_becomes_ready_and_runs_an_attempt",
            "test_terminate_stops_the_attempt_at_its_next_check",
            "test_kill_reaps_whatever_the_process_does",
            "test_a_crash_is_told_with_its_cause_and_log",
            "test_what_a_crashed_worker_started_dies_with_it",
            "test_closing_leaves_no_process_and_no_thread",
        ),
        "workers/test_local.py": ("test_importing_the_pool_imports_no_torch",),
    },
    5: {  # the supervisor's heartbeat, the database's clock
        "workers/test_worker_processes.py": ("test_the_sign_of_life_goes_on_while_a_job_holds_its_process",),
        "workers/test_supervisor_leases.py": (
            "test_the_lease_is_renewed_while_the_job_runs",
            "test_jobs_of_a_dead_server_are_taken_over_when_their_lease_ends",
            "test_an_attempt_that_lost_its_lease_is_killed_and_writes_nothing",
        ),
        "storage/test_shared_clock.py": (
            "test_no_module_asks_its_process_for_the_time_of_day",
            "test_a_lease_ends_when_the_databases_clock_says_so",
        ),
    },
    6: {  # retry by cause, at most three; what is kept of a failure
        "workers/test_settlement.py": (
            "test_every_combination_has_an_answer_and_every_failure_an_error",
            "test_the_surroundings_failures_are_retried",
            "test_device_memory_is_retried_once_with_the_hint",
            "test_a_users_error_fails_whatever_else_happened",
        ),
        "workers/test_supervisor.py": (
            "test_retries_end_after_three",
            "test_a_users_error_is_told_and_never_retried",
            "test_a_bug_is_an_internal_error_with_the_last_lines_of_the_log",
            "test_an_exit_in_the_middle_of_a_job_keeps_its_code",
            "test_peak_memory_is_that_of_the_attempt",
        ),
        "storage/test_claims.py": ("test_three_infrastructure_failures_are_forgiven_and_the_fourth_is_final",),
    },
    7: {  # cancel
        "workers/test_supervisor_stops.py": (
            "test_a_queued_job_is_cancelled_without_running",
            "test_a_running_job_is_cancelled_and_its_worker_replaced",
            "test_a_job_that_ignores_sigterm_is_killed_with_its_children_after_the_grace",
            "test_a_result_that_comes_after_the_cancel_is_not_published",
            "test_the_slot_is_free_only_when_the_process_is_reaped",
        ),
        "workers/test_lane.py": ("test_a_stopped_attempts_slot_is_free_only_after_reaping",),
        "workers/test_settlement.py": ("test_a_cancelled_job_is_cancelled_and_never_failed",),
        "storage/test_contention.py": ("test_cancel_and_success_at_once_have_one_winner",),
    },
    8: {  # death of the server
        "chaos/test_kill_server.py": (
            "test_a_merge_goes_on_after_the_restart",
            "test_children_of_a_job_die_with_the_server",
            "test_servers_killed_again_and_again_lose_nothing_and_publish_once",
        ),
        "workers/test_worker_processes.py": (
            "test_what_a_job_has_started_dies_with_the_fork_server",
            "test_a_group_is_killed_although_its_leader_has_gone_before",
            "test_the_guardian_kills_what_was_not_reaped_and_nothing_else",
        ),
        "chaos/test_job_kills_server.py": ("test_a_job_that_kills_its_server_ends_as_failed",),
        "workers/test_supervisor_leases.py": ("test_a_restarted_server_takes_its_jobs_back_at_once",),
        "workers/test_local.py": ("test_the_kernel_kills_a_worker_whose_fork_server_dies",),
        "storage/test_claiming.py": ("test_a_job_that_kills_its_server_again_and_again_fails",),
    },
    9: {  # blobs first, then one fenced transaction
        "workers/test_publishing.py": (
            "test_every_blob_is_there_before_the_transaction_begins",
            "test_nothing_is_visible_before_all_of_it_is",
            "test_the_blobs_of_an_attempt_that_died_are_swept",
        ),
        "chaos/test_kill_worker.py": ("test_killed_at_a_moment_of_publishing",),
        "storage/test_sweep.py": ("test_only_old_blobs_that_nothing_refers_to_go",),
    },
    10: {  # refused when submitted
        "app/test_submission_rules.py": (
            "test_what_can_not_run_is_refused_and_leaves_nothing",
            "test_more_devices_than_any_host_has_are_refused",
            "test_a_full_queue_says_when_to_come_back",
        ),
        "app/test_merge.py": ("test_impossible_merges_are_refused_at_once",),
    },
    11: {  # faked devices
        "workers/test_devices.py": ("test_cpu_slots_are_faked_at_will",),
        "workers/test_supervisor.py": ("test_each_slot_runs_one_attempt_at_a_time",),
        "workers/test_ranks.py": ("test_two_ranks_reduce_and_the_slots_serve_single_jobs_again",),
    },
    12: {  # schedules
        "storage/test_schedules.py": (
            "test_a_firing_makes_one_job_and_moves_on",
            "test_down_over_three_firings_and_run_once",
            "test_down_over_three_firings_and_skip",
            "test_days_on_which_the_clocks_change",
            "test_a_clock_that_goes_back_over_a_firing",
        ),
        "storage/test_schedule_races.py": (
            "test_processes_fire_each_time_once",
            "test_an_event_fires_each_schedule_once_on_many_servers",
        ),
        "storage/test_timetable.py": ("test_the_29th_of_february",),
    },
}
EVERY_RULE_AT_ONCE = ("chaos/test_chaos.py", ("test_a_round_on_sqlite", "test_a_round_on_postgres"))


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_tests_of_a_rule_exist(rule: int) -> None:
    named = {(path, name) for path, names in RULES[rule].items() for name in names}
    assert named
    assert {(path, name) for path, name in named if name not in names_in(path)} == set()


def test_all_rules_are_tried_at_once_too() -> None:
    path, names = EVERY_RULE_AT_ONCE
    assert set(names) <= names_in(path)


def test_the_page_tells_these_rules() -> None:
    told = re.findall(r"^(\d+)\. \*\*", JOBS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number in told] == list(RULES) == list(range(1, 13))
