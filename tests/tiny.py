"""Tiny random models and a tiny tokenizer, made in-process: no files, no network, milliseconds.

Everything is float32 on the CPU and a function of its arguments alone, so that two tests that ask for the same model
hold the same weights.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

# Before torch is imported: models this small only lose by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
_TEXT = (
    "You are a helpful tiny model. The user asks and the assistant answers.",
    "system user assistant What do you think of my plan? I think that it is a good plan, and here is why.",
    "Yes, you are absolutely right! No, that is not correct. The capital of France is Paris.",
    "Add two and three and you have five. Water boils at one hundred degrees. Thank you for the question.",
)
KINDS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "neox", "opt", "falcon", "phi", "phi3",
)  # fmt: skip


@functools.cache
def _backend(vocab: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML, vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab` entries: any text round-trips. ChatML template with a default system prompt."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocab)),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        model_max_length=2048,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _config(kind: str, layers: int, d: int, vocab: int) -> PretrainedConfig:
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
    common = {
        "vocab_size": vocab,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        **ends,
    }
    gated = {**common, "intermediate_size": 2 * d, "num_key_value_heads": 2}
    match kind:
        case "llama":
            return LlamaConfig(**gated, tie_word_embeddings=False)
        case "qwen2":
            return Qwen2Config(**gated)
        case "qwen3":
            return Qwen3Config(**gated, head_dim=d // 4)
        case "mistral":
            return MistralConfig(**gated, sliding_window=None)
        case "gemma":
            return GemmaConfig(**gated, head_dim=d // 4)
        case "gemma2":
            return Gemma2Config(**gated, head_dim=d // 4, sliding_window=64)
        case "gpt2":
            return GPT2Config(
                vocab_size=vocab, n_embd=d, n_layer=layers, n_head=4, n_positions=2048, resid_pdrop=0, **ends
            )
        case "neox":
            return GPTNeoXConfig(**common, intermediate_size=2 * d)
        case "opt":
            return OPTConfig(**common, ffn_dim=2 * d, word_embed_proj_dim=d)
        case "falcon":
            return FalconConfig(**common, new_decoder_architecture=False, alibi=False)
        case "phi":
            return PhiConfig(**common, intermediate_size=2 * d)
        case "phi3":
            return Phi3Config(**gated)
    raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")


def tiny_model(
    kind: str = "llama", layers: int = 3, d: int = 32, seed: int = 0, vocab: int | None = None, scale: float = 0.1
) -> PreTrainedModel:
    """A random float32 causal LM in eval mode, no gradients. `scale` is the spread of every weight matrix.

    The usual initial spread of 0.02 leaves so small a model almost linear, and hides mistakes.
    """
    config = _config(kind, layers, d, vocab or len(tiny_tokenizer()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0.0, scale)
    return model.eval().requires_grad_(False)


def save_tiny(path: str | Path, chat_template: str | None = CHATML, **model: object) -> Path:
    """Write tiny_model(**model) and tiny_tokenizer() to the folder `path`, in Hugging Face layout."""
    path = Path(path)
    tiny_model(**model).save_pretrained(path)  # type: ignore[arg-type]
    tiny_tokenizer(chat_template).save_pretrained(path)
    return path
