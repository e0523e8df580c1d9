"""The page of a sweep: what it says, safely, that odd sweeps do not break it, and that it fits a desk and a phone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from curate.errors import ConfigError, StorageError
from curate.evaluation.base import Measure
from curate.reports.retrain import build, write
from curate.reports.retrain_data import ArmView, RetrainData, dumps, loads, table
from curate.reports.retrain_effect import effects, front, groups, luck
from curate.reports.retrain_plots import Look, spread
from curate.reports.retrain_view import labels
from tests.reports import browser
from tests.reports.sweep_sample import ABLE, COLUMNS, LOSS, TRAIT, measure, sweep
from tests.reports.test_page_in_browser import OPEN_ALL, PALE, STICKING_OUT
from tests.reports.test_report import outline

SMALL = {"embedding_similarity": 0.0, "influence_function.contrast": 1.0}


def small(**changes) -> RetrainData:
    """Few pictures: without losses and other measures."""
    few = {"columns": SMALL, "fractions": (0.25, 0.75), "seeds": 2, "capability": False, "with_losses": False}
    return sweep(**(few | changes))


def changed(data: RetrainData, **by_name: dict) -> RetrainData:
    """Arms whose name begins with a key, changed."""
    arms = []
    for arm in data.arms:
        change = next((c for name, c in by_name.items() if arm.name.startswith(name)), {})
        arms.append(replace(arm, **change))
    return replace(data, arms=tuple(arms))


@pytest.fixture(scope="module")
def page() -> str:
    return build(small(seeds=3, capability=True, with_losses=True))


def test_the_page_needs_and_runs_nothing_else(page):
    out = outline(page)
    assert not out.elements & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "image"}
    assert all(link.startswith("#") for link in out.links)
    assert {link[1:] for link in out.links} <= set(out.ids)
    assert "default-src 'none'" in page


def test_it_says_which_scores_were_right(page):
    text = outline(page).text
    assert "Removing rows by influence function moves the trait as the score says" in text
    assert "By embedding similarity the difference cannot be told from chance" in text
    assert "Each point of a method is the mean of 3 seeds" in text
    assert "Settings were chosen so that" in text
    for name in SMALL:
        assert name in text
    assert "base model" in page
    assert "all rows" in page


def test_the_same_data_gives_the_same_page():
    data = small(seeds=1, fractions=(0.5,))
    assert build(data) == build(data)
    assert build(loads(dumps(data))) == build(data)


def test_effects_are_differences_from_random_and_between_the_ends():
    data = small(seeds=3)
    by_column = {e.column: e for e in effects(data, TRAIT)}
    found = by_column["influence_function.contrast"]

    def mean(kind: str, column: str, mode: str | None, f: float, seed: int | None = None) -> float:
        return float(
            np.mean(
                [
                    a.measures[TRAIT].value
                    for a in data.arms
                    if a.kind == kind
                    and a.column == column
                    and (mode is None or a.mode == mode)
                    and a.fraction == f
                    and (seed is None or a.seed == seed)
                ]
            )
        )

    fractions = (0.25, 0.75)
    name = "influence_function.contrast"
    most = np.mean([mean("method", name, "remove_most", f) - mean("random", "random", None, f) for f in fractions])
    assert found.most == pytest.approx(most)

    def apart(f: float, seed: int) -> float:
        return mean("method", name, "remove_least", f, seed) - mean("method", name, "remove_most", f, seed)

    by_seed = [np.mean([apart(f, s) for f in fractions]) for s in range(3)]
    assert found.by_seed == pytest.approx(by_seed)
    interval = ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == "right"
    assert None in by_column  # random rankings as a control


def test_random_rankings_of_one_mode_are_chance_too():
    """As sweeps make them: one draw a seed, by remove_most. What the seeds differ by in all arms is no luck of rows."""
    data = small(seeds=2)
    drawn = {(0, 0.25): 0.40, (0, 0.75): 0.42, (1, 0.25): 0.55, (1, 0.75): 0.47}
    arms = [a for a in data.arms if a.kind != "random" or a.mode == "remove_most"]

    def with_values(random: dict, of_seed: float, of_method: float) -> RetrainData:
        found = []
        for a in arms:
            if a.kind == "random":
                value = random[a.seed, a.fraction]
            elif a.kind == "method":
                value = 0.5 + of_seed * a.seed + of_method * (1 if a.mode == "remove_least" else -1)
            else:
                value = 0.5
            found.append(replace(a, measures={TRAIT: measure(value, 0.1)}))
        return replace(data, arms=tuple(found))

    by_chance = with_values(drawn, 0.0, 0.04)
    assert luck(by_chance, TRAIT) == pytest.approx(0.10)  # mean of 0.15 and 0.05
    assert effects(by_chance, TRAIT)[0].verdict == "unclear"  # apart 0.08 in both seeds, without any spread
    assert "two random rankings came as far apart (0.10" in " ".join(outline(build(by_chance)).text.split())
    assert effects(with_values(drawn, 0.0, 0.06), TRAIT)[0].verdict == "right"
    assert luck(with_values(drawn, 0.1, 0.04), TRAIT) == pytest.approx(0.0)
    one = replace(data, arms=tuple(a for a in arms if a.seed in (0, None)))
    assert luck(one, TRAIT) is None


def test_more_of_a_capability_is_better_wherever_it_stands():
    data = small(capability=True)
    page = outline(build(replace(data, trait=ABLE, capability=LOSS))).text
    assert "(more is better)" in page
    assert "its line falls" not in page
    assert "above zero is right" not in page


def test_a_score_of_the_wrong_sign_is_told():
    data = small(columns={"influence_function.contrast": -1.0}, seeds=3)
    assert effects(data, TRAIT)[0].verdict == "wrong"
    assert "wrong way" in outline(build(data)).text


def test_modes_that_keep_are_placed_by_what_they_remove():
    data = small(modes=("keep_least", "keep_most"), seeds=3)
    removed = {g.removed for g in groups(data, TRAIT) if g.kind == "method" and g.fraction == 0.25}
    assert removed == {0.75}
    assert {e.column: e.verdict for e in effects(data, TRAIT)}["influence_function.contrast"] == "right"
    assert "only the lowest scores kept" in build(data)


def test_one_seed_has_no_interval_and_says_so():
    text = outline(build(small(seeds=1))).text
    assert "Warning. One seed" in text
    assert "the curves show what happened" in text


def test_few_seeds_are_called_few():
    assert "the mean of 2 seeds" in outline(build(small())).text
    assert "That is few" in outline(build(small())).text


def test_one_share_and_no_capability():
    out = outline(build(small(fractions=(0.5,))))
    assert not {"pareto", "others", "losses"} & set(out.ids)
    assert "curves" in out.ids


def test_a_whole_page_has_every_section(page):
    assert {"curves", "effects", "pareto", "others", "agreement", "labels", "table", "losses", "notes"} <= set(
        outline(page).ids
    )


def test_failed_arms_are_listed_and_drawn_nowhere():
    data = small()
    name = "influence_function.contrast.remove_most.0.25.0"
    broken = changed(data, **{name: {"failed": "<b>no</b> memory", "measures": {}}})
    out = outline(build(broken))
    assert f"1 of {len(data.arms)} arms failed and is in no curve" in out.text
    assert "<b>no</b> memory" in out.text
    group = next(
        g for g in groups(broken, TRAIT) if g.mode == "remove_most" and g.fraction == 0.25 and g.column in name
    )
    assert len(group.values) == 1
    # The share that one seed lacks is compared for neither.
    whole = next(e for e in effects(data, TRAIT) if e.column and e.column in name)
    rest = next(e for e in effects(broken, TRAIT) if e.column and e.column in name)
    assert len(rest.by_seed) == 2
    assert rest.by_seed != whole.by_seed


def test_missing_values_are_counted():
    data = small()
    gone = {TRAIT: Measure(0.4, 0.3, 0.5, 100, 100)}
    text = outline(build(changed(data, random={"measures": gone}))).text
    assert "at worst 50% of an arm's" in text
    none = {TRAIT: Measure(None, None, None, 0, 200)}
    empty = replace(data, arms=tuple(replace(a, measures=none) for a in data.arms))
    text = outline(build(empty)).text
    assert "No arm of a method has a value of this measure" in text
    assert "No random ranking was trained" in text
    assert "Nothing can be said of" in text


def test_a_sweep_without_arms_has_a_page():
    outline(build(replace(small(), arms=(), spearman=(), rankings={}, top={})))


def test_without_a_measure_of_the_trait_no_score_is_judged():
    text = outline(build(replace(small(capability=True), trait=LOSS, capability=None))).text
    assert "judges no score" in text
    assert "right way" not in text


def test_foreign_text_is_escaped():
    bad = "<img src=x>\u202e"
    data = small(columns={bad: 1.0, "b": 0.0}, seeds=1, fractions=(0.5,))
    metrics = {k: replace(m, title=bad + k) for k, m in data.metrics.items()}
    page = build(replace(data, title=bad, metrics=metrics, notes=(bad,), settings=((bad, bad),), positive_label=bad))
    assert "img" not in outline(page).elements
    assert "\u202e" not in page


def test_unknown_correlations_are_dashes():
    data = small(seeds=1, fractions=(0.5,))
    text = outline(build(replace(data, spearman=((1.0, None), (None, 1.0))))).text
    assert "1.00–" in text


def test_short_names_tell_columns_apart():
    long = tuple(f"concept_influence.{'very_' * 9}long_{i}.contrast.L3.last_prompt_token" for i in range(3))
    found = labels((*long, "bm25", "vector_filter.a.L1", "vector_filter.b.L1"))
    assert len(set(found.values())) == len(found)
    assert max(map(len, found.values())) <= 28
    assert found["bm25"] == "bm25"
    assert found["vector_filter.b.L1"] == "vector filter b"


def test_the_front_holds_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in np.round(rng.random((40, 2)), 1)]
    kept = front(points, (1, -1))
    for i, (x, y) in enumerate(points):
        beaten = any(a >= x and b <= y and (a > x or b < y) for a, b in points)
        assert (i in kept) is not beaten
    assert [points[i][0] for i in kept] == sorted(points[i][0] for i in kept)


def test_names_at_line_ends_do_not_overlap():
    places = spread([5.0, 6.0, 7.0, 60.0, 99.0, 99.5], 13.0, 100.0)
    assert min(np.diff(places)) >= 13.0 - 1e-9
    assert places[0] >= 0
    assert places[-1] <= 100
    assert spread([10.0, 50.0], 13.0, 100.0) == [10.0, 50.0]
    assert spread([], 13.0, 100.0) == []


def test_looks_differ():
    assert len({Look.of(i) for i in range(36)}) == 36


def test_the_table_has_a_row_for_every_arm_and_metric():
    data = changed(small(), base={"measures": {}, "failed": "gone"})
    rows = table(data)
    assert len({r["arm"] for r in rows}) == len(data.arms)
    assert [r["metric"] for r in rows if r["arm"] == "base"] == [None]
    full = [r for r in rows if r["arm"] == "full.0"]
    assert {r["metric"] for r in full} == set(data.metrics)
    assert full[0]["removed"] == 0.0


def test_data_that_do_not_fit_are_refused():
    data = small(seeds=1, fractions=(0.5,))
    arm = next(a for a in data.arms if a.kind == "method")
    for broken, message in (
        ({"trait": "answer_pairs.preferense"}, "did you mean"),
        ({"arms": (arm, arm)}, "two arms"),
        ({"arms": (replace(arm, column="x"),)}, "not one of the sweep's columns"),
        ({"arms": (replace(arm, mode="remove"),)}, "unknown"),
        ({"arms": (replace(arm, mode=None),)}, "no mode"),
        ({"arms": (replace(arm, fraction=1.0),)}, "between 0 and 1"),
        ({"arms": (replace(arm, measures={"x": arm.measures[TRAIT]}),)}, "measure 'x'"),
        ({"spearman": ((1.0,),)}, "1 × 1"),
        ({"rankings": {"x": data.rankings[arm.column]}}, "'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(data, **broken)
    with pytest.raises(ConfigError, match=r"sweep\.json is not the report"):
        loads('{"title": 1}', "sweep.json")


def test_values_that_are_not_finite_are_no_values():
    arm = ArmView("a", "base", measures={ABLE: Measure(math.inf, None, None, 3, 0)})
    assert small(capability=True).value(arm, ABLE) is None


def test_write_is_whole_or_an_error(tmp_path):
    data = small(seeds=1, fractions=(0.5,))
    write(str(tmp_path / "retrain.html"), data)
    assert (tmp_path / "retrain.html").read_text(encoding="utf-8") == build(data)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write(str(tmp_path / "file" / "retrain.html"), data)


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(tmp_path, width, dark):
    path = tmp_path / "retrain.html"
    path.write_text(build(sweep(COLUMNS, fractions=(0.25, 0.75), seeds=2)), encoding="utf-8")
    scripts = {"open": OPEN_ALL, "out": STICKING_OUT, "pale": PALE, "width": "document.documentElement.scrollWidth"}
    seen = browser.look(path, scripts, width=width, dark=dark)
    assert seen["out"] == []
    assert seen["width"] <= width
    assert seen["pale"] == []
    assert seen["complaints"] == []
