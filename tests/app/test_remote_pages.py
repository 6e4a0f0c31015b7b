"""The dashboard on runs that live elsewhere: every page opens, and a lost connection is told while what was fetched stays."""

import pytest

from probes import elsewhere, remote
from probes.remote import shadow as shadows
from tests.app import made
from tests.app.test_pages import mounted, opened, said
from tests.probes.test_remote import put


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("full", "block"):
        made.run(root / name, name, blocks=2, steps=8)
    return root


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    for name in ("_SOON", "_LATER", "_PART", "_FIRST_WAIT"):
        monkeypatch.setattr(shadows, name, 0.0)
    monkeypatch.setattr("sys.argv", ["main.py"])


def test_pages_open_runs_elsewhere(runs, bucket):
    put(bucket.files(), runs, "bucket/pages")
    for page in ("runs", "dilution", "depth_attention"):
        at = opened("s3://bucket/pages", f"pages_/{page}.py")
        assert not at.exception, page
        assert mounted(at, "depthscope_chart") or at.info, page
        assert not at.warning, page
    (shadow,) = elsewhere.all_of_them()
    before = shadow.fetched
    assert 0 < before <= sum(path.stat().st_size for path in runs.rglob("*") if path.is_file())
    opened("s3://bucket/pages", "pages_/dilution.py")
    assert shadow.fetched == before


def test_a_lost_connection_is_told_and_what_was_fetched_stays(runs, bucket):
    put(bucket.files(), runs, "bucket/lost")
    charts = len(mounted(opened("s3://bucket/lost", "pages_/dilution.py"), "depthscope_chart"))
    bucket.port.close()
    try:
        at = opened("s3://bucket/lost", "pages_/dilution.py")
        assert not at.exception
        assert "s3://bucket/lost has not answered since" in said(at)
        assert len(mounted(at, "depthscope_chart")) == charts > 0
    finally:
        bucket.port.open()
    opened("s3://bucket/lost", "pages_/dilution.py")
    assert remote.troubles() == []
    assert "has not answered" not in said(opened("s3://bucket/lost", "pages_/dilution.py"))


def test_an_address_without_runs_says_how_to_record_there(bucket):
    at = opened("s3://bucket/nothing")
    assert not at.exception and "There is no folder s3://bucket/nothing" in said(at)
    assert 'probes.record(model, "s3://bucket/nothing/first"' in at.code[0].value
