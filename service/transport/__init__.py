"""Kafka behind a narrow contract; one file a client."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from service.errors import ServiceError
from service.settings import Settings
from service.transport.contract import Transport

CLIENTS = {"kafka-python": ("kafka_python", "KafkaPython"), "librdkafka": ("librdkafka", "Librdkafka")}
"""By what the setting names: module and class."""


def transport_of(settings: Settings) -> Callable[[Settings, str], Transport]:
    """What begins a session with Kafka, given the settings and a client id. Raises ServiceError where its client is not
    installed.
    """
    module, name = CLIENTS[settings.transport]
    try:
        session: Callable[[Settings, str], Transport] = getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        if settings.transport == "librdkafka":
            raise ServiceError("transport librdkafka needs the extra [fast]: pip install 'carousel[fast]'") from error
        raise
    return session
