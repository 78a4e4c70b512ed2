"""The settings of a worker: flags over CAROUSEL_* environment variables over a YAML file over these defaults.

Nothing else in the service reads the environment.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.errors import Rejected, ServiceError

WATCHED_MAX = 20
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
    state_topic: str = Field("carousel.state", description="Compacted topic that snapshots of states are written to.")
    partitions: int = Field(4, ge=0, le=10_000, description="Create missing topics with so many; 0: never create.")
    start: Literal["earliest", "latest"] = Field("earliest", description="Where a new group begins to read.")
    max_poll_records: int = Field(10_000, ge=1, le=100_000, description="Records taken from Kafka at a time.")
    session_timeout_ms: int = Field(10_000, ge=6_000, description="Silence after which Kafka thinks a worker dead.")
    max_poll_interval_ms: int = Field(
        300_000, ge=10_000, description="Time for one batch, after which Kafka gives the worker's partitions to others."
    )
    slot: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,128}$",
        description="Name of this worker's place in the group, the same after a restart: it then gets its partitions"
        " back at once. Each worker needs its own; empty: none.",
    )

    transport: Literal["kafka-python", "librdkafka"] = Field(
        "kafka-python",
        description="Client that speaks with Kafka: pure Python, or the faster librdkafka, of the extra `fast`.",
    )
    guarantee: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="What readers (read_committed) see of a forecast when workers fail."
    )
    commit_interval_ms: int = Field(200, ge=0, le=60_000, description="Time from one commit to the next, exactly once.")
    transaction_timeout_ms: int = Field(
        15_000, ge=1_000, le=900_000, description="Time after which Kafka aborts a transaction that was not ended."
    )
    snapshot_interval_s: float = Field(
        60.0, gt=0, description="Each state that changed is written to the state topic within this time."
    )
    on_lost_state: Literal["stop", "restart_streams"] = Field(
        "stop",
        description="Where states cannot be restored as they were: stop and say why, or let the streams begin afresh.",
    )
    crash_restarts: int = Field(
        5, ge=1, description="A record at which the process ended so often becomes a dead letter (crash)."
    )

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
    max_streams: int = Field(100_000, ge=1, description="Streams followed in one partition.")
    when_full: Literal["refuse", "forget"] = Field(
        "refuse",
        description="What a new stream meets in a full partition: it is refused (dead letter limit), or the stream that"
        " was not heard for longest is forgotten.",
    )
    idle_limit_s: float = Field(
        0.0, ge=0, description="Streams not heard for so long, in event time, are forgotten; 0: never."
    )
    watched_streams: Annotated[list[str], NoDecode] = Field(
        [],
        max_length=WATCHED_MAX,
        description="Ids of streams whose last value, and what had been forecast for it, are metrics, as shop 7,shop 8;"
        f" at most {WATCHED_MAX}, for each is a label.",
    )
    history_steps: int = Field(48, ge=0, le=10_000, description="Recent observations kept a stream, for /history.")
    intervals: Literal["calibrated", "raw"] = Field(
        "calibrated", description="Let intervals adapt to how well each stream's held, or issue them as the model does."
    )
    emit: Literal["every", "latest"] = Field(
        "every",
        description="Which forecasts are written: that of every observation, or of each stream only the latest in a"
        " commit. States are the same.",
    )
    emit_quantiles: Annotated[list[float], NoDecode] = Field(
        [], description="Quantiles that are written, as 0.1,0.5,0.9; none: all."
    )
    emit_horizons: Annotated[list[int], NoDecode] = Field(
        [], description="Steps ahead that are written, as 1,24, and named in a field `horizons`; none: all, unnamed."
    )
    emit_decimals: int | None = Field(
        None,
        ge=-15,
        le=15,
        description="Decimals of a forecast's numbers; by default what the stream's scale deserves.",
    )
    max_wave_rows: int = Field(1_024, ge=1, description="Most observations followed at once; who asks waits for these.")
    compiled: bool = Field(
        True, description="Follow streams by loops that numba compiles, where it is installed (the extra `fast`)."
    )
    workers: int = Field(
        1, ge=1, le=256, description="Worker processes; worker n listens on the HTTP port + n, and has the slot SLOT-n."
    )
    threads: int = Field(1, ge=1, le=256, description="Threads that torch computes with.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    log_format: Literal["console", "json"] = Field(
        "console",
        description="How it is written: for people, or each line a JSON object. Of one event in either case at most 10"
        " lines a minute; more are counted.",
    )

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        """Each worker needs a URL of its own."""
        if self.workers > 1 and self.advertised_url and not re.search(r":\d+$", self.advertised_url):
            raise ValueError("of several workers each is reached on a port of its own: advertised_url needs a port")
        return self

    @model_validator(mode="after")
    def _check_watched(self) -> Self:
        """What is told of them is read from their history."""
        if self.watched_streams and not self.history_steps:
            raise ValueError("watched_streams needs history_steps of 1 or more")
        return self

    def environment(self) -> dict[str, str]:
        """Our own environment with these settings in it, for another process of the same settings."""
        prefix = str(self.model_config["env_prefix"])
        known = {name: value for name, value in os.environ.items() if not name.upper().startswith(prefix)}
        for name, value in self.model_dump(mode="json").items():
            if value is not None:
                told = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                known[prefix + name.upper()] = told
        return known

    @field_validator("emit_quantiles", "emit_horizons", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        return given.replace(",", " ").split() if isinstance(given, str) else given

    @field_validator("watched_streams", mode="before")
    @classmethod
    def _split_ids(cls, given: Any) -> Any:
        """By commas alone: ids may have spaces."""
        return [stream.strip() for stream in given.split(",") if stream.strip()] if isinstance(given, str) else given

    @field_validator("watched_streams")
    @classmethod
    def _check_ids(cls, streams: list[str]) -> list[str]:
        from service.records import check_stream  # it brings numpy, for which `carousel --help` need not wait

        for stream in streams:
            try:
                check_stream(stream)
            except Rejected as error:
                raise ValueError(f"{stream!r}: {error}") from error
            if "," in stream:
                raise ValueError(f"{stream!r}: a comma ends an id here, so such a stream cannot be watched")
        return list(dict.fromkeys(streams))

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


def reference() -> str:
    """Every setting, in Markdown: docs/settings.md."""
    lines = [
        "# Settings of `carousel serve`",
        "",
        "Each comes from its flag, else from its variable, else from the YAML file that `--config` names, else from",
        "its default. In that file it has the name of its flag, with `_` for `-`. Written by `make docs`.",
        "",
        "| flag | variable | default | what it does |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else _default(field.default)
        choices = ", ".join(f"`{value}`" for value in get_args(field.annotation) if isinstance(value, str))
        told = f"{field.description} One of {choices}." if choices else str(field.description)
        cells = f"`--{name.replace('_', '-')}`", f"`CAROUSEL_{name.upper()}`", default, told.replace("|", "\\|")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value in ("", [], None):
        return ""
    return f"`{value:.15g}`" if isinstance(value, float) else f"`{value}`"


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
