"""What is read of a table, what is refused, and how."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from training.series import HOUR
from training.table import Columns, TableError, read_table

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_csv(text: str, name: str = "load.csv") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_csv


def ms(*times: str) -> list[int]:
    return [int(pd.Timestamp(time).timestamp() * 1000) for time in times]


class TestReading:
    def test_series_come_in_order_of_appearance_and_rows_in_order_of_time(self, write: Write) -> None:
        table = read_table(
            write(
                "unique_id,ds,y\n"
                "b,2024-01-01 02:00,3\n"
                "a,2024-01-01 00:00,10\n"
                "b,2024-01-01 00:00,1\n"
                "b,2024-01-01 01:00,\n"
            )
        )
        assert [series.unique_id for series in table] == ["b", "a"]
        assert table[0].ts_ms.tolist() == ms("2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00")
        np.testing.assert_array_equal(table[0].y, [1, np.nan, 3])
        assert table[0].covariates.shape == (3, 0)

    @pytest.mark.parametrize("compression", ["gz", "bz2", "zip"])
    def test_compressed_csv(self, tmp_path: Path, compression: str) -> None:
        path = tmp_path / f"load.csv.{compression}"
        pd.DataFrame({"unique_id": ["a"], "ds": ["2024-01-01"], "y": [1.5]}).to_csv(path, index=False)
        assert read_table(path)[0].y.tolist() == [1.5]

    @pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
    def test_parquet_with_native_types(self, tmp_path: Path, zone: str | None) -> None:
        path = tmp_path / "load.parquet"
        ds = pd.to_datetime(["2024-01-01 00:00", "2024-01-01 01:00"]).tz_localize(zone)
        frame = pd.DataFrame({"unique_id": pd.Categorical([7, 7]), "ds": ds, "y": [1, 2]})
        frame.set_index("ds").to_parquet(path)  # an index is a column like any other
        (series,) = read_table(path)
        assert series.unique_id == "7"
        hours_east = 1 if zone else 0
        assert series.ts_ms.tolist() == [t - hours_east * HOUR for t in ms("2024-01-01 00:00", "2024-01-01 01:00")]
        assert series.y.dtype == np.float64

    def test_other_column_names_and_covariates_in_the_order_asked_for(self, write: Write) -> None:
        path = write("zone,time,load,wind,temp,note\nx,2024-01-01,1,2,3,hello\n")
        (series,) = read_table(path, Columns("zone", "time", "load", covariates=("temp", "wind")))
        assert series.covariates.tolist() == [[3.0, 2.0]]

    def test_ids_stay_as_they_are_written(self, write: Write) -> None:
        path = write("unique_id,ds,y\n007,2024-01-01,1\nNA,2024-01-01,2\n1.50,2024-01-01,3\n")
        assert [series.unique_id for series in read_table(path)] == ["007", "NA", "1.50"]
        path = write("unique_id,ds,y\n007,2024-01-01,1\n042,2024-01-01,2\n")
        assert [series.unique_id for series in read_table(path)] == ["007", "042"]

    def test_without_an_id_column_a_table_is_one_series_named_after_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "north.sea.csv.gz"
        path.write_bytes(gzip.compress(b"ds,y\n2024-01-01,1\n2024-01-02,2\n"))
        assert [series.unique_id for series in read_table(path)] == ["north.sea"]

    def test_of_rows_with_the_same_time_the_first_counts_and_one_warning_says_how_many(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write("unique_id,ds,y\n" + "a,2024-01-01,1\na,2024-01-01,2\na,2024-01-01,3\nb,2024-01-01,4\n")
        with caplog.at_level(logging.WARNING):
            table = read_table(path)
        assert [series.y.tolist() for series in table] == [[1], [4]]
        assert len(caplog.messages) == 1
        assert "2 rows repeat a time" in caplog.messages[0]


class TestTimes:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("2024-01-31 07:00", "2024-01-31T07:00Z"),
            ("2024-01-31T07:00:00.250Z", "2024-01-31T07:00:00.250Z"),
            ("2024-01-31T07:00+01:00", "2024-01-31T06:00Z"),
            ("2024-01-31 07:00-0530", "2024-01-31T12:30Z"),
            ("2024-01-31", "2024-01-31T00:00Z"),
            ("2024-01", "2024-01-01T00:00Z"),
            ("20240131", "2024-01-31T00:00Z"),
            ("1706684400", "2024-01-31T07:00Z"),
            ("1706684400250", "2024-01-31T07:00:00.250Z"),
            ("1706684400250000", "2024-01-31T07:00:00.250Z"),
            ("1706684400250000000", "2024-01-31T07:00:00.250Z"),
            ("1706684400.25", "2024-01-31T07:00:00.250Z"),
        ],
    )
    def test_a_time_is_read_as_it_is_meant(self, write: Write, written: str, meant: str) -> None:
        (series,) = read_table(write(f"unique_id,ds,y\na,{written},1\n"))
        assert series.ts_ms.tolist() == ms(meant)

    def test_offsets_may_differ_within_a_column_and_be_absent(self, write: Write) -> None:
        path = write(
            "unique_id,ds,y\na,2024-01-31 07:00+01:00,1\na,2024-07-31T07:00:00+02:00,2\na,2024-08-01 07:00,3\n"
        )
        (series,) = read_table(path, Columns(timezone="Europe/Berlin"))
        assert series.ts_ms.tolist() == ms("2024-01-31T06:00Z", "2024-07-31T05:00Z", "2024-08-01T05:00Z")

    def test_the_hour_that_comes_twice_in_autumn_is_two_hours(self, write: Write) -> None:
        hours = ["01:00", "02:00", "02:00", "03:00"]
        rows = [f"{name},2024-10-27 {hour},{k}" for name in "ab" for k, hour in enumerate(hours)]
        for series in read_table(write("unique_id,ds,y\n" + "\n".join(rows)), Columns(timezone="Europe/Berlin")):
            assert np.diff(series.ts_ms).tolist() == [HOUR, HOUR, HOUR]
            assert series.y.tolist() == [0, 1, 2, 3]

    def test_the_hour_left_out_in_spring_was_never_observed(
        self, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [f"a,2024-03-31 {hour},{k}" for k, hour in enumerate(["01:00", "02:00", "02:30", "03:00"])]
        (series,) = read_table(write("unique_id,ds,y\n" + "\n".join(rows)), Columns(timezone="Europe/Berlin"))
        assert series.y.tolist() == [0, 3]
        assert np.diff(series.ts_ms).tolist() == [HOUR]
        assert "2 rows dropped" in caplog.text
        assert "row 2" in caplog.text


class TestRefusals:
    """Each is one line that names the file, and the row, column or option that helps."""

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", ["the file is empty"]),
            ("unique_id,ds,y\n", ["no rows"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,inf\n", ["row 2", "'y'", "'inf' is not finite"]),
            ("unique_id,ds,y\na,2024-01-01,1e400\n", ["row 1", "'y'", "not finite"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,high\n", ["row 2", "'y'", "'high' is not a number"]),
            ("unique_id,ds,y\na,2024-01-01,1\n,2024-01-02,2\n", ["row 2", "no id", "'unique_id'"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,,2\n", ["row 2", "no time", "'ds'"]),
            ("unique_id,ds,y\na,2024-01-01,1\na,soon,2\n", ["row 2", "'ds'", "'soon' is no time", "ISO 8601"]),
            ("unique_id,ds,y\na,1/2/2024,1\n", ["row 1", "'1/2/2024' is no time"]),
            ("unique_id,ds,y\na,17,1\n", ["'ds'", "17 is neither a date", "epoch time"]),
            ("when,ds2\n2024-01-01,1\n", ["no column 'ds', 'y'", "its columns are when, ds2", "--time-column when"]),
            ("x,y,z\n1,2,3\n", ["no column 'ds'", "--time-column NAME"]),
            ("ds,load\n2024-01-01,1\n", ["no column 'y'", "--value-column load"]),
            ("site,ds,y\na,2024-01-01,1\nb,2024-01-01,1\n", ["row 2 repeats a time", "--id-column site"]),
        ],
    )
    def test_what_is_wrong_is_named(self, write: Write, text: str, says: list[str]) -> None:
        path = write(text)
        with pytest.raises(TableError) as caught:
            read_table(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        for part in says:
            assert part in message

    def test_an_option_that_names_no_column(self, write: Write) -> None:
        path = write("site,ds,y\na,2024-01-01,1\n")
        with pytest.raises(TableError, match=r"no column 'zone'; its columns are site, ds, y; try --id-column site"):
            read_table(path, Columns(unique_id="zone"))
        with pytest.raises(TableError, match=r"no column 'wind'.*try --covariates"):
            read_table(path, Columns(unique_id="site", covariates=("wind",)))

    def test_text_in_a_covariate(self, write: Write) -> None:
        path = write("unique_id,ds,y,sky\na,2024-01-01,1,clear\n")
        with pytest.raises(TableError, match=r"row 1, column 'sky': 'clear' is not a number"):
            read_table(path, Columns(covariates=("sky",)))

    def test_a_missing_a_broken_and_a_cut_off_file(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="there is no such file"):
            read_table(tmp_path / "none.csv")
        for name, content in [
            ("broken.parquet", b"PAR1 and then nothing of the kind"),
            ("cut.csv.gz", gzip.compress(b"unique_id,ds,y\n" + b"a,2024-01-01,1\n" * 99)[:40]),
            ("text.csv.gz", b"unique_id,ds,y\n"),
            ("latin.csv", "unique_id,ds,y\nKöln,2024-01-01,1\n".encode("latin-1")),
            ("thousands.csv", b"unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,1,234\n"),
            ("thousands_at_once.csv", b"unique_id,ds,y\na,2024-01-01,1,234\na,2024-01-02,2,345\n"),
        ]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(TableError) as caught:
                read_table(tmp_path / name)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(TableError, match="cannot be read"):
            read_table(tmp_path)

    def test_columns_that_make_no_sense(self) -> None:
        with pytest.raises(TableError, match="'y' is named twice"):
            Columns(covariates=("y",))
        with pytest.raises(TableError, match="--timezone: 'Middle/Earth'"):
            Columns(timezone="Middle/Earth")
