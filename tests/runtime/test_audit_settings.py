"""Settings of an audit that cannot be met are named."""

from __future__ import annotations

from datetime import date

import pytest

from curate.errors import ConfigError
from curate.runtime.audit_settings import AuditSettings, WebhookSettings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backfill": ["2026-11-02"]}, "give the first and the last day"),
        ({"backfill": ["2026-11-02", "soon"]}, "give the first and the last day"),
        ({"backfill": ["2026-11-02", "2026-11-01"]}, "before it begins"),
        ({"day": "x"}, "needs the groups year, month, day"),
        ({"day": "(("}, "no regular expression"),
        ({"keep": 0}, "audit.keep is 0"),
        ({"bins": 1}, "audit.bins is 1"),
        ({"worst_rows": -1}, "audit.worst_rows is -1"),
        ({"threshold_quantile": 1.5}, "threshold_quantile"),
        ({"new_share": 1.0}, "audit.new_share is 1.0"),
        ({"lease_seconds": 0.5}, "audit.lease_seconds is 0.5"),
    ],
)
def test_what_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        AuditSettings(**settings)


def test_the_webhook_has_one_address_and_may_try():
    with pytest.raises(ConfigError, match="both set"):
        WebhookSettings(url="https://h", url_env="H")
    with pytest.raises(ConfigError, match="must be above 0"):
        WebhookSettings(attempts=0)


def test_a_range_of_days():
    assert AuditSettings(backfill=["2026-11-02", "2026-11-02"]).days == (date(2026, 11, 2),) * 2
    assert AuditSettings().days is None
