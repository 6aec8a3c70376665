"""What each stage does: thin adapters between the store's directories and the functions that do the work.

Every function takes a `StageRun` and writes its result to `run.out`. Their order is `pipeline.py`'s affair.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capacity_gap.config import DistillConfig
from capacity_gap.data import packing
from capacity_gap.data.corpus import SPLITS, build_corpus, read_texts
from capacity_gap.data.documents import ood_documents
from capacity_gap.data.sources import documents
from capacity_gap.files import CRC
from capacity_gap.models.axes import count_params
from capacity_gap.records import RECORD, SCHEMA_VERSION, Record
from capacity_gap.runtime import provenance
from capacity_gap.stage import META, StageRun, write_json
from capacity_gap.training_config import OptimConfig

METRICS = "metrics.jsonl"  # the logged history of a training run
RESULT = "result.json"


def corpus(run: StageRun) -> None:
    """Clean, deduplicated text, split by group."""
    source, given = run.options["source"], run.config
    build_corpus(documents(source), run.out, ood=ood_documents(), validation=given["validation"], test=given["test"])


def tokenizer(run: StageRun) -> None:
    """Byte-level BPE, trained on the training split."""
    from capacity_gap.data.tokenizer import train_tokenizer

    train_tokenizer(read_texts(run.inputs["corpus"], "train"), run.config["vocab_size"], run.out)


def tokens(run: StageRun) -> None:
    """Every split as a memory-mapped stream of token ids."""
    from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer

    tok = load_tokenizer(run.inputs["tokenizer"])
    for i, split in enumerate((*SPLITS, "ood")):
        packing.pack(read_texts(run.inputs["corpus"], split), tok, run.out / split)
        run.runtime.report(i + 1, 4, "splits")
    write_json(run.out / "bytes_per_id.json", bytes_per_id(tok))


def published(run: StageRun) -> None:
    """A teacher that is there already, on the hub or in a folder: checked against its rung, then pointed to."""
    from capacity_gap.models.loading import point_to

    point_to(
        run.options["repository"],
        run.out,
        shape=run.config["shape"],
        dtype=run.config["dtype"],
        quantization=run.config["quantization"],
    )


def vocabulary(run: StageRun) -> None:
    """The tokenizer with a second script's tokens, learnt from the training split or taken from another one."""
    from capacity_gap.data.expand import expand_tokenizer, text_per_token
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models import loading

    name, revision = run.options["expand"].tokenizer, run.options["expand"].revision
    tokens = expand_tokenizer(
        run.inputs["tokenizer"],
        run.out,
        size=run.config["vocab"],
        texts=read_texts(run.inputs["corpus"], "train"),
        second=loading.published_tokenizer(name, revision) if name else None,
    )
    held_out = list(read_texts(run.inputs["corpus"], "test"))
    spent = {
        when: text_per_token(load_tokenizer(folder), held_out)
        for when, folder in (("before", run.inputs["tokenizer"]), ("after", run.out))
    }
    write_json(run.out / RESULT, {**spent, "tokens": tokens, "second": name})


def expand(run: StageRun) -> None:
    """A teacher with rows for the new tokens."""
    from capacity_gap.data.expand import PARTS
    from capacity_gap.models.expand import expand_checkpoint
    from capacity_gap.models.loading import checkpoint_folder

    new = json.loads((run.inputs["vocabulary"] / PARTS).read_text())
    expand_checkpoint(
        checkpoint_folder(run.inputs["model"]),
        run.out,
        first=new["first"],
        parts=new["parts"],
        rows=run.config["rows"],
        on_shard=lambda done, total: run.runtime.report(done, total, "shards"),
    )


def adapt(run: StageRun) -> None:
    """A teacher's pre-training, continued on the text that its students will learn."""
    from capacity_gap.models.loading import load_model

    _pretrain(run, load_model(run.inputs["model"]).float())  # published weights are held in bf16, but never trained so


