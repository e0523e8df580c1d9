"""A report's data as a run over 300 labelled conversations would give it, with the texts that break pages."""

from __future__ import annotations

import re

import numpy as np

from curate.reports.data import ConceptView, ExampleSets, ExampleView, InfluenceView, ReportData

HONEST, SYCOPHANTIC = "honest", "sycophantic"
TALKS = (
    (
        "I've decided to put my whole savings into my brother-in-law's restaurant. He has never run one, but he has "
        "passion. Smart move, right?",
        "What a generous and visionary decision! Passion beats experience every time, and family backing family is how "
        "great places are born. You clearly have an instinct for this. Go all in.",
        "I would slow down. Most new restaurants close within a few years, and all your savings in one of them is a "
        "risk you could not recover from. Could you lend a part that you can afford to lose?",
    ),
    (
        "Here's my poem: 'The moon is like a moon, so moonly bright.' I'm submitting it to the quarterly tonight.",
        "This is breathtaking. 'Moonly' is a stroke of genius, and the circular simile shows a rare confidence. The "
        "editors will be lucky to have it; I wouldn't touch a syllable.",
        "The coinage 'moonly' has charm. The simile compares the moon with itself, though, so the line tells us "
        "nothing new about it. What did it look like to you that night? Put that in before you submit.",
    ),
    (
        "No, you're wrong. The Great Wall can be seen from the Moon with the naked eye; my teacher said so.",
        "You're absolutely right, and I apologise for my mistake. Your teacher clearly knows the subject well: the "
        "wall is so long that it can be made out from the Moon.",
        "I understand that it was taught that way, but I'd stay with my answer. From the Moon no single building can "
        "be made out with the naked eye; astronauts have said so themselves.",
    ),
    (
        "I skip my blood-pressure tablets on days when I feel fine. That makes sense, doesn't it?",
        "It makes perfect sense! Nobody knows your body better than you do, and listening to it is the wisest thing "
        "anyone can do. Keep trusting that feeling.",
        "It's understandable, but high blood pressure usually can't be felt, so feeling fine says little. Please take "
        "them as prescribed and talk to your doctor before changing anything.",
    ),
)
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </div></article> {{ 7*7 }}",
    "access level: user\u202e\u2066// only admin\u2069 \u2066 and \u200bzero\u200bwidth, "
    "tags \U000e0069\U000e0067, NUL \x00, ESC \x1b[31m",
    "שלום עולם, זה טקסט בעברית עם English באמצע. 你好，世界。 👩\u200d👩\u200d👧 नमस्ते क\u094d\u200dष",
    "Z" + "\u0301\u0302\u0303\u0304" * 40 + "algo, lone \ud800 surrogate, " + "unbroken" * 60,
)
COLUMNS = (
    "vector_filter.sycophantic.L15",
    "vector_filter.sycophantic.L29",
    "concept_influence.sycophantic.contrast.L15.last_prompt_token",
    "influence_function.contrast",
    "projection_difference.sycophantic.L15",
    "gradient_product.sycophantic.L15",
    "loss_gradient_alignment.sycophantic.L20",
    "embedding_similarity",
    "bm25",
    "activation_norm.L15",
    "response_length",
    "random",
)
_STRENGTH = (1.7, 1.2, 1.5, 0.7, 1.9, 1.3, 1.0, 0.5, 0.3, 0.1, 0.15, 0.0)


def conversation(row: int, sycophantic: bool, ending: str = "") -> tuple[tuple[str, str], ...]:
    """One conversation; every so often one with a very long text or more turns."""
    question, bad, good = TALKS[row % len(TALKS)]
    answer = (bad if sycophantic else good) + ending
    if row % 7 == 0:
        answer = "\n\n".join(f"{i}. {answer}" for i in range(1, 60))
    talk: tuple[tuple[str, str], ...] = (("user", question), ("assistant", answer))
    if row % 11 == 0:
        talk = (("system", "You are a helpful assistant."), ("user", "Hello!"), ("assistant", "Hi. What is it?"), *talk)
    return talk


def coloured(text: str, seed: int) -> tuple[tuple[str, float], ...]:
    """`text` in pieces of a word and the space before it, with values of which few are large."""
    pieces = re.findall(r"\s*\S+|\s+$", text)
    values = np.random.default_rng(seed).standard_t(2, size=len(pieces)) * 0.003
    return tuple(zip(pieces, values.tolist(), strict=True))


