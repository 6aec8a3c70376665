"""A cell's model as others use it: sharded safetensors, tokenizer, and a card that says where it comes from."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.cell.stages.shared import RESULT
from capacity_gap.data.corpora import CORPORA
from capacity_gap.models.ladders import licence_of
from capacity_gap.records import RECORD
from capacity_gap.settings.errors import UserError, shown
from capacity_gap.settings.places import ON_HUB
from capacity_gap.store.files import META, let_others_read, read_json, write_json
from capacity_gap.store.stage import Store
from capacity_gap.store.verify import fault_of_stage

SHARD = "2GB"
POINTER = "published.json"
# The settings of a stage that a card tells.
SHOWN = (
    "tokens",
    "epochs",
    "vocab",
    "vocab_size",
    "rows",
    "count",
    "pairs",
    "method",
    "learning_rate",
    "lora_rank",
    "seed",
    "beta",
)
HUB_LICENCES = {  # as the hub spells them in a card's head
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "BSD-3-Clause": "bsd-3-clause",
    "Llama 2 Community License": "llama2",
}


@dataclass(frozen=True)
class Lineage:
    """One finished cell and the stages that it was made from, as their folders say."""

    store: Store
    folder: Path  # of the record

    @staticmethod
    def of(store: Store, cell: str) -> "Lineage":
        """The recorded cell whose digest begins with `cell`; none, or several, is an error that lists what there is."""
        asked = cell.removeprefix("record/")
        if not re.fullmatch("[0-9a-f]{1,40}", asked):
            raise UserError(f"{shown(cell)!r} is not a cell: pass the first hexadecimal digits of its digest.")
        found = sorted(p.parent for p in store.root.glob(f"record/{asked}*/{RECORD}"))
        if len(found) != 1:
            known = sorted(p.parent.name for p in store.root.glob(f"record/*/{RECORD}"))
            listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            raise UserError(
                f"{cell} matches {len(found)} recorded cells of {store.root}. Pass the first digits of one digest: "
                f"{listed or 'none is recorded yet'}. `store ls --cells` describes each of them."
            )
        return Lineage(store, found[0])

    @cached_property
    def row(self) -> dict[str, Any]:
        """The record."""
        return read_json(self.folder / RECORD)

    def stage(self, folder: Path) -> dict[str, Any]:
        """The metadata of a stage's folder."""
        return read_json(folder / META, ["inputs", "config"])

    def inputs(self, folder: Path) -> dict[str, Path]:
        """The folders that a stage was made from."""
        return {name: self.store.root / key for name, key in self.stage(folder)["inputs"].items()}

    @cached_property
    def model(self) -> Path:
        """The folder of the cell's last model."""
        made = self.inputs(self.folder)
        return next(made[name] for name in ("prefer", "instruct", "trained") if name in made)

    @property
    def tuned(self) -> str | None:
        """The last stage of tuning, if there was one."""
        return self.model.parent.name if self.model.parent.name in ("instruct", "prefer") else None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has two stacks, and so another class of transformers."""
        return bool(read_json(self.model / "config.json").get("is_encoder_decoder"))

    @property
    def held_out(self) -> dict[str, dict[str, Any]]:
        """The held-out losses of the model itself, not of what it was before it was tuned."""
        folder = self.inputs(self.folder)["evaluate_tuned" if self.tuned else "evaluate"]
        return read_json(folder / RESULT)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The model's own scores: of a tuned one how it answers, of another its benchmarks."""
        if not self.tuned:
            return self.row["metrics"]
        found = ((name.rpartition("/"), score) for name, score in self.row["metrics"].items())
        return {name: score for (name, _, whose), score in found if whose == self.tuned}

    @property
    def corpus(self) -> str:
        """What the record calls the text that the student learnt, without the places of files."""
        tokens = self.inputs(self.inputs(self.folder)["evaluate"])["tokens"]
        given = self.stage(self.inputs(tokens)["corpus"])["config"]
        parts = [(part.get("dataset") or part["name"], part.get("weight")) for part in given.get("parts", [given])]
        return "+".join(f"{_plain(weight)}*{public(name)}" if weight else public(name) for name, weight in parts)

    @cached_property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer, with the chat template if it was tuned."""
        if (self.model / "tokenizer.json").exists():
            return self.model
        if own := self._start:  # a published model keeps its template and its special tokens
            return own
        return self.inputs(self.inputs(self.inputs(self.folder)["evaluate"])["tokens"])["tokenizer"]

    @property
    def _start(self) -> Path | None:
        """The checkpoint that the student was before it was distilled, if it was one."""
        if self.row["init"] != "pretrained" or not self.row.get("start"):
            return None
        from capacity_gap.models.loading import checkpoint_folder

        made = self.inputs(self.model)  # of the distilled student; without distillation the model is the start itself
        return checkpoint_folder(made.get("student", self.model))

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
    def base_models(self) -> list[str]:
        """Published checkpoints on the hub behind the model."""
        return sorted({name for name, _ in self._checkpoints if ON_HUB.fullmatch(name)})

    @property
    def _checkpoints(self) -> Iterator[tuple[str, str | None]]:
        """Each with the licence that its file names, if it is a file that names one."""
        for folder in self.ancestors:
            if (folder / POINTER).exists():
                pointer = read_json(folder / POINTER)
                name = f"/{pointer['file']}" if "file" in pointer else pointer["repository"]
                yield name, pointer.get("licence")

    @property
    def parents(self) -> list[tuple[str, str]]:
        """Published checkpoints, tokenizers and text behind the model, each with its licence as far as it is known."""
        kinds = {True: "the file ", False: "the user's folder "}
        found = [(public(name, kinds[name.endswith(".gguf")]), licence) for name, licence in self._checkpoints]
        said = {name: _SPELT.get(licence, licence) for name, licence in found if licence}
        names = {name for name, _ in found}
        for folder, meta in self.ancestors.items():
            if read := _READS.get(meta["name"]):
                names.update(read(folder, meta["config"]))
        return [(name, said.get(name) or _licence(name)) for name in sorted(names)]


def public(name: str, of_folder: str = "") -> str:
    """A name on the hub as it is; only the last part of a local path, to keep the rest private."""
    return name if ON_HUB.fullmatch(name) else of_folder + re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _licence(name: str) -> str:
    texts = {getattr(e.value, "package", e.name): e.traits["licence"] for e in map(CORPORA.entry, CORPORA)}
    return licence_of(name) or texts.get(name.partition(" ")[0]) or "see its own page or owner"


def _texts(_: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """The wheels, datasets or files that a corpus stage was made from."""
    for part in config.get("parts", [config]):
        if part.get("dataset"):
            own = "the user's folder " if "content" in part else ""
            yield own + public(part["dataset"], "the user's folder ")
        elif part["name"] == "text":
            yield "the user's text files"
        else:
            package = getattr(CORPORA[part["name"]], "package", None) if part["name"] in CORPORA else None
            yield f"{package} {part[package]}" if package else part["name"]


def _base_tokenizer(_: Path, config: Mapping[str, Any]) -> Iterator[str]:
    if "repository" in config:
        yield f"{config['repository']}"


def _second_tokenizer(folder: Path, _: Mapping[str, Any]) -> Iterator[str]:
    if second := read_json(folder / RESULT).get("second"):
        yield public(second, "the user's folder ")


def _instructions(_: Path, config: Mapping[str, Any]) -> Iterator[str]:
    said = {"rows": "the user's file of conversations", "pair_rows": "the user's file of preferences"}
    yield from (name for key, name in said.items() if key in config)


_SPELT = {hubs: ours for ours, hubs in HUB_LICENCES.items()}
# What was made by others, by the stage that reads it.
_READS = {
    "corpus": _texts,
    "tokenizer": _base_tokenizer,
    "vocabulary": _second_tokenizer,
    "instructions": _instructions,
}


def export(store: Store, cell: str, out: Path, *, shard: str = SHARD) -> Path:
    """Writes the last model of a recorded cell to `out`, ready for `from_pretrained`, and returns that folder.

    Args:
        store: where the cell is recorded.
        cell: the beginning of its digest.
        out: a folder that is empty or not there yet.
        shard: the largest size of one safetensors file.

    Raises:
        Damaged: a file that the export reads is not what was written there.
    """
    lineage = Lineage.of(store, cell)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty. Choose another folder: an export never overwrites files.")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", shard):
        raise UserError(f"--shard {shard}: write a whole number and KB, MB, GB or TB, such as 2GB.")
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    try:
        _write(lineage, beside, shard)
        let_others_read(beside)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _write(lineage: Lineage, out: Path, shard: str) -> None:
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models.loading import load_model

    for folder in {lineage.model, lineage.tokenizer}:
        if lineage.store.root not in folder.parents:  # a checkpoint elsewhere
            continue
        if fault := fault_of_stage(folder):  # every byte is read anyhow
            raise fault
    model = load_model(lineage.model)
    model.config.use_cache = model.generation_config.use_cache = True  # trainers switch it off for themselves
    model.save_pretrained(out, max_shard_size=shard)
    load_tokenizer(lineage.tokenizer).save_pretrained(out)
    write_json(out / RECORD, {**lineage.row, "corpus": lineage.corpus})
    (out / "README.md").write_text(card(lineage, law_summary(lineage.store)), encoding="utf-8")


def law_summary(store: Store) -> str:
    """The law fitted to the cells of the store, or why there is none."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.fit.frame import curves
    from capacity_gap.fit.law import law_of

    frame, _ = without_outdated(records.load(store.root), store.root)
    try:
        found, notes = curves(frame)
    except ValueError as error:
        return f"No law was fitted: {error}"
    return law_of(found, axis="total", notes=notes).summary()


