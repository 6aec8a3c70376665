"""The commands about single models: `check`, `evaluate`, `compare`, `judge`, `export`, `fetch`."""

import argparse
from pathlib import Path
from typing import Any

from capacity_gap.commands.options import amount, out_file, out_folder, whole
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import default_store


def add(commands: Any) -> None:
    """Adds these commands to the command line's parser."""
    _add_check(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_judge(commands)
    _add_export(commands)
    _add_fetch(commands)


def _add_check(commands: Any) -> None:
    told = "Check that a model can be pruned, on a small model of its structure."
    check = commands.add_parser("check", description=told)
    check.add_argument(
        "model", help="a folder, ORG/NAME, FILE.gguf, pip:PACKAGE/FILE.gguf, FAMILY:RUNG, or a model_type"
    )
    check.set_defaults(run=run_check)


def run_check(given: argparse.Namespace) -> int:
    """Prints along which axes a model can be pruned; exit status 1 if a check fails."""
    from capacity_gap.models.axes import architecture, count_params, dims
    from capacity_gap.pruning.proof import prove

    config = _config_named(given.model)
    table, kind = architecture(config), config["model_type"]
    print(f"{given.model}: {kind}, {count_params(config):,} parameters")
    if table.uncut:
        print(f"cannot be cut: {table.uncut.rstrip('.')}. It can teach a student that is a separate model.")
        return 0
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the small models that are saved and loaded
    checks = prove(config)
    for one in checks:
        print(f"  {one.name:<11}{'holds' if one.held else 'FAILS: ' + one.said}")
    failed = [one.name for one in checks if not one.held]
    axes = ["hidden with heads"] if table.square else ["hidden", "heads"]
    axes = [*axes, "neurons"] if "neurons" in table.keys else [axes[0] + " and neurons", *axes[1:]]
    axes = [*axes, "layers", *["experts"] * (dims(config).experts > 0)]
    axes = [axis for axis in axes if axis.split()[0] not in failed]
    print(f"can be cut: {', '.join(axes) or 'nothing'}." + (f" Not proved: {', '.join(failed)}." if failed else ""))
    if table.alibi:
        print("The number of heads determines which are kept, because each head has its own ALiBi slope.")
    return int(bool(failed))


def _config_named(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint, of a rung, or of a type as its class has it."""
    from capacity_gap.models.checkpoints import checkpoint, is_checkpoint
    from capacity_gap.models.config_files import read_config
    from capacity_gap.models.defaults import completed
    from capacity_gap.models.ladders import family

    if is_checkpoint(name):
        return read_config(checkpoint(name).folder)
    ladder, found, rung = name.partition(":")
    if found:
        return dict(family(ladder).rungs[family(ladder).rung(rung)])
    config = completed({"model_type": name})
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if "head_dim" in config and config["head_dim"] is None and heads and hidden:
        config["head_dim"] = hidden // heads  # some classes want it said
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None and heads:
        config["num_key_value_heads"] = heads
    return config


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", description="Evaluate any model on benchmarks, for comparison tables.")
    evaluate.add_argument("model", help="a model folder, or a repository of the hub")
    evaluate.add_argument("--tasks", help="name or name:shots, comma-separated (default: the paper's, or the folder's)")
    evaluate.add_argument("--task-folder", type=Path, help="your own task files, or a suite of a store")
    evaluate.add_argument("--tokenizer", help="where the model's tokenizer is, if not beside it")
    evaluate.add_argument("--limit", type=whole(), help="at most this many questions per task")
    evaluate.add_argument("--batch-size", type=whole(most=2**20), default=8, help="batch size (default: %(default)s)")
    evaluate.add_argument("--device", default="auto", help="default: %(default)s")
    evaluate.add_argument("--dtype", default="fp32", help="fp32 (default) or bf16")
    evaluate.add_argument(
        "--allow-code-execution", action="store_true", help="allow tasks to execute model-written code"
    )
    evaluate.add_argument(
        "--train-tokens", help="training tokens of the model, such as 300b, for the FLOPs column of the CSV"
    )
    evaluate.add_argument("--out", type=out_file, help="CSV to append the scores to (read by `compare`)")
    evaluate.set_defaults(run=run_evaluate)


def _add_compare(commands: Any) -> None:
    told = "Compare models, from the tables of `evaluate --out`."
    compare = commands.add_parser("compare", description=told)
    compare.add_argument("tables", nargs="+", type=Path, help="CSV files of `evaluate --out`")
    compare.add_argument(
        "--out", type=out_file, help="CSV with one row per model and columns metrics/<task>, as in records"
    )
    compare.set_defaults(run=run_compare)


def _add_judge(commands: Any) -> None:
    told = "Grade answers with a model behind an OpenAI-compatible endpoint."
    judge = commands.add_parser("judge", description=told)
    judge.add_argument("answers", nargs="+", help="one (single grades) or two (pairs): model folders or answers .jsonl")
    judge.add_argument("--endpoint", required=True, help="base URL, such as http://localhost:8000/v1")
    judge.add_argument("--model", required=True, help="the judge model's name at the endpoint")
    judge.add_argument(
        "--out", type=out_folder, required=True, help="folder for answers, judgements (the cache) and summary"
    )
    judge.add_argument("--questions", type=Path, help="your own questions .jsonl (default: those of this package)")
    judge.add_argument(
        "--key-env", default="OPENAI_API_KEY", help="environment variable with the API key (default: %(default)s)"
    )
    judge.add_argument("--price", type=amount, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="a million")
    judge.add_argument(
        "--max-tokens", type=whole(most=2**20), default=512, help="maximum tokens per judgement (default: %(default)s)"
    )
    judge.add_argument(
        "--device", default="auto", help="device for generating answers of model folders (default: %(default)s)"
    )
    judge.add_argument(
        "--yes", action="store_true", help="generate answers and call the judge; without it, only the cost is shown"
    )
    judge.set_defaults(run=run_judge)


def _add_export(commands: Any) -> None:
    told = "Write a cell's model to a folder: sharded safetensors, tokenizer, model card."
    export = commands.add_parser("export", description=told)
    export.add_argument("cell", help="the beginning of a recorded cell's digest (column `cell` of the records)")
    export.add_argument("out", type=out_folder, help="an empty or new folder")
    export.add_argument("--store", default=default_store(), help="default: %(default)s")
    export.add_argument("--shard", default="2GB", help="maximum file size (default: %(default)s)")
    export.set_defaults(run=run_export)


def _add_fetch(commands: Any) -> None:
    fetch = commands.add_parser("fetch", description="Download checkpoints for machines without a network.")
    fetch.add_argument("what", nargs="+", help="repositories, or FAMILY:RUNG such as qwen2_5:1.5b")
    fetch.set_defaults(run=run_fetch)


def run_evaluate(given: argparse.Namespace) -> int:
    """Prints a model's scores, and adds them to a table if asked."""
    from capacity_gap.evaluate.other_models import score_other

    return score_other(given)


def run_compare(given: argparse.Namespace) -> int:
    """Prints a table of comparison, and writes it if asked."""
    from capacity_gap.evaluate.compare import compare

    return compare(given.tables, given.out)


def run_judge(given: argparse.Namespace) -> int:
    """Shows what judging costs and, with --yes, does it."""
    from capacity_gap.judge.verdicts import run

    return run(given)


def run_export(given: argparse.Namespace) -> int:
    """Writes a cell's last model to a folder."""
    from capacity_gap.export.student import export
    from capacity_gap.store import contents

    out = export(contents.open_store(given.store), given.cell, given.out, shard=given.shard)
    print(f"{out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
    return 0


def run_fetch(given: argparse.Namespace) -> int:
    """Downloads checkpoints to the hub's cache."""
    from capacity_gap.models.ladders import family

    repositories = []
    for what in given.what:
        name, _, rung = what.partition(":")
        ladder = family(name) if rung else None
        if ladder and not ladder.published:
            raise ConfigError(f"{what}: teachers of {name} are trained here, so there is nothing to fetch.")
        repositories.append(ladder.published[ladder.rung(rung)] if ladder else what)
    from capacity_gap.models.loading import fetch  # torch, only now that the names are known to be good

    for repository in repositories:
        print(f"{repository}: {fetch(repository)}", flush=True)
    return 0