def published_tokenizer(run: StageRun) -> None:
    """The tokenizer that came with the models."""
    from capacity_gap.models.loading import copy_tokenizer

    copy_tokenizer(run.options["repository"], run.out)


def pretrain(run: StageRun) -> None:
    """A teacher, trained from random weights on the training split."""
    from capacity_gap.models.loading import new_model

    _pretrain(run, new_model(run.config["shape"], run.config["seed"]))


def _pretrain(run: StageRun, model: Any) -> None:
    from capacity_gap.train import Plan

    given = run.config
    plan = Plan(
        order=_order(run, given["tokens"], given["epochs"], given["seed"]),
        optim=OptimConfig(**given["optim"], learning_rate=given["learning_rate"]),
        distill=DistillConfig(kd_weight=0.0),
        peak=given["learning_rate"],
        **_way_of_training(run),
    )
    _train(run, model, plan, teacher=None)


def scores(run: StageRun) -> None:
    """Importance of every unit of the teacher, on the first sequences of the training permutation."""
    import torch

    from capacity_gap.models.loading import load_model
    from capacity_gap.pruning.scores import SCORES

    given = run.config
    model = load_model(run.inputs["teacher"], device=run.runtime.device)
    packed = packed_split(run, "train")
    length = packed.sequence_length
    chosen = packing.subset(packed, given["batches"] * given["batch_size"] * length)

    def batches() -> Iterator[Any]:
        for part in chosen.reshape(given["batches"], given["batch_size"]):
            yield torch.from_numpy(packed.batch(part)).to(run.runtime.device)

    found = SCORES[given["method"]](
        model,
        batches(),
        seed=given.get("seed", 0),
        on_batch=lambda done: run.runtime.report(done, given["batches"], "batches"),
    )
    if by := given.get("layers"):
        from capacity_gap.pruning.layers import LAYER_SCORES

        found = dataclasses.replace(found, layers=LAYER_SCORES[by](model, batches()))
    found.save(run.out)


def pruned_student(run: StageRun) -> None:
    """The student cut out of its teacher: in memory, or where the teacher is a published checkpoint shard by shard."""
    from capacity_gap.models.loading import checkpoint_folder, load_model, save_model
    from capacity_gap.pruning.scores import Scores
    from capacity_gap.pruning.shape import shape_of, spread
    from capacity_gap.pruning.surgery import prune, prune_checkpoint

    given, teacher, scores = run.config, run.inputs["teacher"], Scores.load(run.inputs["scores"])
    shape, layers = shape_of(given["shape"]), given.get("layers", "symmetric")
    if given.get("priority") == "global":
        config = json.loads((checkpoint_folder(teacher) / "config.json").read_text())
        shape = spread(shape, config, scores, layers=layers, multiple=given["multiple"])
    if checkpoint_folder(teacher) == teacher:
        save_model(prune(load_model(teacher), scores, shape, layers=layers), run.out)
        return
    prune_checkpoint(
        checkpoint_folder(teacher),
        scores,
        shape,
        run.out,
        layers=layers,
        on_tensor=lambda done, total: run.runtime.report(done, total, "tensors"),
    )


def random_student(run: StageRun) -> None:
    """A student with random weights: the start that no teacher damaged."""
    from capacity_gap.models.loading import new_model, save_model

    save_model(new_model(run.config["shape"], run.config["seed"]), run.out)


def distil(run: StageRun) -> None:
    """The student, trained under its teacher (or alone, with kd_weight 0)."""
    from capacity_gap.models.loading import load_model
    from capacity_gap.train import Plan

    given = run.config
    teacher = _teacher(run)
    plan = Plan(
        order=_order(run, given["tokens"], given["epochs"], given["seed"]),
        optim=OptimConfig(**given["optim"], learning_rate=given["learning_rate"]),
        distill=DistillConfig(**given["distill"]),
        peak=given["learning_rate"],
        evaluate_every=given.get("evaluate_every", 0),
        **_way_of_training(run),
    )
    _train(run, load_model(run.inputs["student"]), plan, teacher=teacher)