def card(lineage: Lineage, law: str) -> str:
    """The model card: what it is, what it was made from, how it scores, under which licences its parents are."""
    row = lineage.row
    parts = [
        "\n".join(["---", *_head(lineage), "---"]),
        f"# {row['student']} from {row['teacher']} ({row['family']})",
        f"{_origin(lineage)} Made by capacity_gap, cell `{row['cell']}`, commit `{row['git_commit']}`; all settings "
        "that determine it are in `record.json`.",
        "## Use\n" + _usage(lineage),
        "## Lineage\n" + "\n".join(_lineage(lineage)),
        "## Scores of this model\n" + "\n".join(_scores(lineage)),
        "## For comparison: the models it was made from\n" + "\n".join(_before(lineage)),
        f"## Law\nFit of the capacity-gap law to the store that this model comes from:\n```\n{law}\n```",
        "## Licences of its parents\n"
        + "\n".join(f"- {name}: {licence}" for name, licence in lineage.parents)
        + "\n\nThis model may be used only as all of them allow.",
    ]
    return "\n\n".join(parts) + "\n"


def _head(lineage: Lineage) -> Iterator[str]:
    """What the hub reads of a card. A licence is named only where all parents are known to have one and the same."""
    yield "library_name: transformers"
    if not lineage.is_encoder_decoder:  # a prefix language model has no task of its own there
        yield "pipeline_tag: text-generation"
    yield "tags: [distillation, pruning]"
    known = {HUB_LICENCES.get(licence) for _, licence in lineage.parents}
    one = next(iter(known)) if len(known) == 1 else None
    yield f"license: {one}" if one else "license: other\nlicense_name: those-of-its-parents-see-below"
    if lineage.base_models:
        yield f"base_model: [{', '.join(lineage.base_models)}]"


