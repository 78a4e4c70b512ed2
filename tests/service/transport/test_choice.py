"""Which client is used, is a setting; and only the transport imports one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import service
from service.errors import ServiceError
from service.settings import Settings
from service.transport import CLIENTS, transport_of


@pytest.mark.parametrize(("name", "expected"), [(None, "KafkaPython"), ("librdkafka", "Librdkafka")])
def test_the_setting_chooses_the_client(name: str | None, expected: str) -> None:
    settings = Settings.load({"model": "unused", "transport": name})
    assert transport_of(settings).__name__ == expected


def test_a_client_that_is_not_installed_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    monkeypatch.delitem(sys.modules, "service.transport.librdkafka", raising=False)
    with pytest.raises(ServiceError, match=r"needs the extra \[fast\]: pip install 'carousel\[fast\]'"):
        transport_of(Settings.load({"model": "unused", "transport": "librdkafka"}))


def test_an_unknown_client_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"setting transport: .*'kafka-python' or 'librdkafka'"):
        Settings.load({"model": "unused", "transport": "other"})


def test_only_the_transport_imports_a_client_and_each_client_stays_in_its_file() -> None:
    root = Path(service.__file__).parent
    importers = {
        name: {
            str(file.relative_to(root))
            for file in root.rglob("*.py")
            if re.search(rf"^\s*(import|from) {name}\b", file.read_text(), re.MULTILINE)
        }
        for name in ("kafka", "confluent_kafka")
    }
    assert {Path(file).parent.name for file in importers["kafka"]} == {"transport"}
    assert importers["confluent_kafka"] == {f"transport/{CLIENTS['librdkafka'][0]}.py"}
