"""The tests' own hub against the real client and transformers; and what our errors say when a repository is not had."""

import json
import re
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from capacity_gap.commands import cli
from capacity_gap.data.tokenizer import train_tokenizer
from capacity_gap.models.loading import fetch, load_model, point_to, published_tokenizer
from capacity_gap.settings.errors import ConfigError, StageError
from tests.hub import environment, serving_hub, using
from tests.small_models import small_model

NAME, SHARD = "org/name", "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def folders(text_file, tmp_path_factory):
    """Two checkpoints of one shape, each of three shards, with a tokenizer and a file in a folder."""
    made = []
    for scale in (1.0, 2.0):
        folder = tmp_path_factory.mktemp("published")
        train_tokenizer(text_file.read_text(encoding="utf-8")[:20_000].split("\n\n"), 300, folder)
        model = small_model("llama", vocab_size=300, hidden_size=32, num_hidden_layers=2).float()
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(folder, max_shard_size="45KB")
        (folder / "sub").mkdir()
        (folder / "sub" / "notes.txt").write_text("notes")
        made.append(folder)
    return made


@pytest.fixture
def hub(folders, tmp_path):
    """A hub with one repository, to which this process's client is led."""
    with serving_hub() as hub, using(hub, tmp_path / "home"):
        hub.publish(NAME, folders[0])
        yield hub


def point(folder, tmp_path, name=NAME):
    """As a run does first with a published teacher."""
    shape = json.loads((folder / "config.json").read_text())
    point_to(name, tmp_path / "stage", shape=shape, dtype="fp32", quantization="none")


@pytest.fixture(autouse=True)
def _stage(tmp_path):
    (tmp_path / "stage").mkdir()


def test_shards_load_at_a_branch_a_tag_and_a_commit(hub, folders):
    first = hub.publish(NAME, folders[0], revision="v1/final")  # a slash, which is quoted in addresses
    second = hub.publish(NAME, folders[1])
    loaded = {r: AutoModelForCausalLM.from_pretrained(NAME, revision=r) for r in ("main", "v1/final", first, second)}
    heads = {revision: model.lm_head.weight for revision, model in loaded.items()}
    expected = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
    assert torch.equal(heads["v1/final"], expected[0]) and torch.equal(heads[first], expected[0])
    assert torch.equal(heads["main"], expected[1]) and torch.equal(heads[second], expected[1])
    assert AutoConfig.from_pretrained(NAME, revision="v1/final").vocab_size == 300
    text = "the statement is executed"
    assert AutoTokenizer.from_pretrained(NAME)(text) == AutoTokenizer.from_pretrained(folders[1])(text)


def test_the_hub_leaves_no_thread_behind_even_of_a_broken_download(folders, tmp_path):
    before = set(threading.enumerate())
    with serving_hub() as hub, using(hub, tmp_path / "home"):
        hub.publish(NAME, folders[0])
        hub.break_once(NAME, SHARD, after=5000)
        hf_hub_download(NAME, SHARD)
    assert not [t for t in set(threading.enumerate()) - before if type(t).__name__ != "TMonitor"]  # of tqdm


def test_listings_are_those_of_the_folder(hub, folders):
    files = {f.relative_to(folders[0]).as_posix(): f.stat().st_size for f in folders[0].rglob("*") if f.is_file()}
    info = HfApi().model_info(NAME, files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings} == files
    tree = {entry.path: getattr(entry, "size", None) for entry in HfApi().list_repo_tree(NAME, recursive=True)}
    assert tree == {**files, "sub": None}
    assert [entry.path for entry in HfApi().list_repo_tree(NAME, "sub")] == ["sub/notes.txt"]
    assert {entry.path for entry in HfApi().list_repo_tree(NAME)} == {n for n in tree if "/" not in n}
    assert model_info(NAME).sha == info.sha  # through the client's own HfApi, which was made when it was imported


def test_what_is_published_again_is_seen_and_only_what_changed_is_downloaded(hub, folders, tmp_path):
    hub.publish(NAME, folders[0])
    snapshot_download(NAME)
    before = len(hub.ranges(SHARD))
    second = hub.publish(NAME, folders[1])
    assert snapshot_download(NAME).endswith(second)
    unchanged = [
        f.name for f in folders[0].glob("*.safetensors") if f.read_bytes() == (folders[1] / f.name).read_bytes()
    ]
    assert before == 1 and unchanged
    assert all(len(hub.ranges(name)) == 1 for name in unchanged)


def test_what_is_missing_raises_the_clients_own_errors(hub):
    with pytest.raises(RepositoryNotFoundError):
        model_info("org/none")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/none", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "config.json", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(NAME, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, "none.json")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gate_refuses_files_and_lets_listings_through(hub, status):
    hub.gate(NAME, status)
    assert model_info(NAME).gated == "manual"
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download(NAME, "config.json")
    assert refused.value.response.status_code == status
    hub.gate(NAME, None)
    hf_hub_download(NAME, "config.json")


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, folders):
    """The client keeps whole chunks, here of 1,024 bytes, and asks for the rest."""
    hub.break_once(NAME, SHARD, after=5000)
    file = hf_hub_download(NAME, SHARD)
    assert hub.ranges(SHARD) == [None, f"bytes={5000 // 1024 * 1024}-"]
    with open(file, "rb") as stream:
        assert stream.read() == (folders[0] / SHARD).read_bytes()


def test_offline_everything_comes_from_the_cache(hub, folders, tmp_path):
    fetch(NAME)
    asked = len(hub.requests)
    with using(hub, tmp_path / "home", offline=True):
        point(folders[0], tmp_path)
        assert load_model(tmp_path / "stage").num_parameters() > 0
        assert len(published_tokenizer(NAME)) == 300
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(NAME, "sub/notes.txt")
    assert len(hub.requests) == asked


