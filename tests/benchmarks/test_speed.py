"""The speed of reading images: a tiny run writes a row per source and number of workers."""

import csv

import pytest

from benchmarks.speed import main, make_photographs

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_images_are_timed_from_files_and_cache(tmp_path, capsys):
    out = tmp_path / "new" / "speed.csv"
    words = ["images", "--images", "12", "--workers", "0", "1", "--passes", "3", "--device", "cpu"]
    main([*words, "--out", str(out)])
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["source"], row["workers"]) for row in rows] == [
        *(("files", "0"), ("cache", "0")),
        *(("files", "1"), ("cache", "1")),
    ]
    for row in rows:
        assert (row["what"], row["images"], row["passes"], row["device"]) == ("images", "12", "3", "cpu")
        assert 0 < float(row["q1"]) <= float(row["median_images_per_second"]) <= float(row["q3"])
        assert None not in row.values()
    printed = capsys.readouterr().out
    assert printed.count("images/s") == 4
    assert f"written to {out}" in printed


def test_the_photographs_differ(tmp_path):
    split = make_photographs(tmp_path / "files", 6)
    assert split.read(0).shape == (3, 384, 512)
    assert len({split.path(i).read_bytes() for i in range(6)}) == 6
