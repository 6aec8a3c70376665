"""A model's answers to the judge's questions, turn after turn, greedy, through its own chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_gap.errors import UserError
from capacity_gap.evaluate.judge import Question, read_answers
from capacity_gap.fingerprint import files_digest, fingerprint

MAX_NEW_TOKENS = 512


def answer_all(folder: Path, questions: Sequence[Question], out: Path) -> dict[str, list[str]]:
    """Answers of the model in `folder`, kept in `out/answers-<digest>.jsonl` and read from there the next time.

    Raises:
        UserError: there is no such folder, or its tokenizer has no chat template.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a model folder (no config.json) nor an answers file (.jsonl).")
    content = files_digest(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")))
    asked = [[q.id, *q.turns] for q in questions]
    file = out / f"answers-{fingerprint({'model': content, 'questions': asked, 'tokens': MAX_NEW_TOKENS})}.jsonl"
    if not file.exists():
        model, tokenizer = _load(folder)
        rows = [{"id": q.id, "answers": answer(model, tokenizer, q.turns)} for q in questions]
        beside = file.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        beside.rename(file)
    return read_answers(file)


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder} has a tokenizer without a chat template, so it is no instructed model. Instruct it first, or "
            'give its answers as .jsonl: {"id", "answers": [one a turn]}.'
        )
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval(), tokenizer


def answer(model: Any, tokenizer: Any, turns: Sequence[str]) -> list[str]:
    """One answer a turn; each turn sees those before it."""
    import torch

    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        given = given.to(model.device)
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": text})
    return [m["content"] for m in messages if m["role"] == "assistant"]
