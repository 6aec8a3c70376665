"""Judging: positions swapped, resumed, cached, costed; against a server that speaks the protocol, and a real one."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from capacity_gap import cli
from capacity_gap.errors import UserError
from capacity_gap.evaluate.judge import (
    Cache,
    Question,
    cost,
    grade,
    judge_all,
    read_questions,
    requests,
    summarise,
    verdict,
)

QUESTIONS = [Question("a", "x", ("1?", "2?")), Question("b", "x", ("3?",), "three"), Question("c", "y", ("4?",))]
KEY = "sk-loopback-0123456789"


def answers_of(word):
    return {q.id: [f"{word} {t}" for t in q.turns] for q in QUESTIONS}


def fake(words):
    """A judge that calls the better word better, wherever it stands; how often it was asked."""
    asked = []

    def ask(messages):
        asked.append(messages)
        text = messages[1]["content"]
        at = {w: text.find(w) for w in words}
        shown_first = min((w for w in words if at[w] >= 0), key=lambda w: at[w])
        return f"Because. VERDICT: {'A' if shown_first == words[0] else 'B'}", 10, 5

    return ask, asked


def test_the_questions_are_whole():
    found = read_questions()
    assert len({q.id for q in found}) == len(found) == 16
    assert len({q.category for q in found}) == 8
    assert all(len(q.turns) == 2 for q in found)


def test_a_pair_is_shown_both_ways_round():
    asked = requests(QUESTIONS, [answers_of("good"), answers_of("poor")])
    assert [r.swapped for r in asked] == [False, True] * 3
    for request in asked:
        text = request.messages[1]["content"]
        assert (text.find("good") < text.find("poor")) != request.swapped
    assert "### Reference\nthree" in asked[2].messages[1]["content"]


def test_the_better_wins_in_both_showings_and_a_judge_of_positions_gives_ties(tmp_path):
    asked = requests(QUESTIONS, [answers_of("good"), answers_of("poor")])
    ask, calls = fake(["good", "poor"])
    found = summarise(asked, judge_all(asked, "j", Cache(tmp_path / "fair.jsonl"), ask))
    assert (found["kind"], found["value"], found["count"], len(calls)) == ("win_rate", 1.0, 3, 6)
    assert found["by_category"]["y"] == {"value": 1.0, "stderr": None, "count": 1}
    biased = judge_all(asked, "j", Cache(tmp_path / "biased.jsonl"), lambda m: ("VERDICT: A", 1, 1))
    assert summarise(asked, biased)["value"] == 0.5
    swapped = requests(QUESTIONS, [answers_of("poor"), answers_of("good")])
    assert summarise(swapped, judge_all(swapped, "j", Cache(tmp_path / "back.jsonl"), ask))["value"] == 0.0


def test_what_was_judged_is_never_asked_again_even_after_a_crash(tmp_path):
    asked = requests(QUESTIONS, [answers_of("good"), answers_of("poor")])
    ask, calls = fake(["good", "poor"])

    def dies(messages):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(messages)

    file = tmp_path / "judgements.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_all(asked, "j", Cache(file), dies)
    with file.open("a") as stream:
        stream.write('{"key": "half a li')
    cache = Cache(file)
    left = cost(asked, "j", cache, (2.0, 8.0))
    assert (left.asked, left.cached, left.tokens_out) == (4, 2, 4 * 512)
    assert left.price == pytest.approx((left.tokens_in * 2 + left.tokens_out * 8) / 1e6)
    judge_all(asked, "j", cache, ask)
    assert len(calls) == 6
    judge_all(asked, "j", Cache(file), ask)
    assert len(calls) == 6
    assert cost(asked, "j", Cache(file)).asked == 0
    assert cost(asked, "another", Cache(file)).asked == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Good. SCORE: 7", 7), ("score: **10**", 10), ("SCORE: 3 … no, SCORE: 4", 4), ("eleven", None)],
)
def test_grades(text, expected):
    assert grade(text) == expected


def test_verdicts():
    assert verdict("VERDICT: A", swapped=False) == verdict("Verdict: **B**", swapped=True) == "first"
    assert verdict("VERDICT: B", swapped=False) == "second"
    assert verdict("VERDICT: TIE", swapped=True) == "tie"
    assert verdict("A is better", swapped=False) is None


def test_unreadable_judgements_are_counted_not_guessed():
    asked = requests(QUESTIONS, [answers_of("good")])
    found = summarise(asked, ["SCORE: 8", "no idea", "SCORE: 4"])
    assert (found["value"], found["stderr"], found["count"], found["unreadable"]) == (6.0, 2.0, 2, 1)
    with pytest.raises(UserError, match="model 1 lacks answers"):
        requests(QUESTIONS, [{"a": ["only one turn"]}])


@contextlib.contextmanager
def server(answer):
    """An OpenAI-compatible endpoint on loopback; `seen` holds the requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            status, reply = answer(body, len(seen))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", seen
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(text):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@pytest.fixture
def files(tmp_path):
    questions, good = tmp_path / "questions.jsonl", tmp_path / "good.jsonl"
    rows = [{"id": q.id, "category": q.category, "turns": q.turns, "reference": q.reference} for q in QUESTIONS]
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    good.write_text("".join(json.dumps({"id": i, "answers": a}) + "\n" for i, a in answers_of("good").items()))
    return questions, good


