"""The stage `corpus`: clean, deduplicated text, split into train, validation, test and out-of-domain."""

from capacity_gap.data.corpus import build_corpus
from capacity_gap.data.corpus_config import CorpusConfig
from capacity_gap.data.documents import ood_documents
from capacity_gap.data.sources import documents, identity
from capacity_gap.store.stage import Stage, StageRun


def corpus_stage(config: CorpusConfig) -> Stage:
    """The text that `config` names."""
    given = {"name": config.name, "validation": config.validation, "test": config.test, **identity(config)}
    return Stage("corpus", 1, given, {}, collect_text, options={"source": config})


def collect_text(run: StageRun) -> None:
    """Reads, cleans, deduplicates and splits by group."""
    source, given = run.options["source"], run.config
    build_corpus(documents(source), run.out, ood=ood_documents(), validation=given["validation"], test=given["test"])