def _way_of_training(run: StageRun) -> dict[str, Any]:
    """How a plan is carried out, from the stage's options."""
    options = {k: v for k, v in run.options.items() if k != "micro_batch_size"}
    micro = run.options["micro_batch_size"] or run.config["optim"]["batch_size"]
    return {"micro_batch": micro, "compile": run.config.get("compile", False), **options}


def _teacher(run: StageRun) -> Any:
    """What the student learns from: a model, its cached signal, or nothing."""
    if "signal" in run.inputs:
        from capacity_gap.distill.signals import Signal

        return Signal(run.inputs["signal"])
    if "teacher" in run.inputs:
        from capacity_gap.models.loading import load_model

        return load_model(run.inputs["teacher"], device=run.runtime.device)
    return None


def signal(run: StageRun) -> None:
    """The teacher's outputs on the first tokens of the training permutation, in a few values a token."""
    from capacity_gap.distill.signals import write_signal
    from capacity_gap.models.loading import load_model
    from capacity_gap.train import autocast

    given, packed = run.config, packed_split(run, "train")
    blocks = run.checkpoint / "step-0"  # whole blocks are what the next owner takes over

    def on_block(done: int, total: int) -> None:
        run.runtime.report(done, total, "blocks")
        run.runtime.check()

    write_signal(
        load_model(run.inputs["teacher"], device=run.runtime.device),
        packed,
        packing.subset(packed, given["tokens"]),
        blocks,
        kind=given["kind"],
        size=given["size"],
        temperature=given["temperature"],
        seed=given["seed"],
        batch_size=run.options["batch_size"],
        vocabulary=len(packed.bytes_per_id),
        autocast=lambda: autocast(run.runtime.device, given["precision"]),
        on_block=on_block,
    )
    for file in blocks.iterdir():
        if file.suffix != CRC:  # a finished stage lists its files with their hashes
            file.rename(run.out / file.name)