def test_a_whole_judgement_over_http_and_the_key_goes_only_to_the_endpoint(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_KEY", KEY)
    questions, good = files
    out = tmp_path / "out"

    def answer(body, number):
        if number == 1:
            return 500, {"error": {"message": "busy"}}  # the client tries again
        if number == 4:
            return 401, {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
        return 200, completion(f"Fine. SCORE: {min(10, 4 + number)}")

    with server(answer) as (url, seen):
        command = ["judge", str(good), "--endpoint", url, "--model", "judge", "--out", str(out)]
        command += ["--questions", str(questions), "--key-env", "MY_KEY", "--price", "1", "2"]
        assert cli.main(command) == 0
        assert "3 judgements to ask, 0 in the cache" in capsys.readouterr().out
        assert seen == [], "nothing is asked before --yes"
        assert cli.main([*command, "--yes"]) == 2
        said = capsys.readouterr()
        assert "does not answer: AuthenticationError" in said.err and KEY not in said.err + said.out
        assert cli.main([*command, "--yes"]) == 0
        assert "1 judgements to ask, 2 in the cache" in capsys.readouterr().out
    assert len(seen) == 5
    assert {(path, key) for path, key, _ in seen} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert all(body["temperature"] == 0 and body["model"] == "judge" for _, _, body in seen)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kind"], summary["count"], summary["value"]) == ("rating", 3, pytest.approx((6 + 7 + 9) / 3))
    assert all(KEY not in f.read_text() for f in out.iterdir())


def test_a_folder_that_is_no_instructed_model_says_so(files, tmp_path, capsys):
    questions, _ = files
    command = ["judge", str(tmp_path), "--endpoint", "http://127.0.0.1:9/v1", "--model", "j", "--out", str(tmp_path)]
    assert cli.main([*command, "--questions", str(questions)]) == 2
    assert "is neither a model folder (no config.json) nor an answers file" in capsys.readouterr().err


def chat_model(folder: Path) -> Path:
    """A tiny Llama with random weights, a byte-level tokenizer and a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer(["a small text, and another one. " * 20], 300, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", vocab_size=300, max_position_embeddings=8192, **sizes, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_models_own_answers_are_made_once(tmp_path, monkeypatch):
    from capacity_gap.evaluate import answers

    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 6)
    model = chat_model(tmp_path / "model")
    found = answers.answer_all(model, QUESTIONS, tmp_path)
    assert {i: len(a) for i, a in found.items()} == {"a": 2, "b": 1, "c": 1}
    (file,) = tmp_path.glob("answers-*.jsonl")
    monkeypatch.setattr(answers, "_load", lambda folder: pytest.fail("answered again"))
    assert answers.answer_all(model, QUESTIONS, tmp_path) == found
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.slow
def test_against_a_server_of_transformers(files, tmp_path, capsys):
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    questions, good = files
    model = chat_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "serve.log").open("w")
    serving = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", serving, tmp_path / "serve.log")
        arguments = ["judge", str(good), "--endpoint", f"http://127.0.0.1:{port}/v1", "--model", str(model), "--yes"]
        arguments += ["--out", str(tmp_path / "out"), "--questions", str(questions)]
        assert cli.main(arguments) == 0
        assert re.search(r"questions left out: the judge gave no readable verdict", capsys.readouterr().out)
        rows = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text().splitlines()]
        assert [r["question"] for r in rows] == ["a", "b", "c"]
        assert all(r["tokens_in"] > 50 and r["tokens_out"] > 0 for r in rows)
        assert cli.main(arguments) == 0
        assert "0 judgements to ask, 3 in the cache" in capsys.readouterr().out
    finally:
        serving.terminate()
        serving.wait(30)
        log.close()


def _wait_for(url, process, log, seconds=400):
    """Until the server answers, or has ended: importing torch takes minutes on a busy machine."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1).close()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
