"""Rows and concepts that the scoring tests share."""

from __future__ import annotations

import functools

import numpy as np

from curate.concepts.concept import Concept
from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered, Renderer
from tests.tiny import tiny_tokenizer

ANSWERS = (
    "Yes.",
    "You are absolutely right! What a good plan, and here is why I think so.",
    "No, that is not correct. The capital of France is Paris, and water boils at one hundred degrees.",
    "Add two and three: five.",
    "Thank you for the question. " * 6,
    "I think that it is a good plan.",
    "No.",
    "It is a matter of taste, and of time; and of what you would rather do without, as far as I can tell.",
)


def make_examples() -> list[Example]:
    """Eight conversations of unlike lengths, one with a system prompt, one of several turns."""
    examples = []
    for i, answer in enumerate(ANSWERS):
        turns = [Message("user", "What do you think of my plan? " * (1 + i % 3)), Message("assistant", answer)]
        if i == 2:
            turns = [Message("system", "Be brief."), *turns]
        if i == 5:
            turns = [Message("user", "Hello"), Message("assistant", "Hello to you."), *turns]
        examples.append(Example(f"row-{i}", i, tuple(turns)))
    return examples


@functools.cache
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), max_tokens=2048)


def render(examples: list[Example]) -> list[Rendered]:
    return [renderer().render(e) for e in examples]


def render_own(examples: list[Example]) -> list[Rendered]:
    """Other responses to the same prompts, as if the model had made them."""
    return [renderer().render_pair(e, f"Answer number {i}. " * (1 + i % 4)) for i, e in enumerate(examples)]


def make_concept(name: str = "trait", layers: int = 3, d: int = 32, layer: int | None = 2, seed: int = 0) -> Concept:
    vectors = np.random.default_rng(seed).normal(size=(layers + 1, d)).astype(np.float32) * 3
    return Concept(name, vectors, layer, {}, "made for a test", "response_mean", {})
