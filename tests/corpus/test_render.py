"""Response spans on many chat templates, with tokens that merge at the border, and rows that cannot be rendered."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from curate.corpus.example import Example, Message
from curate.corpus.render import Renderer, tokenizer_digest
from curate.errors import BadRow, ConfigError, ModelError
from tests.tiny import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Without special tokens: the end of turn is plain text.
VICUNA = (
    "A chat between a user and an assistant. {% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Moves reasoning out of the text, as Qwen3 does.
THINK = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{% set parts = m['content'].split('</think>') %}{% set last = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].replace('<think>', '').strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + last + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# template, its special tokens, does it trim, text of the end of turn
TEMPLATES = {
    "chatml": (CHATML, [], False, "<|im_end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], True, "<|eot_id|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], True, "<end_of_turn>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]", "</s>"], False, "</s>"),
    "zephyr": (ZEPHYR, ["</s>"], False, "</s>"),
    "phi3": (PHI3, ["<|end|>", "<|user|>", "<|assistant|>"], False, "<|end|>"),
    "vicuna": (VICUNA, [], False, "\n\n"),
    "think": (THINK, [], False, "<|im_end|>"),
}


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    template, special, _, _ = TEMPLATES[name]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def example(response: str, prompt: str = "What is 2 + 2?", *before: Message) -> Example:
    return Example("id", 0, (*before, Message("user", prompt), Message("assistant", response)))


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


RESPONSES = [
    "It is four.",
    "  It is four, with space around.\n ",
    "What is 2 + 2?",  # the prompt's own words
    "assistant",  # the template's own words
    "a",
    "多くの言葉 — é 🙂🙂",
    "line\n\n<b>html</b> {{ jinja }} {% raw %}\n\ttab",
    "\u202ebidi and \x07 control",
]


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_span_is_the_response(name, response):
    tokenizer = tokenizer_for(name)
    _, _, trims, end = TEMPLATES[name]
    row = Renderer(tokenizer, 2000).render(example(response))
    span = decoded(tokenizer, row.input_ids[row.start : row.stop])
    wanted = response.strip() if trims else response
    # A border token may bring along the template's white space, never any other character.
    assert span.strip() == wanted.strip()
    assert wanted in span
    tail = decoded(tokenizer, row.input_ids[row.stop : row.end])
    assert tail == end or (name == "vicuna" and end.endswith(tail))
    # Oracle: what transformers itself tokenises.
    turns = [{"role": m.role, "content": m.content} for m in example(response).messages]
    assert row.input_ids == tokenizer.apply_chat_template(turns)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns_do_not_count(name):
    tokenizer = tokenizer_for(name)
    before = (Message("user", "Hello"), Message("assistant", "It is four."))
    row = Renderer(tokenizer, 2000).render(example("It is four.", "And now?", *before))
    assert decoded(tokenizer, row.input_ids[row.start : row.stop]).strip() == "It is four."
    assert decoded(tokenizer, row.input_ids[: row.start]).count("It is four.") == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "gemma", "phi3"])
def test_prompt_is_the_beginning_of_the_conversation(name):
    renderer = Renderer(tokenizer_for(name), 2000)
    row = renderer.render(example("It is four."))
    assert renderer.prompt_ids(example("It is four.")) == row.input_ids[: row.start]


def test_default_system_prompt_is_not_response():
    tokenizer = tiny_tokenizer()
    row = Renderer(tokenizer, 2000).render(example("You are a helpful tiny model."))
    assert decoded(tokenizer, row.input_ids).count("You are a helpful tiny model.") == 2
    assert row.start > len(row.input_ids) // 2


def test_reasoning_that_the_template_moves():
    tokenizer = tokenizer_for("think")
    row = Renderer(tokenizer, 2000).render(example("<think>two and two</think>\n\nFour."))
    assert decoded(tokenizer, row.input_ids[row.start : row.stop]) == "two and two\n</think>\n\nFour."


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """BPE that merges across words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["T: Yes.\n\nT: Yes.\n\n"] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


