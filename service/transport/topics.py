"""The topics that a worker needs: created where they are missing and that is allowed, held against what must be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import TopicAlreadyExistsError

from service.errors import ServiceError
from service.settings import Settings

log = logging.getLogger(__name__)

RECORD_BYTES_MAX = 8_388_608
"""Of the state topic: a bucket of one stream must fit, however large the model."""
STATE_CONFIG = {
    "cleanup.policy": "compact",
    "max.message.bytes": str(RECORD_BYTES_MAX),
    # Only closed segments are compacted: small ones keep what a restore must read small.
    "segment.bytes": str(1 << 26),
    "segment.ms": str(3_600_000),
    "min.cleanable.dirty.ratio": "0.2",
}


def prepare_topics(settings: Settings, common: Mapping[str, Any]) -> int:
    """Create the topics that are missing, where allowed, and see that partition numbers can be kept from input to
    output, and that states are kept. Raises ServiceError where they cannot. -> the bytes of a batch that every output
    takes.
    """
    source = settings.observations_topic
    sinks = [settings.forecasts_topic, settings.dead_letters_topic, settings.state_topic]
    admin = KafkaAdminClient(**common)
    try:
        existing = set(admin.list_topics())
        missing = [name for name in (source, *sinks) if name not in existing]
        if missing and not settings.partitions:
            raise ServiceError(f"topics are missing and not to be created (partitions 0): {', '.join(missing)}")
        if source in missing:
            _create(admin, [source], settings.partitions)
        partitions = _partitions(admin, [source])[source]
        _create(admin, [name for name in missing if name in sinks[:2]], partitions)
        _create(admin, [name for name in missing if name == settings.state_topic], partitions, STATE_CONFIG)
        for name, count in _partitions(admin, sinks).items():
            if count < partitions:
                raise ServiceError(
                    f"topic {name} has {count} partitions and {source} has {partitions}: what comes from a partition"
                    f" goes to the partition of the same number, so add partitions to {name}"
                )
        configs = {name: _config(admin, name) for name in sinks}
        _check_kept(settings.state_topic, configs[settings.state_topic]["cleanup.policy"])
        return min(int(config["max.message.bytes"]) for config in configs.values())
    finally:
        admin.close()


def _config(admin: KafkaAdminClient, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    config = admin.describe_configs([resource], config_filter="all")["topic"][topic]  # defaults, too
    return {name: str(entry["value"]) for name, entry in config.items()}


def _check_kept(topic: str, policy: str) -> None:
    """A state topic that drops old records drops streams that are seldom heard."""
    if policy != "compact":
        raise ServiceError(
            f"topic {topic} has cleanup.policy={policy} and would forget states: set it to compact, and nothing else"
        )


def _create(
    admin: KafkaAdminClient, names: Sequence[str], partitions: int, config: Mapping[str, str] | None = None
) -> None:
    for name in names:
        with suppress(TopicAlreadyExistsError):  # another worker was as quick
            admin.create_topics({name: {"num_partitions": partitions, "configs": dict(config or {})}})
            log.info("created topic %s with %d partitions", name, partitions)
    if names:
        admin.wait_for_topics(names)


def _partitions(admin: KafkaAdminClient, names: Sequence[str]) -> dict[str, int]:
    return {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}
