"""A job that torchrun restarts must not meet in the store of the ranks that are gone."""

from __future__ import annotations

import pytest

from smt_dist.engines.process_group import warn_of_a_shared_store


@pytest.mark.parametrize(
    ("restarts", "shared", "warns"),
    [("3", "True", True), ("3", "False", False), ("0", "True", False), (None, None, False)],
)
def test_restarts_on_a_shared_store_are_warned_of(monkeypatch, caplog, restarts, shared, warns):
    """Three of five such restarts of two gloo ranks failed or hung here (torch 2.13.0), none with a store for each."""
    for name, value in (("TORCHELASTIC_MAX_RESTARTS", restarts), ("TORCHELASTIC_USE_AGENT_STORE", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    warn_of_a_shared_store()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warns