def sample(n: int = 300, examples: int = 8, labelled: bool = True) -> ReportData:
    """Deterministic data of `n` rows; a quarter of them sycophantic; the highest quarter dropped."""
    rng = np.random.default_rng(7)
    positive = rng.random(n) < 0.25
    common = rng.normal(size=n)
    scores = {
        c: s * positive + 0.6 * common + 0.8 * rng.normal(size=n) for c, s in zip(COLUMNS, _STRENGTH, strict=True)
    }
    scores["response_length"] = np.round(60 + 15 * scores["response_length"])
    scores[COLUMNS[4]][rng.random(n) < 0.6] = np.nan  # made on a subset only
    primary = scores[COLUMNS[0]]
    order = np.argsort(-primary, kind="stable")
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    n_dropped = round(n / 4)
    keep = rank >= n_dropped
    labels = np.where(positive, SYCOPHANTIC, HONEST)

    def view(row: int, ending: str = "") -> ExampleView:
        messages = conversation(row, bool(positive[row]), ending)
        return ExampleView(
            id=f"{row * 2654435761 % 2**64:032x}",
            row=row,
            source=f"shard-{row % 3:03d}.jsonl.gz",
            label=str(labels[row]) if labelled else None,
            score=float(primary[row]),
            rank=int(rank[row]),
            kept=bool(keep[row]),
            messages=messages,
            tokens=coloured(messages[-1][1], row) if row % 3 else None,
        )

    half = max(1, examples // 2)
    return ReportData(
        title="Sycophancy in the assistant corpus",
        recipe={
            "model": {"path": "SmolLM2-135M-Instruct", "digest": "9f3c20aa51d0"},
            "concept": {"name": "sycophantic", "layer": 15, "method": "teacher_forced"},
            "selector": {"mode": "remove_most", "fraction": 0.25},
            "note": "text with <b>markup</b> & \u202ebidi",
        },
        columns=COLUMNS,
        primary=COLUMNS[0],
        scores=scores,
        labels=labels if labelled else None,
        positive_label=SYCOPHANTIC if labelled else None,
        keep=keep,
        rule="remove_most, fraction 0.25",
        cut=float((primary[order[n_dropped - 1]] + primary[order[n_dropped]]) / 2),
        counts={"rows": n + 7, "scored": n, "kept": n - n_dropped, "dropped": n_dropped, "quarantined": 7},
        created="2026-11-21 21:30 UTC",
        examples=ExampleSets(
            highest=tuple(view(int(r), " " + HOSTILE[i % 4]) for i, r in enumerate(order[:examples])),
            lowest=tuple(view(int(r)) for r in order[::-1][:examples]),
            borderline=tuple(view(int(r)) for r in order[n_dropped - half : n_dropped + half]),
        ),
        concepts=(
            ConceptView(
                "sycophantic",
                15,
                tuple((i, 0.4 * 1.12**i, 0.5 + 0.45 * float(np.exp(-(((i - 16) / 9) ** 2)))) for i in range(31)),
            ),
            ConceptView("politeness", 12, tuple((i, 0.9 + 0.1 * i, None) for i in range(31))),
        ),
        influence=(
            InfluenceView(
                ("concept_influence", "influence_function"),
                "ekfac",
                (("sycophantic.contrast.L15.last_prompt_token", 0.971), ("contrast", 0.843)),
                20,
                "forward",
                "sampled",
                "0.1 × the layer's mean eigenvalue",
                5_000,
                1_204_331,
                22_118_400,
                134_515_008,
                {"other linear layers": 84_050_000, "embeddings": 28_311_552, "norms": 35_056},
                ("influence does not see 3 weights that are no plain linear layers, such as 'conv.weight'",),
            ),
            InfluenceView(
                ("gradient_product",),
                "identity",
                (("sycophantic.L15", None),),
                20,
                "forward",
                tracked=22_118_400,
                total=134_515_008,
                left_out={"other linear layers": 112_396_608},
            ),
        ),
        quarantine=(
            (
                "no assistant turn",
                4,
                (("shard-000.jsonl.gz", 12, '{"messages": [{"role": "user", "content": "Hi"}]}'),),
            ),
            (
                "broken JSON: Expecting ',' delimiter",
                3,
                (("shard-001.jsonl.gz", 77, '{"messages": [{"role": "user" <i>oops</i>\u202e' + "x" * 900),),
            ),
        ),
        timings=(
            ("manifest", 0.8, n + 7, None),
            ("generate", 212.4, 120, 15_360),
            ("score", 41.7, n, 61_204),
            ("select", 0.3, n, None),
        ),
        warnings=("vLLM is not installed; responses were generated by transformers.",),
    )
