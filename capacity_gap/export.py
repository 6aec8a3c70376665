"""A cell's model as others use it: sharded safetensors, tokenizer, and a card that says where it comes from."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.errors import UserError
from capacity_gap.records import RECORD
from capacity_gap.stage import META, Store

SHARD = "2GB"
POINTER = "published.json"
# Licences of the published checkpoints of our ladders, by the beginning of their names, as their cards say; the first
# that fits counts. And of the text that wheels bring.
LICENCES = {
    "EleutherAI/pythia": "Apache-2.0",
    "openai-community/gpt2": "MIT",
    "facebook/opt": "OPT-175B licence (non-commercial)",
    "meta-llama/Llama-2": "Llama 2 Community License",
    "mistralai/Mistral-7B": "Apache-2.0",
    "Qwen/Qwen2.5-3B": "Qwen Research License",
    "Qwen/Qwen2.5-72B": "Qwen License",
    "Qwen/Qwen2.5": "Apache-2.0",
    "botocore": "Apache-2.0",
    "sympy": "BSD-3-Clause",
    "pycantonese": "MIT; its Hong Kong Cantonese Corpus (Luke and Wong 2015): CC BY",
}


@dataclass(frozen=True)
class Lineage:
    """One finished cell and the stages that it was made from, as their folders say."""

    store: Store
    folder: Path  # of the record

    @staticmethod
    def of(store: Store, cell: str) -> "Lineage":
        """The recorded cell whose digest begins with `cell`; none, or several, is an error that lists what there is."""
        found = sorted(p.parent for p in store.root.glob(f"record/{cell.removeprefix('record/')}*/{RECORD}"))
        if len(found) != 1:
            known = sorted(p.parent.name for p in store.root.glob(f"record/*/{RECORD}"))
            shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            raise UserError(
                f"{cell} names {len(found)} recorded cells of {store.root}. Give the beginning of one digest: "
                f"{shown or 'none is recorded yet'}."
            )
        return Lineage(store, found[0])

    @cached_property
    def row(self) -> dict[str, Any]:
        """The record."""
        return json.loads((self.folder / RECORD).read_text())

    def stage(self, folder: Path) -> dict[str, Any]:
        """What a stage's folder says of it."""
        return json.loads((folder / META).read_text())

    def inputs(self, folder: Path) -> dict[str, Path]:
        """The folders that a stage was made from."""
        return {name: self.store.root / key for name, key in self.stage(folder)["inputs"].items()}

    @cached_property
    def model(self) -> Path:
        """The folder of the cell's last model."""
        made = self.inputs(self.folder)
        return next(made[name] for name in ("prefer", "instruct", "trained") if name in made)

    @cached_property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer, with the chat template if it was tuned."""
        if (self.model / "tokenizer.json").exists():
            return self.model
        return self.inputs(self.inputs(self.inputs(self.folder)["evaluate"])["tokens"])["tokenizer"]

    @cached_property
    def ancestors(self) -> dict[Path, dict[str, Any]]:
        """Every stage behind the model, itself last, each once."""
        found: dict[Path, dict[str, Any]] = {}

        def walk(folder: Path) -> None:
            if folder not in found:
                for parent in self.inputs(folder).values():
                    walk(parent)
                found[folder] = self.stage(folder)

        walk(self.model)
        return found

    @property
    def parents(self) -> Iterator[tuple[str, str]]:
        """Published checkpoints and text behind the model, each with its licence as far as it is known."""
        names = set()
        for folder, meta in self.ancestors.items():
            if (folder / POINTER).exists():
                names.add(json.loads((folder / POINTER).read_text())["repository"])
            if meta["name"] == "corpus":
                names.update(_texts(meta["config"]))
        for name in sorted(names):
            known = [licence for start, licence in LICENCES.items() if name.startswith(start)]
            yield name, known[0] if known else "see its own page or owner"


def _texts(config: Mapping[str, Any]) -> Iterator[str]:
    """The wheels, datasets or files that a corpus stage was made from."""
    for part in config.get("parts", [config]):
        if part.get("dataset"):
            yield part["dataset"]
        elif part["name"] == "text":
            yield "the user's text files"
        else:
            yield from (f"{name} {part[name]}" for name in LICENCES if name in part)


def export(store: Store, cell: str, out: Path, *, shard: str = SHARD) -> Path:
    """Writes the last model of a recorded cell to `out`, ready for `from_pretrained`, and returns that folder.

    Args:
        store: where the cell is recorded.
        cell: the beginning of its digest.
        out: a folder that is empty or not there yet.
        shard: the largest size of one safetensors file.
    """
    lineage = Lineage.of(store, cell)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Name another folder: an export never writes over anything.")
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models.loading import load_model

    out.mkdir(parents=True, exist_ok=True)
    load_model(lineage.model).save_pretrained(out, max_shard_size=shard)
    load_tokenizer(lineage.tokenizer).save_pretrained(out)
    shutil.copy(lineage.folder / RECORD, out / RECORD)
    (out / "README.md").write_text(card(lineage, law_summary(store)), encoding="utf-8")
    return out


def law_summary(store: Store) -> str:
    """What the cells of the store say of the law: a fit, or why there is none."""
    from capacity_gap import records
    from capacity_gap.fit.frame import curves
    from capacity_gap.fit.law import law_of

    try:
        found, notes = curves(records.load(store.root))
    except ValueError as error:
        return f"No law was fitted: {error}"
    return law_of(found, axis="total", notes=notes).summary()


def card(lineage: Lineage, law: str) -> str:
    """The model card: what it is, what it was made from, how it scores, under which licences its parents are."""
    row = lineage.row
    chats = lineage.model.parent.name in ("instruct", "prefer")
    kind = "distilled and instructed" if chats else "distilled"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation, pruning]\n---",
        f"# {row['student']} from {row['teacher']} ({row['family']})",
        f"A {kind} student of {row['stored_params']:,} parameters, cut from a teacher of {row['teacher_params']:,} and "
        f"trained on {row['data_tokens']:,} tokens of `{row['corpus']}`. Made by capacity_gap, cell `{row['cell']}`, "
        f"commit `{row['git_commit']}`; everything that decided it is in `record.json`.",
        "## Use\n" + _usage(chats=chats),
        "## Lineage\n" + "\n".join(_lineage(lineage)),
        "## Scores\n" + "\n".join(_scores(row)),
        f"## Law\nWhat the store that this model comes from says of the law of the capacity gap:\n```\n{law}\n```",
        "## Licences of its parents\n"
        + "\n".join(f"- {name}: {licence}" for name, licence in lineage.parents)
        + "\n\nThis model may be used only as all of them allow.",
    ]
    return "\n\n".join(parts) + "\n"


def _usage(*, chats: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
    ]
    if chats:
        lines += [
            'talk = [{"role": "user", "content": "First word of: red blue"}]',
            'ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))",
        ]
    return "\n".join(["```python", *lines, "```"])


def _lineage(lineage: Lineage) -> Iterator[str]:
    yield "| stage | digest | what decided it | device | commit |\n|---|---|---|---|---|"
    shown = ("tokens", "vocab", "vocab_size", "rows", "count", "pairs", "method", "learning_rate", "seed", "beta")
    for meta in lineage.ancestors.values():
        given = {k: _plain(v) for k, v in meta["config"].items() if k in shown}
        said = ", ".join(f"{k} {v}" for k, v in given.items())
        yield f"| {meta['name']} | `{meta['digest']}` | {said} | {meta['device']} | `{meta['git_commit']}` |"


def _plain(value: Any) -> Any:
    """A number as people write it; stages keep floats as their exact hexadecimal form."""
    return f"{float.fromhex(value['float']):g}" if isinstance(value, dict) else value


def _scores(row: Mapping[str, Any]) -> Iterator[str]:
    yield "| score | value | standard error |\n|---|---|---|"
    names = {
        "student_loss": "held-out loss, nats per token",
        "student_bits_per_byte": "held-out bits per byte",
        "student_loss_ood": "loss out of domain, nats per token",
        "teacher_loss": "the teacher's held-out loss",
        "init_loss": "the student's before training",
        "tuned_loss": "the tuned student's",
    }
    for field, said in names.items():
        if row.get(field) is not None:
            stderr = row.get(f"{field}_stderr")
            yield f"| {said} | {row[field]:.4f} | {'–' if stderr is None else f'{stderr:.4f}'} |"
    for task, score in row["metrics"].items():
        stderr = score.get("stderr")
        yield f"| {task} | {score['value']:.4f} | {'–' if stderr is None else f'{stderr:.4f}'} |"
