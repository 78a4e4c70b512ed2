"""Who gets which partition: kafka-python's cooperative assignor, but not as trusting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor


class DisputeAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Gives nobody what two members claim to own; who has it gives it up, and the next round finds it free (trap 15).

    A member that was thrown out of the group, after a SIGSTOP say, still claims what it owned when it comes back, and
    kafka-python's leader believes whoever it hears last. So two own a partition in one generation, both may commit, and
    what one commits between the other's look at the offsets and its first record is done twice.
    """

    def assign(self, cluster: Any, members: Sequence[Any]) -> Mapping[str, Any]:
        """By member, what it is given in this round."""
        claims = Counter(tp for member in members for tp in self.parse_member_metadata(member.metadata).partitions)
        given: Mapping[str, Any] = super().assign(cluster, members)
        for assignment in given.values():
            free = [
                (topic, [p for p in partitions if claims[TopicPartition(topic, p)] < 2])
                for topic, partitions in assignment.assigned_partitions
            ]
            assignment.assigned_partitions = [(topic, partitions) for topic, partitions in free if partitions]
        return given
