"""The webhook of an audit, on a real HTTP server: told once, again after a failure, and without its secrets on disk."""

from __future__ import annotations

import json

import pytest

from curate.errors import DeliveryError
from tests.connectors.test_webhook import Receiver
from tests.jobs.auditing import audit, day

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def receiver():
    made = Receiver(200)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_the_webhook_is_told_once_and_again_until_it_hears(model, tmp_path, capsys, receiver, monkeypatch):
    place = corpus, _, sink = tmp_path / "arrivals", model, tmp_path / "out"
    monkeypatch.setenv("TEST_SECRET", "s3cret")
    monkeypatch.setenv("TEST_URL", receiver.url())
    hook = {"audit.webhook.url_env": "TEST_URL", "audit.webhook.secret_env": "TEST_SECRET",
            "audit.webhook.allowed_hosts": ["127.0.0.1"], "audit.webhook.private_hosts": ["127.0.0.1"],
            "audit.webhook.attempts": 1, "audit.webhook.told_of": "always"}  # fmt: skip
    day(corpus, "2026-11-01", range(10))
    audit(*place, capsys, **hook)
    assert len(receiver.got) == 1
    receiver.answers = [500]
    day(corpus, "2026-11-02", range(10, 20))
    with pytest.raises(DeliveryError, match="answered 500"):
        audit(*place, **hook)
    assert (sink / "audits/000002/committed.json").exists()
    assert not (sink / "audits/000002/notified.json").exists()
    receiver.answers = [200]
    assert audit(*place, capsys, **hook)["status"] == "nothing new"  # but the notice is sent
    told = [json.loads(body)["audit"] for _, _, body in receiver.got]
    assert told == ["000001", "000002", "000002"]
    audit(*place, capsys, **hook)
    assert len(receiver.got) == 3
    everything = "".join(p.read_text(errors="replace") for p in sink.rglob("*") if p.is_file())
    assert "t0ken" not in everything
    assert "s3cret" not in everything
