from dataclasses import replace

import pytest

from launcher.config import ClusterConfig
from launcher.runs.records import Ending
from launcher.slurm.requeue_policy import Facts, TaskError, bad_nodes, decide, exclusions, failures_without_progress

CLUSTER = ClusterConfig(signal_lead_seconds=60)
STOPPED = {"state": "stopped", "reason": "SIGUSR2"}


def failure(rank: int, message: str, secondary: bool = False, user_error: bool = False) -> dict:
    return {
        "rank": rank,
        "node": f"n{rank + 1}",
        "message": message,
        "secondary": secondary,
        "user_error": user_error,
        "time": 0.0,
    }


def ended(kind: str, step: int, blamed: tuple[str, ...] = ()) -> Ending:
    return Ending(1, 1, "requeued", kind, "", step, blamed=list(blamed))


@pytest.mark.parametrize(
    ("facts", "verdict", "kind", "blamed"),
    [
        (Facts(0, mark={"state": "done"}), "done", "done", []),
        (Facts(1, superseded=True, mark={"state": "done"}), "superseded", "superseded", []),
        (Facts(0, mark=STOPPED), "requeued", "signal", []),
        (Facts(0, mark=STOPPED, seconds_left=100.0), "requeued", "time limit", []),
        (Facts(0, mark=STOPPED, cause="PREEMPTION", seconds_left=10.0), "requeued", "preempted", []),
        (Facts(0, mark=STOPPED, cause="CANCELLED"), "cancelled", "cancelled", []),
        (Facts(0, cause="JOB REQUEUE", task_errors=[TaskError("n1", "0", "Killed")]), "requeued", "requeued", []),
        (Facts(137, task_errors=[TaskError("n2", "1", "Killed")]), "requeued", "failure", ["n2"]),
        # the first rank is asked to stop because the second has died
        (Facts(137, mark=STOPPED, task_errors=[TaskError("n2", "1", "Killed")]), "requeued", "failure", ["n2"]),
        (Facts(12, task_errors=[TaskError("n1", "0", "User defined signal 2")]), "requeued", "signal", []),
        (Facts(75, task_errors=[TaskError("n1", "0", "Exited with exit code 75")]), "requeued", "signal", []),
        (Facts(1, rank_failures=[failure(0, "bad key", user_error=True)]), "failed", "user error", []),
        (Facts(1, rank_failures=[{**failure(1, "loss is not finite"), "final": True}]), "failed", "failed", []),
        (
            Facts(1, hang="hang: 5 s", rank_failures=[{**failure(1, "loss is not finite"), "final": True}]),
            *("failed", "failed", []),
        ),
        (Facts(76, task_errors=[TaskError("n1", "0", "Exited with exit code 76")]), "superseded", "superseded", []),
        (Facts(1, hang="hang: 5 s"), "requeued", "failure", []),
        (Facts(1, cause="NODE FAILURE"), "requeued", "node lost", []),
        (Facts(1), "requeued", "failure", []),
        (Facts(0, signals=["SIGTERM"]), "requeued", "signal", []),
    ],
)
def test_what_follows(facts: Facts, verdict: str, kind: str, blamed: list[str]) -> None:
    decision = decide(facts, [], 0, CLUSTER)
    assert (decision.verdict, decision.kind, decision.blamed) == (verdict, kind, blamed)


def test_the_cause_is_blamed_and_not_its_echo() -> None:
    echo = failure(0, "RuntimeError: Connection closed by peer", secondary=True)
    cause = failure(3, "ValueError: step 7: loss is not finite")
    errors = [TaskError("n1", "0", "Exited with exit code 1"), TaskError("n4", "3", "Exited with exit code 1")]
    decision = decide(Facts(1, rank_failures=[echo, cause], task_errors=errors), [], 0, CLUSTER)
    assert decision.reason == "rank 3 on n4: ValueError: step 7: loss is not finite"
    assert decision.blamed == ["n4"]


def test_a_crash_loop_ends_and_slices_do_not() -> None:
    crash = Facts(1, rank_failures=[failure(0, "boom")])
    history = [ended("failure", 20)] * 3
    assert decide(crash, history[:2], 20, CLUSTER).verdict == "requeued"
    assert decide(crash, history, 20, CLUSTER).verdict == "failed"
    assert decide(crash, history, 30, CLUSTER).verdict == "requeued", "there was progress"
    slices = [ended("time limit", 20)] * 50
    assert decide(Facts(0, mark=STOPPED, seconds_left=1.0), slices, 20, CLUSTER).verdict == "requeued"
    assert failures_without_progress([*history[:2], *slices, *history[:1]], 20) == 3


def test_requeues_are_bounded() -> None:
    cluster = CLUSTER.model_copy(update={"max_requeues": 2})
    decision = decide(Facts(0, mark=STOPPED), [ended("signal", 1), ended("signal", 2)], 3, cluster)
    assert decision.verdict == "failed"
    assert "max_requeues" in decision.reason


def test_a_node_is_bad_at_its_second_failure() -> None:
    once = ended("failure", 0, ("n2",))
    assert bad_nodes([once]) == []
    assert bad_nodes([once, replace(once, attempt=2), ended("failure", 0, ("n3",))]) == ["n2"]


def test_bad_nodes_are_excluded_as_long_as_enough_others_remain() -> None:
    twice, thrice = ended("failure", 0, ("n2",)), ended("failure", 0, ("n3",))
    history = [twice, replace(twice, attempt=2), *(replace(thrice, attempt=number) for number in (3, 4, 5))]
    everywhere = {"n1", "n2", "n3", "n4"}
    assert bad_nodes(history) == ["n3", "n2"]
    assert exclusions(history, set(), everywhere, 2) == ["n2", "n3"]
    assert exclusions(history, set(), everywhere, 3) == ["n3"]
    assert exclusions(history, set(), everywhere, 4) == []
    assert exclusions(history, {"n1"}, everywhere, 3) == ["n1"]
