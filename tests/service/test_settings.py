"""Flags over environment over file over defaults; what makes no sense is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import ServiceError
from service.settings import Settings, reference


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text("model: /from/file\ngroup_id: file\nhttp_port: 1\nthreads: 2\n")
    monkeypatch.setenv("CAROUSEL_GROUP_ID", "environment")
    monkeypatch.setenv("CAROUSEL_HTTP_PORT", "2")
    settings = Settings.load({"http_port": 3, "threads": None}, file)
    assert (settings.http_port, settings.group_id, settings.threads) == (3, "environment", 2)
    assert (settings.model, settings.observations_topic) == (Path("/from/file"), "carousel.observations")


def test_lists_are_given_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAROUSEL_EMIT_HORIZONS", "1, 24")
    settings = Settings.load({"model": "m", "emit_quantiles": "0.1,0.9"})
    assert (settings.emit_quantiles, settings.emit_horizons) == ([0.1, 0.9], [1, 24])
    file = tmp_path / "carousel.yaml"
    file.write_text("model: m\nemit_quantiles: [0.5]\n")
    assert Settings.load({}, file).emit_quantiles == [0.5]
    with pytest.raises(ServiceError, match="setting emit_quantiles"):
        Settings.load({"model": "m", "emit_quantiles": "half"})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "model"),
        ({"model": "m", "http_port": 70_000}, "http_port"),
        ({"model": "m", "start": "middle"}, "start"),
        ({"model": "m", "threads": 0}, "threads"),
        ({"model": "m", "no_such_setting": 1}, "no_such_setting"),
        ({"model": "m", "advertised_url": "worker-1:8000"}, "advertised_url"),
        ({"model": "m", "advertised_url": "http://worker-1:8000/path"}, "advertised_url"),
        ({"model": "m", "advertised_url": "http://user@worker-1"}, "advertised_url"),
        ({"model": "m", "advertised_url": "http://worker-1:65536"}, "advertised_url"),
        ({"model": "m", "advertised_url": "ftp://worker-1"}, "advertised_url"),
        ({"model": "m", "advertised_url": "http://worker-1\n"}, "advertised_url"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_in_one_line(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ServiceError, match=f"setting {named}: ") as refused:
        Settings.load(flags)
    assert "\n" not in str(refused.value)


def test_watched_streams_are_parted_by_commas_and_may_have_spaces() -> None:
    settings = Settings.load({"model": "m", "watched_streams": "shop 7, site 7/temperature,shop 7"})
    assert settings.watched_streams == ["shop 7", "site 7/temperature"]
    assert Settings.load({"model": "m"}).watched_streams == []


@pytest.mark.parametrize(
    ("watched", "why"),
    [
        (",".join(f"s{n}" for n in range(21)), "setting watched_streams: .*at most 20"),
        (["shop 7, shop 8"], "setting watched_streams: .*comma"),
        (["a/../b"], "setting watched_streams: .*'a/../b'"),
        (["x" * 257], "setting watched_streams: .*256"),
    ],
)
def test_what_cannot_be_watched_is_refused_with_a_reason(watched: object, why: str) -> None:
    with pytest.raises(ServiceError, match=why):
        Settings.load({"model": "m", "watched_streams": watched})


def test_streams_without_history_cannot_be_watched() -> None:
    with pytest.raises(ServiceError, match="watched_streams needs history_steps"):
        Settings.load({"model": "m", "watched_streams": "a", "history_steps": 0})


@pytest.mark.parametrize("url", ["http://worker_1:8000", "https://10.0.0.7", "http://[::1]:80", ""])
def test_an_advertised_url_is_taken_without_its_last_slash(url: str) -> None:
    assert Settings.load({"model": "m", "advertised_url": url and url + "/"}).advertised_url == url


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [", "is not YAML"),
        ("- model", "must map setting names to values"),
        ("model: m\nthread: 1\n", "setting thread: "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text(content)
    with pytest.raises(ServiceError, match=said):
        Settings.load({}, file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot read the settings file"):
        Settings.load({}, tmp_path / "none.yaml")


def test_the_reference_tells_each_setting_as_it_is() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == reference(), "make docs"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`--{name.replace('_', '-')}`" for name in Settings.model_fields]
    assert ["`--model`", "`CAROUSEL_MODEL`", "required"] in [row[:3] for row in rows]
    assert ["`--session-timeout-ms`", "`CAROUSEL_SESSION_TIMEOUT_MS`", "`10000`"] in [row[:3] for row in rows]
    (start,) = [row[3] for row in rows if row[0] == "`--start`"]
    assert start == "Where a new group begins to read. One of `earliest`, `latest`."