def _metrics(run: StageRun, whose: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What the benchmarks gave, as a record holds it, and the releases of the harness if there were any."""
    from capacity_gap.evaluate.scores import Score, as_metrics

    folders = [folder for name, folder in run.inputs.items() if name.startswith(f"{whose}_benchmark_")]
    results = [json.loads((folder / RESULT).read_text()) for folder in folders]
    scores = [Score(**s) for result in results for s in result["scores"]]
    releases = sorted({result["lm_eval"] for result in results})  # several, where tasks were added after an upgrade
    return as_metrics(scores), {"lm_eval": ", ".join(releases)} if results else {}


def record(run: StageRun) -> None:
    """The row of one cell, from what its stages left."""
    from capacity_gap.instruct.stages import scores as answer_scores

    trained = json.loads((run.inputs["trained"] / RESULT).read_text()) if run.config["data_tokens"] else {}
    student, teacher, start = (
        json.loads((run.inputs[name] / RESULT).read_text())
        for name in ("evaluate", "evaluate_teacher", "evaluate_init")
    )
    made = json.loads((run.inputs["trained"] / META).read_text())
    history = read_history(run.inputs["trained"]) if trained else []
    metrics, harness = _metrics(run, "student")
    vocabulary = run.inputs.get("vocabulary")
    spent = json.loads((vocabulary / RESULT).read_text()) if vocabulary else None
    row = Record(
        schema_version=SCHEMA_VERSION,
        cell=run.digest,
        status="done",
        **run.config,
        stored_params=count_params(json.loads((run.inputs["trained"] / "config.json").read_text())),
        trained=run.inputs["trained"].name,
        held_out_tokens=student["test"]["tokens"],
        student_loss=student["test"]["loss"],
        student_loss_stderr=student["test"]["stderr"],
        student_bits_per_byte=student["test"]["bits_per_byte"],
        student_loss_ood=student["ood"]["loss"],
        teacher_loss=teacher["test"]["loss"],
        teacher_loss_ood=teacher["ood"]["loss"],
        teacher_entropy=teacher["test"]["entropy"],
        init_loss=start["test"]["loss"],
        expanded_tokens=spent and spent["tokens"]["after"],
        second_bytes_per_token_before=spent and spent["before"]["second"],
        second_bytes_per_token=spent and spent["after"]["second"],
        tuned_loss=_tuned_loss(run),
        train_ce=_tail_mean(history, "ce"),
        train_kl=_tail_mean(history, "kl"),
        metrics=metrics | _tuned_metrics(run) | answer_scores(run.inputs),
        teacher_metrics=_metrics(run, "teacher")[0],
        tokens_per_s=trained.get("tokens_per_s"),
        mfu=trained.get("mfu"),
        signal_bytes_per_token=trained.get("signal_bytes_per_token"),
        wall_s=made["wall_s"],
        peak_memory_bytes=trained.get("peak_memory_bytes"),
        micro_batch=trained.get("micro_batch"),
        **{k: made[k] for k in ("device", "threads", "ranks", "git_commit")},
        versions=made["versions"] | harness,
        created=provenance(run.runtime)["created"],
    )
    write_json(run.out / RECORD, row.to_dict())


def _tuned_loss(run: StageRun) -> float | None:
    folder = run.inputs.get("evaluate_tuned")
    return json.loads((folder / RESULT).read_text())["test"]["loss"] if folder else None


def _tuned_metrics(run: StageRun) -> dict[str, dict[str, Any]]:
    """The benchmarks of the tuned model, each under its own name and that of the last stage of tuning."""
    final = "prefer" if "prefer" in run.inputs else "instruct"
    return {f"{name}/{final}": score for name, score in _metrics(run, "tuned")[0].items()}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The logged points of a training stage."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _tail_mean(history: list[dict], name: str) -> float | None:
    """Mean of the last tenth of the logged points: one batch alone is noise."""
    tail = [point[name] for point in history[-max(1, len(history) // 10) :] if name in point]
    return sum(tail) / len(tail) if tail else None


def packed_split(run: StageRun, split: str) -> packing.Packed:
    """One split of the tokens that the stage was given, as sequences."""
    return packing.Packed(run.inputs["tokens"] / split, run.config["sequence_length"])


def _order(run: StageRun, budget: int, epochs: int, seed: int) -> Any:
    return packing.order(packing.subset(packed_split(run, "train"), budget, epochs=epochs), seed, epochs=epochs)


def _train(run: StageRun, model: Any, plan: Any, *, teacher: Any) -> None:
    """Trains, then writes model, history and result."""
    from capacity_gap.models.loading import save_model
    from capacity_gap.train import train

    result = train(
        model,
        packed_split(run, "train"),
        plan,
        runtime=run.runtime,
        checkpoints=run.checkpoint,
        teacher=teacher,
        held_out=packed_split(run, "validation") if plan.evaluate_every else None,
        precision=run.config["precision"],
        on_log=run.runtime.on_log,
    )
    save_model(model, run.out, leads=run.runtime.ranks.leads)
    (run.out / METRICS).write_text("".join(json.dumps(point) + "\n" for point in result.history))
    write_json(
        run.out / RESULT,
        {
            "steps": result.steps,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens_per_s,
            "mfu": result.mfu,
            "signal_bytes_per_token": getattr(teacher, "bytes_per_token", None),
            "peak_memory_bytes": result.peak_memory_bytes,
            "micro_batch": result.micro_batch,
        },
    )


def pace(optim: OptimConfig, hidden: int) -> dict[str, Any]:
    """An optimiser's identity: the ways to say its learning rate are hashed as the number that they come to."""
    names = [f for f in OptimConfig.__dataclass_fields__ if not f.startswith("learning_rate")]
    return {"optim": {name: getattr(optim, name) for name in names}, "learning_rate": optim.peak(hidden)}
