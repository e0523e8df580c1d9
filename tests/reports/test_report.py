"""The page as text: what it says, that it is safe and self-contained, and that odd data do not break it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from curate.errors import ConfigError, StorageError
from curate.reports.data import ExampleSets, ExampleView, InfluenceView
from curate.reports.report import build, write
from curate.reports.view import dropped_above
from tests.reports.sample import SYCOPHANTIC, sample

VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Checks nesting; collects elements, identifiers, links and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def outline(page: str) -> Outline:
    page.encode("utf-8")
    out = Outline()
    out.feed(page)
    out.close()
    assert out.open == []
    assert len(out.ids) == len(set(out.ids))
    out.text = re.sub(r"\s+", " ", out.text)
    return out


@pytest.fixture(scope="module")
def page() -> str:
    return build(sample())


def test_the_page_needs_and_runs_nothing_else(page):
    out = outline(page)
    assert not out.elements & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "image"}
    assert all(link.startswith("#") for link in out.links)
    assert {link[1:] for link in out.links} <= set(out.ids)
    assert not [a for a in out.attributes if a.startswith("on")]
    assert "default-src 'none'" in page
    assert "url(http" not in page
    assert "@import" not in page


def test_it_says_what_was_done_and_what_the_score_means(page):
    data = sample()
    text = outline(page).text
    positive = data.labels == SYCOPHANTIC
    hit = int((positive & ~data.keep).sum())
    assert "Of 307 rows, 300 were scored for sycophantic" in text
    assert f"{hit} of 75" in text
    assert f"that is {100 * hit / positive.sum():.1f}% of all rows so labelled" in text
    assert "A higher score means more of the trait" in text
    assert "The score finds labelled rows clearly better than chance." in text
    assert "vLLM is not installed" in text
    assert "layer 15" in text
    for column in data.columns:
        assert column in text


def test_the_numbers_are_scikit_learns(page):
    from sklearn.metrics import average_precision_score, roc_auc_score

    data = sample()
    positive, scores = data.labels == SYCOPHANTIC, data.scores[data.primary]
    text = outline(page).text
    assert f"AUC-PR {average_precision_score(positive, scores):.3f}" in text
    assert f"ROC-AUC {roc_auc_score(positive, scores):.3f}" in text


def test_hostile_text_is_shown_and_not_obeyed(page):
    text = outline(page).text
    assert "<script>document.title='owned'</script>" in text
    assert "{{ 7*7 }}" in text
    assert "U+202E" in text
    assert "\u202e" not in page
    assert "\x00" not in page


@pytest.mark.parametrize("field", ["title", "rule", "created"])
def test_every_string_is_escaped(field):
    page = build(replace(sample(40, 1), **{field: "<img src=x>\u202e\ud800 {{ 1 }}"}))
    out = outline(page)
    assert "img" not in out.elements
    assert "<img src=x>" in out.text


def test_hostile_names_of_everything_are_escaped():
    data = sample(60, 1)
    bad = "<img src=x onerror=alert(1)>\u202e$\\frac$"
    renamed = (bad, *data.columns[1:])
    view = replace(data.examples.highest[0], id=bad, source=bad, label=bad, messages=((bad, bad), (bad, bad)))
    hostile = replace(
        data,
        columns=renamed,
        primary=bad,
        scores={**data.scores, bad: data.scores[data.primary]},
        labels=np.where(data.labels == SYCOPHANTIC, bad, "ok"),
        positive_label=bad,
        concepts=(replace(data.concepts[0], name=bad),),
        examples=ExampleSets(highest=(view,)),
        quarantine=((bad, 1, ((bad, 0, bad),)),),
        timings=((bad, 1.0, 1, 1),),
        warnings=(bad,),
        recipe={bad: bad},
        cut={bad: 1.0},
        counts={**data.counts, bad: 3},
    )
    page = build(hostile)
    assert "img" not in outline(page).elements
    assert "\u202e" not in page


def test_the_same_data_gives_the_same_page(page):
    assert build(sample()) == page


def test_without_labels_there_are_no_claims_about_them():
    text = outline(build(sample(labelled=False))).text
    assert "AUC-PR" not in text
    assert "labelled" not in text
    assert "all rows" in text


def test_labels_without_a_positive_one_are_counted_only():
    out = outline(build(replace(sample(), positive_label=None)))
    assert "AUC-PR" not in out.text
    assert "no label was named" in out.text
    assert "share dropped" in out.text


def test_one_label_alone_is_said_to_measure_nothing():
    data = sample()
    text = outline(build(replace(data, labels=np.full(300, SYCOPHANTIC)))).text
    assert "Precision and recall are not shown" in text


def test_a_score_no_better_than_chance_is_called_so():
    data = sample()
    text = outline(build(replace(data, primary="random"))).text
    assert "cannot be told from chance" in text


def test_a_score_that_points_the_wrong_way_is_called_so():
    data = sample()
    turned = {**data.scores, data.primary: -data.scores[data.primary]}
    assert "points the wrong way" in outline(build(replace(data, scores=turned))).text


def test_rows_without_label_or_score_are_left_out_and_said():
    data = sample()
    labels = data.labels.astype(object)
    labels[:30] = None
    scores = {**data.scores, data.primary: data.scores[data.primary].copy()}
    scores[data.primary][100:110] = np.nan
    text = outline(build(replace(data, labels=labels, scores=scores))).text
    assert "of 260 labelled and scored rows" in text
    assert "no label 30 rows" in text
    assert "10 rows have no such score" in text


def test_nothing_scored_at_all_still_makes_a_page():
    data = sample(20, 1)
    empty = {c: np.full(20, np.nan) for c in data.columns}
    outline(build(replace(data, scores=empty, cut=None)))


def test_a_page_of_almost_nothing():
    data = sample(2, 1)
    bare = replace(
        data,
        columns=data.columns[:1],
        examples=ExampleSets(),
        concepts=(replace(data.concepts[0], profile=(), layer=None),),
        quarantine=(),
        timings=(),
        warnings=(),
        recipe={},
    )
    text = outline(build(bare)).text
    assert "reasons were passed" in text
    assert "No layer profile was stored." in text


def test_cuts_by_group_are_listed():
    text = outline(build(replace(sample(), cut={f"g{i}": i / 7 for i in range(300)}))).text
    assert "Cuts of 300 groups" in text
    assert "100 more groups are not shown" in text


def test_many_labels_are_bounded():
    data = sample()
    labels = np.array([f"label {i} " + "x" * 5000 for i in range(300)])
    page = build(replace(data, labels=labels, positive_label=str(labels[7])))
    assert len(page) < 1_000_000
    assert "280 rarer labels are not shown" in outline(page).text


def test_dropped_rows_of_each_label_are_shown_without_labels_too():
    text = outline(build(replace(sample(labelled=False), dropped_by_label={"spam": 31}))).text
    assert "spam 31" in text


def test_long_conversations_and_texts_are_folded_and_bounded():
    turns = tuple(("user" if i % 2 == 0 else "assistant", f"turn {i} " + "long " * 20_000) for i in range(200))
    view = ExampleView("id", 0, "file", None, 1.0, 0, True, turns)
    data = replace(sample(), examples=ExampleSets(highest=(view,) * 20))
    page = build(data)
    assert len(page) < 2_000_000
    text = outline(page).text
    assert "198 earlier turns" in text
    assert "The first 190 are not shown." in text
    assert "more characters are in the corpus" in text
    assert "turn 199" in text


def test_the_cut_is_drawn_between_the_borderline_rows():
    page = build(sample())
    start = page.index('id="borderline"')
    section = page[start : page.index("</section>", start)]
    assert section.count('class="cutline"') == 1
    before, after = section.split('class="cutline"')
    assert 'badge kept"' not in before
    assert 'badge dropped"' not in after


def test_tokens_are_coloured_where_they_are_known_and_explained():
    page = build(replace(sample(), token_meaning="what each <b>token</b> says"))
    text = outline(page).text
    assert text.count("what each <b>token</b> says") == 3  # one legend a set
    views = sample().examples
    known = [v for v in (*views.highest, *views.borderline, *views.lowest) if v.tokens is not None]
    assert known
    assert re.search(r'<span class="up4" title="\+[\d.e−]+">', page)
    assert re.search(r'<span class="down\d" title="−[\d.e−]+">', page)
    bare = build(replace(sample(), examples=ExampleSets(highest=(replace(views.highest[0], tokens=None),))))
    assert 'class="tokenscale"' not in bare
    assert 'class="up' not in bare


def test_long_coloured_texts_do_not_bloat_the_page():
    tokens = tuple((" w", float(i % 97 - 48)) for i in range(100_000))
    view = replace(sample().examples.highest[0], tokens=tokens)
    page = build(replace(sample(), examples=ExampleSets(highest=(view,) * 24)))
    outline(page)
    assert len(page) < 2_000_000
    assert page.count('<span class="up') + page.count('<span class="down') < 13_000


def test_what_influence_rests_on_is_said():
    text = outline(build(sample())).text
    assert "What influence rests on" in text
    assert "22,118,400 of the model's 134,515,008 parameters are tracked" in text
    assert "other linear layers 62.5%, embeddings 21.0%, norms 0.026%." in text
    assert "influence does not see 3 weights" in text
    assert "true Fisher (labels drawn from the model)" in text
    assert "5,000 examples, 1,204,331 tokens" in text
    assert "0.1 × the layer's mean eigenvalue" in text
    assert "low rank: 84.3% of ‖s‖² kept" in text
    assert "keeps less than nine tenths of it" in text
    assert "none (H = I: gradients as they are)" in text
    assert "influence rests" not in outline(build(replace(sample(), influence=()))).text


def test_influence_of_hostile_names_is_escaped():
    bad = "<img src=x>\u202e"
    view = InfluenceView((bad,), bad, ((bad, None),), 1, bad, bad, bad, 1, 1, 1, 2, {bad: 1}, (bad,))
    page = build(replace(sample(40, 1), influence=(view,)))
    assert "img" not in outline(page).elements
    assert "\u202e" not in page


def test_the_agreement_of_any_number_of_scores():
    data = sample()
    names = tuple(f"concept_influence.{'a_rather_long_concept_name_' * 3}{i}.contrast.L{i}.cosine" for i in range(14))
    scores = {n: data.scores[c] for n, c in zip(names, (*data.columns, *data.columns[:2]), strict=True)}
    page = build(replace(data, columns=names, primary=names[0], scores=scores))
    table = page[page.index('<table class="matrix">') :]
    assert table[: table.index("</table>")].count("<td") == 14 * 14


def test_many_rows_do_not_bloat_the_page():
    data = sample(100_000, 8)
    page = build(replace(data, columns=data.columns[:3]))
    assert len(page.encode()) < 600_000


def test_which_side_was_dropped():
    scores = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    assert dropped_above(scores, np.array([True, True, True, False, False])) is True
    assert dropped_above(scores, np.array([False, True, True, True, True])) is False
    assert dropped_above(scores, np.ones(5, bool)) is None


def test_data_that_disagree_are_refused():
    data = sample(50, 1)
    with pytest.raises(ConfigError, match="49 values of 'labels'"):
        replace(data, labels=data.labels[1:])
    with pytest.raises(ConfigError, match="50 decisions but 3 values of 'random'"):
        replace(data, scores={**data.scores, "random": np.zeros(3)})
    with pytest.raises(ConfigError, match="no scores for column 'bm25'"):
        replace(data, scores={k: v for k, v in data.scores.items() if k != "bm25"})
    with pytest.raises(ConfigError, match=r"'randm'.*did you mean 'random'"):
        replace(data, primary="randm")
    with pytest.raises(ConfigError, match="lack 'kept'"):
        replace(data, counts={k: v for k, v in data.counts.items() if k != "kept"})


def test_it_is_written_whole(tmp_path):
    data = sample(50, 2)
    target = tmp_path / "run" / "report.html"
    write(str(target), data)
    assert target.read_text(encoding="utf-8") == build(data)
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write(str(tmp_path / "file" / "report.html"), sample(50, 1))
