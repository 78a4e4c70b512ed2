"""The settings of a worker: flags over CAROUSEL_* environment variables over a YAML file over these defaults.

Nothing else in the service reads the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from service.errors import ServiceError

BASE_URL = re.compile(r"https?://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?")


class Settings(BaseSettings):
    """Every setting, its default and what it means."""

    model_config = SettingsConfigDict(env_prefix="CAROUSEL_", frozen=True, extra="forbid", protected_namespaces=())

    model: Path = Field(description="Directory of the bundle to serve, as `carousel train` wrote it.")

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Kafka brokers, HOST:PORT[,HOST:PORT...].")
    group_id: str = Field("carousel", min_length=1, description="Consumer group; its workers share the partitions.")
    observations_topic: str = Field("carousel.observations", description="Topic that observations are read from.")
    forecasts_topic: str = Field("carousel.forecasts", description="Topic that forecasts are written to.")
    dead_letters_topic: str = Field("carousel.observations.dlq", description="Topic for records that cannot be used.")
    partitions: int = Field(4, ge=0, le=10_000, description="Create missing topics with so many; 0: never create.")
    start: Literal["earliest", "latest"] = Field("earliest", description="Where a new group begins to read.")
    max_poll_records: int = Field(5_000, ge=1, le=100_000, description="Records taken from Kafka at a time.")
    session_timeout_ms: int = Field(10_000, ge=6_000, description="Silence after which Kafka thinks a worker dead.")

    http_host: str = Field("127.0.0.1", description="Address that HTTP listens on.")
    http_port: int = Field(8000, ge=0, le=65_535, description="Port that HTTP listens on; 0: any free one.")
    advertised_url: str = Field(
        "", description="URL under which other workers reach this one; empty: where it listens."
    )
    max_body_bytes: int = Field(1 << 20, ge=1_024, description="Largest HTTP request body.")
    max_history_steps: int = Field(10_000, ge=1, description="Longest history in a predict request, in steps.")

    max_record_bytes: int = Field(65_536, ge=64, description="Largest value of an observation record.")
    max_abs_value: float = Field(1e15, gt=0, description="Values beyond +- this are dead letters (range).")
    earliest_ts_ms: int = Field(
        365 * 86_400_000, description="Times before this are dead letters: seconds mistaken for milliseconds fall here."
    )
    max_ahead_s: float = Field(
        366 * 86_400.0, ge=0, description="How far an observation's time may lie ahead of its record's timestamp."
    )
    max_streams: int = Field(100_000, ge=1, description="Streams one worker holds; more become dead letters (limit).")
    history_steps: int = Field(48, ge=0, le=10_000, description="Recent observations kept a stream, for /history.")
    max_wave_rows: int = Field(4_096, ge=1, description="Most streams advanced in one batched step.")
    threads: int = Field(1, ge=1, le=256, description="Threads that torch computes with.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")

    @field_validator("advertised_url")
    @classmethod
    def _check_advertised_url(cls, url: str) -> str:
        return url and base_url(url)

    @classmethod
    def load(cls, flags: dict[str, Any], file: Path | None = None) -> Settings:
        """Settings from flags (None: not given), environment and YAML file. Raises ServiceError, naming the setting."""
        values = _read(file) if file else {}

        class Layered(Settings):
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as pydantic calls it
                file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, InitSettingsSource(settings_cls, values)

        try:
            return Layered(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ServiceError(f"setting {name}: {first['msg']}; see `carousel serve --help`") from error


def base_url(url: str) -> str:
    """The URL of a worker: http(s)://HOST[:PORT] and no more. Raises ValueError if it is none.

    >>> base_url("http://worker-1:8000/")
    'http://worker-1:8000'
    """
    found = BASE_URL.fullmatch(url.removesuffix("/"))
    if not found or int(found["port"] or 0) > 65_535:
        raise ValueError("must be http://HOST[:PORT] or https://HOST[:PORT], without a path")
    return found[0]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServiceError(f"cannot read the settings file {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServiceError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ServiceError(f"{file} must map setting names to values")
    return values