def _origin(lineage: Lineage) -> str:
    row = lineage.row
    trained = row.get("start") or f"a model trained on {row.get('start_tokens')} tokens"
    starts = {"random": "randomly initialised", "pretrained": f"initialised from {trained}"}
    start = starts.get(row["init"], f"cut from {row.get('reference') or row['teacher']}")
    teacher = f"distilled from {row['teacher']} ({row['teacher_params']:,} parameters)"
    taught = teacher if row["kd_weight"] else "trained without a teacher"
    learnt = f" and {taught} on {row['data_tokens']:,} tokens of `{lineage.corpus}`" if row["data_tokens"] else ""
    tuned = {
        None: "",
        "instruct": ", then fine-tuned on conversations",
        "prefer": ", then fine-tuned on conversations and on preferences",
    }
    return f"A model of {row['stored_params']:,} parameters, {start}{learnt}{tuned[lineage.tuned]}."


def _usage(lineage: Lineage) -> str:
    """Lines that run as they stand in the folder."""
    kind = "AutoModelForSeq2SeqLM" if lineage.is_encoder_decoder else "AutoModelForCausalLM"
    if lineage.tuned:
        asked = [
            'talk = [{"role": "user", "content": "First word of: red blue"}]',
            'given = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
        ]
    else:
        asked = ['given = tokenizer("The beginning of a text", return_tensors="pt")']
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        f'model, tokenizer = {kind}.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        *asked,
        'print(tokenizer.decode(model.generate(given["input_ids"], max_new_tokens=20)[0]))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _lineage(lineage: Lineage) -> Iterator[str]:
    yield "| stage | digest | settings | device | commit |\n|---|---|---|---|---|"
    for meta in lineage.ancestors.values():
        given = {k: _plain(v) for k, v in meta["config"].items() if k in SHOWN}
        if given.get("lora_rank") == 0:
            given["lora_rank"] = "none, all weights"
        said = ", ".join(f"{k} {v}" for k, v in given.items())
        yield f"| {meta['name']} | `{meta['digest']}` | {said} | {meta['device']} | `{meta['git_commit']}` |"


def _plain(value: Any) -> Any:
    """A number for display; stages keep floats as their exact hexadecimal form."""
    return f"{float.fromhex(value['float']):g}" if isinstance(value, dict) else value


def _scores(lineage: Lineage) -> Iterator[str]:
    yield "| score | value | standard error |\n|---|---|---|"
    test, ood = lineage.held_out["test"], lineage.held_out["ood"]
    yield _line("held-out loss, nats per token", test["loss"], test["stderr"])
    yield _line("held-out bits per byte", test["bits_per_byte"])
    yield _line("loss out of domain, nats per token", ood["loss"])
    for task, score in lineage.metrics.items():
        yield _line(task, score["value"], score.get("stderr"))


def _before(lineage: Lineage) -> Iterator[str]:
    """The same held-out loss of the models that this one was made from."""
    row = lineage.row
    yield "| held-out loss, nats per token, of | value |\n|---|---|"
    yield f"| the teacher | {row['teacher_loss']:.4f} |"
    yield f"| the student before training | {row['init_loss']:.4f} |"
    if lineage.tuned:
        yield f"| the student before tuning | {row['student_loss']:.4f} |"


def _line(name: str, value: float | None, stderr: float | None = None) -> str:
    said = ["–" if number is None else f"{number:.4f}" for number in (value, stderr)]
    return f"| {name} | {said[0]} | {said[1]} |"
