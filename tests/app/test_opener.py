"""Which runs a first visit shows."""

from app import opener
from tests.app import made


def test_a_first_visit_sees_the_newest_of_each_residual_that_did_not_stop(tmp_path):
    for name, variant, created, status in [
        ("old baseline", "prenorm", 1.0, "finished"),
        ("baseline", "prenorm", 2.0, "finished"),
        ("full", "full", 3.0, "finished"),
        ("block", "block", 4.0, "finished"),
        ("crashed block", "block", 5.0, "stopped"),
    ]:
        made.run(tmp_path / name, variant, created=created, steps=1, status=status)
    entries = opener.find([tmp_path])
    assert [entry.name for entry in opener.worth_showing(entries, 3)] == ["baseline", "full", "block"]
    assert [entry.name for entry in opener.worth_showing(entries, 4)] == [
        "old baseline",
        "baseline",
        "full",
        "block",
    ]
    assert [entry.name for entry in opener.worth_showing(entries[-1:], 3)] == ["crashed block"]
    assert opener.worth_showing([], 3) == []
