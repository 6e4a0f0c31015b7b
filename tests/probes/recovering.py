"""Runs with recovered mixing, and what it must be."""

import numpy as np

import probes
from tests.probes.models import sgd, train

WORDS = 17


def recorded(model, path, steps: int = 1, **options):
    optimizer = sgd(model)
    with probes.record(model, path, optimizer=optimizer, **options):
        train(model, optimizer, steps)
    return probes.open_run(path)


def assert_recovers(run, truth, tolerance=1e-4):
    """Every weight that exists is shown, and is the true one [L+1, L+1]."""
    exists = np.tri(len(truth), dtype=bool)
    found = run["mixing_weight"][0]
    np.testing.assert_allclose(found[exists], np.asarray(truth)[exists], atol=tolerance)
    assert np.isnan(found[~exists]).all() and np.isnan(run["mixing_share"][0][~exists]).all()
    np.testing.assert_allclose(run["mixing_r2"][0], 1, atol=tolerance)
    np.testing.assert_allclose(np.nansum(run["mixing_share"][0], 1), run["mixing_r2"][0], atol=tolerance)
    assert (run["mixing_condition"][0] >= 1 - 1e-6).all()
