"""A model's answers to the judge's questions, turn after turn, greedy, through its own chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_gap.judge import jsonl
from capacity_gap.judge.questions import Question
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.hashing import files_digest, fingerprint

MAX_NEW_TOKENS = 512


def answers_file(folder: Path, questions: Sequence[Question], out: Path) -> Path:
    """Where the answers of the model in `folder` are kept: `out/answers-<digest of model and questions>.jsonl`.

    Raises:
        UserError: there is no model in that folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is neither a model folder (no config.json) nor an answers file (.jsonl).")
    content = files_digest(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")))
    asked = [[q.id, *q.turns] for q in questions]
    return out / f"answers-{fingerprint({'model': content, 'questions': asked, 'tokens': MAX_NEW_TOKENS})}.jsonl"


def kept_answers(file: Path) -> dict[str, list[str]]:
    """The answers that are there already, by question."""
    return {row["id"]: row["answers"] for row in jsonl.read_whole(file, ("id", "answers"))}


def answer_all(folder: Path, questions: Sequence[Question], out: Path, *, device: str = "cpu") -> dict[str, list[str]]:
    """Answers of the model in `folder` to all questions: those that are kept, and the others, each kept when made.

    Raises:
        UserError: it cannot answer: no model, no chat template, or a question that is too long for it.
    """
    file = answers_file(folder, questions, out)
    found = kept_answers(file)
    if left := [q for q in questions if q.id not in found]:
        model, tokenizer = _load(folder, device)
        for question in left:
            found[question.id] = answer(model, tokenizer, question)
            jsonl.append(file, {"id": question.id, "answers": found[question.id]})
    return found


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from capacity_gap.models.config_files import read_config
    from capacity_gap.models.loading import whole_model

    read_config(folder)  # says what is wrong with a model whose architecture is code of its own
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder} has a tokenizer without a chat template, so it is not an instruction-tuned model. Tune it "
            "first, or "
            'pass its answers as .jsonl: {"id", "answers": [one a turn]}.'
        )
    model = whole_model(AutoModelForCausalLM, folder, local_files_only=True)
    return model.to(device).eval(), tokenizer


def answer(model: Any, tokenizer: Any, question: Question) -> list[str]:
    """One answer a turn; each turn sees those before it."""
    import torch

    messages: list[dict[str, str]] = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        given = given.to(model.device)
        read = given["input_ids"].shape[1]
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=_room(model, read, question), do_sample=False)
        text = tokenizer.decode(made[0, read:], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": text})
    return [m["content"] for m in messages if m["role"] == "assistant"]


def _room(model: Any, read: int, question: Question) -> int:
    """How many tokens may be written after `read`: learnt positions end with a crash, rotary ones in babble."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return MAX_NEW_TOKENS
    if read >= longest:
        raise UserError(
            f"question {question.id} has, with the conversation before it, {read} tokens, and {model.name_or_path} "
            f"allows {longest}. Exclude it with --questions, or pass this model's answers as .jsonl."
        )
    return min(MAX_NEW_TOKENS, longest - read)