@pytest.mark.parametrize("offsets", [True, False])
def test_tokens_that_merge_at_the_border_belong_to_the_response(offsets, monkeypatch):
    template = "{% for m in messages %}{{ m['role'][0] | upper + 'T: ' + m['content'] + '\n\n' }}{% endfor %}"
    tokenizer = merging_tokenizer(template)
    if not offsets:
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    row = Renderer(tokenizer, 2000).render(example("Yes."))
    text = decoded(tokenizer, row.input_ids)
    assert text.endswith("AT: Yes.\n\n")
    span = decoded(tokenizer, row.input_ids[row.start : row.stop])
    assert "Yes." in span
    assert span != "Yes."
    # Without its first or last token the span no longer holds the whole response.
    assert "Yes." not in decoded(tokenizer, row.input_ids[row.start + 1 : row.stop])
    assert "Yes." not in decoded(tokenizer, row.input_ids[row.start : row.stop - 1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_offsets_the_span_is_the_same(name, monkeypatch):
    tokenizer = tokenizer_for(name)
    want = [Renderer(tokenizer, 2000).render(example(r)) for r in RESPONSES]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    got = [Renderer(tokenizer, 2000).render(example(r)) for r in RESPONSES]
    if name != "vicuna":  # plain text at the border: the outside-in rule may take one token more
        assert got == want
    for a, b in zip(got, want, strict=True):
        assert a.start <= b.start < b.stop <= a.stop


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.text(st.characters(codec="utf-8"), min_size=1), st.text(min_size=1))
def test_any_text(name, response, prompt):
    tokenizer = tokenizer_for(name)
    try:
        response.encode(), prompt.encode()
    except UnicodeEncodeError:
        return
    if not response.strip():
        return
    row = Renderer(tokenizer, 2000).render(example(response, prompt))
    assert 0 < row.start < row.stop <= row.end <= len(row.input_ids)
    span = decoded(tokenizer, row.input_ids[row.start : row.stop])
    assert response.strip() in span


def test_mark_in_the_text_is_no_trap():
    tokenizer = tiny_tokenizer()
    trap = "\ue000curate\ue001"
    row = Renderer(tokenizer, 2000).render(example(f"x {trap} y", f"{trap} what?"))
    assert decoded(tokenizer, row.input_ids[row.start : row.stop]) == f"x {trap} y"


def test_render_pair_swaps_the_response_only():
    renderer = Renderer(tiny_tokenizer(), 2000)
    given, other = renderer.render(example("It is four.")), renderer.render_pair(example("It is four."), "No idea.")
    assert other.start == given.start
    assert other.input_ids[: given.start] == given.input_ids[: given.start]
    assert decoded(renderer.tokenizer, other.input_ids[other.start : other.stop]) == "No idea."
    with pytest.raises(BadRow, match="generated response is empty"):
        renderer.render_pair(example("It is four."), " \n")


def test_refused_conversations():
    renderer = Renderer(tokenizer_for("gemma"), 2000)
    with pytest.raises(BadRow, match="refuses the conversation: System role not supported"):
        renderer.render(example("Four.", "2 + 2?", Message("system", "Be kind.")))
    silent = Renderer(tiny_tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}"), 2000)
    with pytest.raises(BadRow, match="leaves the response out"):
        silent.render(example("Four."))
    strict = Renderer(tiny_tokenizer("{% if messages | length > 1 %}{{ 1 + messages[0]['content'] }}{% endif %}"), 2000)
    with pytest.raises(BadRow, match="refuses the conversation: unsupported operand"):
        strict.render(example("Four."))
    counting = Renderer(tiny_tokenizer("{{ messages[-1]['content'] | length }}{{ messages[-1]['content'] }}"), 2000)
    with pytest.raises(BadRow, match="cannot be found"):
        counting.render(example("Four."))


def test_overlong_is_quarantined_with_both_numbers():
    renderer = Renderer(tiny_tokenizer(), 100)
    row = renderer.render(example("word " * 5))
    assert len(row.input_ids) < 100
    with pytest.raises(BadRow, match=r"over-long: \d+ tokens, the limit is 100"):
        renderer.render(example("word " * 40))
    with pytest.raises(BadRow, match=r"a prompt of .* the limit is 100"):
        renderer.prompt_ids(example("x", "word " * 40))


def test_limit_is_exact():
    renderer = Renderer(tiny_tokenizer(), 2000)
    n = len(renderer.render(example("It is four.")).input_ids)
    assert len(Renderer(tiny_tokenizer(), n).render(example("It is four.")).input_ids) == n
    with pytest.raises(BadRow, match=f"over-long: {n} tokens, the limit is {n - 1}"):
        Renderer(tiny_tokenizer(), n - 1).render(example("It is four."))


@pytest.mark.parametrize("words", ["Yes, hello there. ", "a", " ", "é🙂"])
def test_giant_rows_cost_little(words):
    renderer = Renderer(tiny_tokenizer(), 2000)
    giant = words * (2_000_000 // len(words)) + "."
    start = time.process_time()
    with pytest.raises(BadRow, match=r"over-long: 20.* characters, more than 2000 tokens"):
        renderer.render(example(giant))
    with pytest.raises(BadRow, match="over-long: a prompt"):
        renderer.prompt_ids(example("x", giant))
    assert time.process_time() - start < 1  # all of it would take several seconds


def test_truncated_rows_keep_their_beginning():
    tokenizer = tiny_tokenizer()
    for words in (40, 100_000):
        long = example("Yes, hello there. " * words)
        whole = Renderer(tokenizer, 10**7).render(example("Yes, hello there. " * 40))
        row = Renderer(tokenizer, 100, overlong="truncate").render(long)
        assert row.input_ids == whole.input_ids[:100]
        assert (row.start, row.stop, row.end) == (whole.start, 100, 100)
    with pytest.raises(BadRow, match="the prompt alone has"):
        Renderer(tokenizer, 100, overlong="truncate").render(example("x", "word " * 100))


def test_dates_do_not_move_the_scores():
    dated = "{{ strftime_now('%d %B %Y') }} {{ date_string }} {{ messages[-1]['content'] }}"
    renderer = Renderer(tiny_tokenizer(dated), 200)
    assert decoded(renderer.tokenizer, renderer.render(example("x")).input_ids) == "26 July 2024 26 Jul 2024 x"


def test_constructor_refusals():
    with pytest.raises(ModelError, match=r"no chat template.*model\.chat_template"):
        Renderer(tiny_tokenizer(None), 100)
    with pytest.raises(ModelError, match=r"not valid Jinja \(line 1\)"):
        Renderer(tiny_tokenizer("{% for m in %}"), 100)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        Renderer(tiny_tokenizer(), 0)
    with pytest.raises(ConfigError, match="'quarantine' or 'truncate'"):
        Renderer(tiny_tokenizer(), 10, overlong="drop")


def test_digest_is_of_the_content(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again(["some text", "more"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer) == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(tiny_tokenizer(ZEPHYR)) != tokenizer_digest(tokenizer)
    assert tokenizer_digest(tiny_tokenizer(vocab=310)) != tokenizer_digest(tokenizer)
