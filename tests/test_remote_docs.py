"""Every block of Python in docs/remote.md, against an S3-compatible server on loopback."""

import re
from pathlib import Path

import probes
from tests.app import made
from tests.probes.test_remote import put
from tests.test_attach import namespace

PAGE = (Path(__file__).parents[1] / "docs" / "remote.md").read_text()
READING, RECORDING, RESUMING = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


def test_reading(tmp_path, bucket):
    made.run(tmp_path / "first", "full", blocks=2, steps=3)
    put(bucket.files(), tmp_path / "first", "bucket/runs/first")
    names = {}
    exec(compile(READING, "docs/remote.md, Reading", "exec"), names)
    assert names["run"].last_step == 20 and "loss" in names["run"].metrics


def test_recording(bucket):
    bucket.forget_everything()
    names = namespace()
    exec(compile(RECORDING, "docs/remote.md, Recording", "exec"), names)
    assert list(probes.open_run("s3://bucket/runs/first").steps("loss")) == [0, 1]
    exec(compile(RESUMING, "docs/remote.md, Recording", "exec"), names)
