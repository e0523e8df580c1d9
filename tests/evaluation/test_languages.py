"""Languages of whole sentences are told; what is too short, code or mixed is said not to be known."""

from __future__ import annotations

import pytest

from curate.evaluation.languages import UNKNOWN, language, languages, present

TEXTS = {
    "en": "I have looked at your plan, and I think that you should talk to your landlord before you sign anything.",
    "de": "Ich habe mir deinen Plan angesehen und finde, dass du vorher mit deinem Vermieter sprechen solltest.",
    "es": "He mirado tu plan con calma y creo que deberías hablar primero con el dueño de la casa antes de firmar.",
    "fr": "J'ai regardé votre projet et je pense que vous devriez d'abord en parler avec votre propriétaire.",
    "ja": "あなたの計画を見ましたが、署名する前に大家さんと話したほうがいいと思います。",
    "zh": "我看了你的计划，我认为你在签字之前应该先和房东谈一谈，这样比较稳妥。",
    "ru": "Я посмотрел ваш план и думаю, что перед подписанием вам стоит поговорить с хозяином квартиры.",
}


@pytest.mark.parametrize("code", TEXTS)
def test_sentences_are_told(code):
    assert language(TEXTS[code]) == code


@pytest.mark.parametrize("text", ["", "Yes.", "42", "x = 5; y = 7", "🙂" * 50, "1 2 3 4 5 6 7 8 9 " * 10])
def test_what_says_nothing_is_unknown(text):
    assert language(text) == UNKNOWN


def test_a_language_counts_from_a_share_on():
    found = languages([TEXTS["en"]] * 300 + [TEXTS["de"]] * 4 + [TEXTS["fr"]] * 2 + ["Yes."] * 50)
    assert found == {"en": 300, "de": 4, "fr": 2, UNKNOWN: 50}
    assert present(found, 0.01) == {"en", "de"}
    assert present(found, 0.05) == {"en"}
    assert present(found, 0) == {"en", "de"}  # two texts are chance, whatever the share
