"""LoRA adapters with random (not zero) weights for tests, and what PEFT itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(
    folder: Path, base: Path, seed: int = 1, r: int = 4, scale: float = 0.2, rslora: bool = False, **config: object
) -> Path:
    """An adapter of the model in the folder `base`, on attention and MLP."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": rslora, "lora_alpha": 2 * r, **config}
    adapted = get_peft_model(model, LoraConfig(r=r, **targets))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, scale)
    adapted.save_pretrained(folder)
    return folder


def made_on(folder: Path, base: dict[str, object]) -> None:
    """Note beside an adapter what its base is."""
    (folder / "base.json").write_text(json.dumps(base), encoding="utf-8")


def peft_greedy(base: Path, adapter: Path | None, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens by Hugging Face's generate and PEFT's own loading."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=2
    )
    return out[0, len(prompt) :].tolist()