def test_a_child_process_asks_the_hub_through_its_environment(hub, folders, tmp_path):
    """From an empty cache of its own, with whatever a broken connection makes the client do by itself."""
    hub.break_once(NAME, SHARD, after=5000)
    command = "import sys; from huggingface_hub import snapshot_download as s; print(s('org/name'))"
    given = environment(hub, tmp_path / "child")
    done = subprocess.run([sys.executable, "-c", command], env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "child") in done.stdout
    assert len(hub.ranges(SHARD)) == 2


def test_the_fetch_command_fills_the_cache_that_a_run_reads(hub, folders, tmp_path, capsys):
    assert cli.main(["fetch", NAME]) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: {tmp_path / 'home'}")
    asked = len(hub.requests)
    point(folders[0], tmp_path)
    assert not [path for _, path, _ in hub.requests[asked:] if "/resolve/" in path]


def test_a_published_teacher_is_pinned_to_the_commit_that_was_checked(hub, folders, tmp_path):
    """Else stages of one cell could read different weights, when the repository changes between them."""
    point(folders[0], tmp_path)
    pointer = json.loads((tmp_path / "stage" / "published.json").read_text())
    assert pointer["revision"] == hub.repositories[NAME].refs["main"]


def refusals(folders, tmp_path, name=NAME):
    """What each way to a repository says: a run's first look, its tokenizer, and `fetch`."""
    said = []
    for load in (partial(point, folders[0], tmp_path), published_tokenizer, fetch):
        with pytest.raises(StageError) as refused:
            load(name)
        message = str(refused.value)
        assert message.startswith((f"{name} cannot be loaded: ", f"{name} cannot be fetched: ")), message
        assert "\n" not in message
        said.append(message)
    return said


def test_errors_name_the_cause_and_the_remedy(hub, folders, tmp_path):
    page = re.escape(f"{hub.url}/{NAME}")
    gated = {401: f"not logged in.*licence on {page}.*`hf auth login`", 403: f"has no access. Request access on {page}"}
    for status, expected in gated.items():
        hub.gate(NAME, status)
        assert all(re.search(expected, said) for said in refusals(folders, tmp_path))
    hub.gate(NAME, None)
    for name, expected in {
        "org/none": f"not a local folder, and {hub.url}/org/none does not exist or is private. Check the name",
        "a/b/c": "a hub name of the form ORG/NAME",
    }.items():
        assert all(expected in said for said in refusals(folders, tmp_path, name))
    for status, expected in {
        503: r"error \(503\).*does not hold it. Try again later",
        429: "rate-limits this machine",
    }.items():
        hub.down = status
        assert all(re.search(expected, said) for said in refusals(folders, tmp_path))
    hub.down = 401
    assert "rejects this machine's token" in refusals(folders, tmp_path)[-1]


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(
        StageError, match=f"{NAME} cannot be loaded: it has no branch, tag or commit v9. Use one listed on"
    ):
        published_tokenizer(NAME, "v9")


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_errors_name_the_cache_and_the_command_that_fills_it(folders, tmp_path, offline):
    with serving_hub() as hub:
        hub.publish(NAME, folders[0])
    cause = "HF_HUB_OFFLINE is set" if offline else f"{hub.url} cannot be reached .*Connection refused"
    with using(hub, tmp_path / "home", offline=offline):
        for said in refusals(folders, tmp_path):
            assert re.search(f"{cause}.*{tmp_path}/home/hub does not hold it", said)
            assert f"`python -m capacity_gap fetch {NAME}` on a machine with a network that shares this cache" in said


def half_loaded(hub, home, name):
    """A cache from which one file is gone, and where an older client left the part that had come."""
    with using(hub, home):
        blob = (fetch(NAME) / name).resolve()
    blob.rename(f"{blob}.incomplete")


@pytest.mark.parametrize("offline", [True, False])
def test_a_half_loaded_cache_is_completed_or_says_so(hub, folders, tmp_path, offline):
    half_loaded(hub, tmp_path / "home", SHARD)
    with using(hub, tmp_path / "home", offline=offline):
        if not offline:
            point(folders[0], tmp_path)
            assert hub.ranges(SHARD) == [None, None]
            return
        with pytest.raises(StageError, match="hub holds only a part of it.*capacity_gap fetch org/name"):
            point(folders[0], tmp_path)
        with pytest.raises(StageError, match="hub holds only a part of it.*capacity_gap fetch org/name"):
            fetch(NAME)


def test_a_tokenizer_that_is_gone_from_the_cache_says_how_to_fill_it(hub, tmp_path):
    half_loaded(hub, tmp_path / "home", "tokenizer.json")
    expected = "HF_HUB_OFFLINE is set.*may lack a file.*capacity_gap fetch org/name"
    with using(hub, tmp_path / "home", offline=True), pytest.raises(StageError, match=expected):
        published_tokenizer(NAME)


def test_a_repository_without_all_its_files_says_which(hub, folders, tmp_path):
    for file, expected in ((SHARD, f"lacks 1 of the 3 files .*{SHARD}"), ("config.json", f"{hub.url}/org/less lists")):
        files = hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]
        less = tmp_path / f"less {file}"
        for name in files.keys() - {file}:
            (less / name).parent.mkdir(parents=True, exist_ok=True)
            (less / name).write_bytes(files[name])
        hub.publish("org/less", less)
        with pytest.raises((ConfigError, StageError), match=expected):
            point(folders[0], tmp_path, "org/less")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file where the cache should be")
    with pytest.raises(StageError, match=f"cannot be fetched: .*{tmp_path}/home/hub: free space .*HF_HOME"):
        fetch(NAME)
