"""The trend page of `curate audit`: what it says, that foreign text does no harm, how it looks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curate.reports import audit
from curate.reports.audit import AuditPage
from tests.reports import browser
from tests.reports.test_page_in_browser import PALE, STICKING_OUT

HOSTILE = "</div><script>alert(1)</script>\u202e" + "x" * 300
COLUMNS = ("vector_filter.sycophantic.L14", "response_length")
SOURCES = ("", "forum", HOSTILE[:60], "helpdesk/tickets")


def sample(n: int = 12, drift_from: int = 10) -> AuditPage:
    rng = np.random.default_rng(0)
    history, audits = [], []
    for k in range(n):
        off = 1.5 if k >= drift_from else 0.0
        name, day = f"{k + 1:06d}", f"2026-11-{k + 1:02d}"
        for source in SOURCES:
            for i, column in enumerate(COLUMNS):
                q = np.array([-1.6, -0.7, 0, 0.7, 1.6]) * (1 + i) + off + rng.normal(0, 0.08)
                psi = None if k == 0 else float(0.03 + rng.random() / 30 + off / 2 * (1 - i))
                quantiles = zip(("q05", "q25", "q50", "q75", "q95"), map(float, q), strict=True)
                history.append({
                    "audit": name, "label": day, "as_of": f"{day}T03:00:00Z", "baseline": "000001", "source": source,
                    "column": column, "rows": 2000 + 10 * k, "quarantined": k, "n": 2000, "baseline_n": 2000 * (k > 0),
                    "mean": float(q[2]), "std": 1.0, **dict(quantiles), "threshold": 1.6,
                    "share_above": 0.05 + off / 10, "baseline_share_above": 0.05, "mean_shift": off, "psi": psi,
                    "psi_noise": None if k == 0 else 0.021, "ks": None if k == 0 else 0.04 + off / 5,
                    "ks_p": None if k == 0 else 0.3 if not off else 1e-40,
                })  # fmt: skip
        status = "baseline" if k == 0 else "fail" if off else "fine"
        fired = [COLUMNS[0]] if off else []
        marker = {"number": k + 1, "label": day, "as_of": f"{day}T03:00:00Z", "rows": 2000 + 10 * k}
        audits.append({**marker, "status": status, "fired": fired})
    text = {"prompt": "Is my plan good?", "response": HOSTILE, "label": HOSTILE, "source": "forum"}
    file = f"{HOSTILE[:40]}.jsonl"
    worst = [{"score": 3.1 - i, "file": file, "row": i, "id": f"r{i}", **text} for i in range(3)]
    finding = {"rule": "psi > 0.25", "severity": "fail", "text": f"psi of {COLUMNS[0]} in {HOSTILE[:30]!r} is 0.79"}
    latest = {
        "label": audits[-1]["label"], "status": audits[-1]["status"], "baseline": "000001", "rows": 2110, "files": 3,
        "grown": 1, "quarantined": 11, "reasons": {"no assistant turn": 9, HOSTILE: 2},
        "left_out": [f"{HOSTILE[:30]} is cut off"],
        "undecided": [],
        "findings": [finding, {**finding, "severity": "warn"}], "worst": worst, "column": COLUMNS[0],
        "drift": [r for r in history if r["audit"] == f"{n:06d}"], "languages": {"en": 1900, "": 80, "de": 20},
        "new_languages": ["de"], "labels": {"plain": 2000, HOSTILE: 3}, "new_labels": [HOSTILE],
    }  # fmt: skip
    return AuditPage(HOSTILE, audits, history, latest, (("source", "s3://b/arrivals"), ("rule", HOSTILE)), (0.1, 0.25))


def words(page: AuditPage) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", audit.build(page)))


def test_the_same_data_gives_the_same_safe_page():
    text = audit.build(sample())
    assert text == audit.build(sample())
    assert "<script" not in text
    assert "\u202e" not in text
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    assert "default-src 'none'" in text
    assert "unsafe" not in text
    assert " style=" not in text


def test_what_the_page_says():
    page = sample()
    text = words(page)
    assert "1 rule of severity fail fired on the 2,110 new rows." in text
    assert "12 audits, the latest of 2026-11-12:" in text
    assert f"PSI {page.history[-8]['psi']:.3f}" in text
    assert "up to 0.021 without any drift" in text
    fine = replace(page, latest={**page.latest, "findings": [], "status": "fine"})
    assert "The 2,110 new rows are as the baseline was." in words(fine)
    unsure = replace(fine, latest={**fine.latest, "undecided": ["psi > 0.25: 98 rows against 104 show up to 0.34"]})
    assert "No rule fired on the 2,110 new rows, which are too few for 1 of the rules." in words(unsure)
    assert "Too few rows to conclude psi &gt; 0.25: 98 rows" in words(unsure)
    warned = replace(page, latest={**page.latest, "findings": page.latest["findings"][1:], "status": "warn"})
    assert "1 warning on the 2,110 new rows, and no failure." in words(warned)


def test_a_first_audit_has_no_drift_to_show():
    page = sample(n=1)
    page = replace(page, latest={**page.latest, "baseline": "(itself)", "findings": [], "status": "baseline"})
    text = words(page)
    assert "This is the first audit: later ones are compared with it." in text
    assert "Population stability index" not in text


def test_sources_are_in_the_order_of_their_drift():
    page = sample()
    drift = [dict(d) for d in page.latest["drift"]]
    for d, psi in zip([d for d in drift if d["source"] and d["column"] == COLUMNS[0]], (0.2, 0.9, 0.5), strict=True):
        d["psi"] = psi
    text = audit.build(replace(page, latest={**page.latest, "drift": drift}))
    table = text[text.index('id="sources"') :]
    assert table.index("0.900") < table.index("0.500") < table.index("0.200")


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("n", [1, 12])
def test_the_page_fits_its_window_and_can_be_read(tmp_path, n):
    page = Path(tmp_path / "audit.html")
    page.write_text(audit.build(sample(n)), encoding="utf-8")
    for width, dark in ((1280, False), (390, True)):
        scripts = {"out": STICKING_OUT, "pale": PALE, "width": "document.documentElement.scrollWidth"}
        seen = browser.look(page, scripts, width=width, dark=dark)
        assert seen["out"] == []
        assert seen["pale"] == []
        assert seen["width"] <= width
        assert seen["requests"] == [page.as_uri()]
        assert seen["complaints"] == []


def test_audits_of_one_day_are_told_apart_by_the_hour():
    days = ["2026-11-01T03:15:00Z", "2026-11-02T03:15:00Z"]
    assert audit.moments(days) == ["2026-11-01", "2026-11-02"]
    assert audit.moments([*days, "2026-11-02T09:30:59Z"]) == ["11-01 03:15", "11-02 03:15", "11-02 09:30"]
