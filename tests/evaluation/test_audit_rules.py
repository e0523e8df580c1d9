"""When a rule fires and when it does not, and how it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from curate.errors import ConfigError
from curate.evaluation.audit_rules import TOTAL, Rule, Slice, findings, undecided, worst_severity
from curate.evaluation.drift import Drift

DRIFT = Drift(
    n=200, baseline_n=500, mean=1.5, std=1, quantiles=(None,) * 5, threshold=2, share_above=0.3,
    baseline_share_above=0.05, mean_shift=0.8, psi=0.3, psi_noise=0.12, ks=0.2, ks_p=1e-5,
)  # fmt: skip
SLICES = [
    Slice(TOTAL, 210, 10, {"a.b": DRIFT, "c": replace(DRIFT, psi=0.02)}),
    Slice("forum", 20, 0, {"a.b": replace(DRIFT, n=20, psi=0.5, psi_noise=0.9), "c": replace(DRIFT, n=20)}),
]
NAMES = {"new_labels": 2, "new_languages": 0, "left_out": 1}


def fired(**rule) -> list[tuple[str, str | None, float]]:
    return [(f.source, f.column, f.value) for f in findings([Rule(**rule)], SLICES, NAMES)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"measure": "psi", "limit": 0.25}, [("", "a.b", 0.3)]),
        ({"measure": "psi", "limit": 0.3}, []),
        ({"measure": "psi", "limit": 0.25, "min_rows": 201}, []),
        ({"measure": "psi", "limit": 0.25, "column": "c"}, []),
        ({"measure": "psi", "limit": 0.25, "column": "a.*"}, [("", "a.b", 0.3)]),
        ({"measure": "psi", "limit": 0.01, "slices": "each"}, [("", "a.b", 0.3), ("forum", "c", 0.3)]),
        ({"measure": "ks_p", "op": "below", "limit": 1e-4, "column": "c"}, [("", "c", 1e-5)]),
        ({"measure": "ks_p", "op": "below", "limit": 1e-6}, []),
        ({"measure": "share_above", "limit": 0.2, "column": "c"}, [("", "c", 0.3)]),
        ({"measure": "mean", "op": "below", "limit": 2, "column": "c"}, [("", "c", 1.5)]),
        ({"measure": "mean_shift", "limit": 0.5, "column": "c"}, [("", "c", 0.8)]),
        ({"measure": "quarantined", "limit": 0.04}, [("", None, 10 / 210)]),
        ({"measure": "quarantined", "limit": 0.05}, []),
        ({"measure": "rows", "op": "below", "limit": 100, "slices": "each"}, [("forum", None, 20.0)]),
        ({"measure": "new_labels", "limit": 0}, [("", None, 2.0)]),
        ({"measure": "new_languages", "limit": 0}, []),
        ({"measure": "left_out", "limit": 0}, [("", None, 1.0)]),
    ],
)  # fmt: skip
def test_what_fires(rule, expected):
    assert fired(**rule) == [(s, c, pytest.approx(v)) for s, c, v in expected]


def test_what_cannot_be_measured_fires_nothing():
    unknown = replace(DRIFT, psi=None, psi_noise=None, baseline_n=0)
    assert findings([Rule("psi", 0.1)], [Slice(TOTAL, 5, 0, {"a": unknown})], NAMES) == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"measure": "psi", "limit": 0.25}, []),
        ({"measure": "psi", "limit": 0.1, "column": "a.b"}, []),  # it fires, beyond chance
        ({"measure": "psi", "limit": 0.1}, ["psi of c > 0.1: 200 rows against 500 show up to 0.12 by chance alone"]),
        ({"measure": "psi", "limit": 0.1, "op": "below"}, []),
        ({"measure": "ks", "limit": 0.5, "min_rows": 201},
         ["ks of a.b > 0.5: 200 rows against 500, and the rule has min_rows=201 (1 more columns)"]),
        ({"measure": "share_above", "limit": 0.5, "min_rows": 201, "column": "c"},
         ["share_above of c > 0.5: 200 rows, and the rule has min_rows=201"]),
        ({"measure": "psi", "limit": 0.1, "column": "other"}, []),
        ({"measure": "quarantined", "limit": 0.9, "min_rows": 211},
         ["quarantined > 0.9: 210 rows, and the rule has min_rows=211"]),
        ({"measure": "new_labels", "limit": 0}, []),
        ({"measure": "new_labels", "limit": 0, "min_rows": 211},
         ["new_labels > 0: 210 rows, and the rule has min_rows=211"]),
    ],
)  # fmt: skip
def test_what_too_few_rows_leave_undecided(rule, expected):
    assert undecided([Rule(**rule)], SLICES[0]) == expected


def test_a_finding_says_where_what_and_how_much():
    total, forum = (f for f in findings([Rule("psi", 0.05, slices="each")], SLICES, NAMES))
    assert total.text == "psi of a.b is 0.3 (> 0.05; 200 rows against 500)"
    assert forum.text == "psi of c in 'forum' is 0.3 (> 0.05; 20 rows against 500)"
    (low,) = findings([Rule("rows", 300, "below")], SLICES[:1], NAMES)
    assert low.text == "rows is 210 (< 300; 210 rows)"
    assert Rule("psi", 0.25, column="a.*", slices="each", min_rows=1000).told == (
        "psi of a.* > 0.25, of every source too, from 1,000 rows on"
    )


def test_of_rules_on_the_same_thing_the_gravest_is_told():
    warn, fail = Rule("psi", 0.1, severity="warn"), Rule("psi", 0.2)
    for rules in ((warn, fail), (fail, warn), (warn, fail, warn)):
        (found,) = findings(rules, SLICES, NAMES)
        assert (found.severity, found.limit) == ("fail", 0.2)
    low = Rule("mean", 9, "below", column="c")
    assert len(findings([low, Rule("mean", 0, column="c")], SLICES, NAMES)) == 2  # of two directions


def test_the_gravest_decides():
    warn, fail = Rule("rows", 0, severity="warn"), Rule("rows", 0)
    assert worst_severity([]) == "fine"
    assert worst_severity(findings([warn], SLICES, NAMES)) == "warn"
    assert worst_severity(findings([warn, fail, warn], SLICES, NAMES)) == "fail"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"measure": "rows", "limit": 1, "column": "a"}, "a rule on rows has no column"),
        ({"measure": "new_labels", "limit": 1, "slices": "each"}, "all new rows together"),
        ({"measure": "psi", "limit": 1, "min_rows": -1}, "min_rows=-1"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule, said):
    with pytest.raises(ConfigError, match=said):
        Rule(**rule)
