"""No partition has two owners, whatever those who come back claim."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from kafka import TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

from service.transport.assignor import DisputeAssignor

TOPIC = "observations"
CLUSTER = SimpleNamespace(partitions_for_topic=lambda topic: {0, 1, 2, 3}, topics=lambda: {TOPIC})


def given(assignor: type[CooperativeStickyAssignor], **claims: list[int]) -> dict[str, list[int]]:
    """What each member is given in one round, by what each claims."""
    members = []
    for name, partitions in claims.items():
        member = assignor()
        member.member_assignment = [TopicPartition(TOPIC, p) for p in partitions]
        members.append(SimpleNamespace(member_id=name, metadata=member.metadata([TOPIC])))
    rounds = assignor().assign(CLUSTER, members)
    return {
        name: [p for _, some in assignment.assigned_partitions for p in some] for name, assignment in rounds.items()
    }


def owners(assigned: dict[str, list[int]]) -> Counter[int]:
    return Counter(p for partitions in assigned.values() for p in partitions)


def test_what_a_member_claims_that_was_thrown_out_is_given_to_nobody_until_its_owner_gave_it_up() -> None:
    first = given(DisputeAssignor, w0=[0, 1, 2, 3], w1=[2, 3])
    assert owners(first) == Counter([0, 1])
    second = given(DisputeAssignor, **first)
    assert owners(second) == Counter([0, 1, 2, 3])
    assert len(second["w1"]) == 2


@pytest.mark.parametrize("claims", [{"w0": [0, 1, 2, 3], "w1": []}, {"w0": [0, 1], "w1": [2, 3]}, {"w0": [], "w1": []}])
def test_without_a_dispute_nothing_is_otherwise(claims: dict[str, list[int]]) -> None:
    assert given(DisputeAssignor, **claims) == given(CooperativeStickyAssignor, **claims)


def test_kafka_python_by_itself_still_gives_away_what_another_owns() -> None:
    """When this fails, the guard may go."""
    assert given(CooperativeStickyAssignor, w0=[0, 1, 2, 3], w1=[2, 3])["w1"] == [2, 3]
