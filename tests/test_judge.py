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

from capacity_gap.commands import cli
from capacity_gap.judge import endpoint
from capacity_gap.judge.endpoint import Reply
from capacity_gap.judge.questions import Question, read_answers, read_questions
from capacity_gap.judge.verdicts import Cache, cost, grade, judge_all, requests, summarise, verdict
from capacity_gap.settings.errors import UserError

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
        return Reply(f"Because. VERDICT: {'A' if shown_first == words[0] else 'B'}", 10, 5)

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
    biased = judge_all(asked, "j", Cache(tmp_path / "biased.jsonl"), lambda m: Reply("VERDICT: A", 1, 1))
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


ODD = "one\u2028two\x85three"  # characters at which str.splitlines parts a line, and JSON does not


def test_lines_end_at_newlines_alone_and_what_is_cut_is_as_if_never_written(tmp_path):
    asked = requests(QUESTIONS, [answers_of("good")])
    file, calls = tmp_path / "judgements.jsonl", []

    def ask(messages):
        calls.append(1)
        return Reply(f"{ODD} naïve\nSCORE: 7", 1, 1)

    judge_all(asked, "j", Cache(file), ask)
    assert judge_all(asked, "j", Cache(file), ask) == [f"{ODD} naïve\nSCORE: 7"] * 3
    assert len(calls) == 3
    whole = file.read_bytes()
    file.write_bytes(b'{"other": 1}\n[1]\n' + whole[: whole.rindex("ï".encode()) + 1])
    assert len(judge_all(asked, "j", Cache(file), ask)) == 3
    assert len(calls) == 4, "only the one that was cut inside a letter"
    judge_all(asked, "j", Cache(file), ask)
    assert len(calls) == 4
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"id": "a", "answers": [ODD]}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_answers(given) == {"a": [ODD]}


def test_a_reply_that_is_empty_or_cut_off_is_asked_again(tmp_path):
    asked, file = requests(QUESTIONS, [answers_of("good")]), tmp_path / "judgements.jsonl"
    replies = [Reply("", 9, 512, whole=False), Reply("SCORE: 1", 9, 512, whole=False), Reply("SCORE: 5", 9, 8)]
    assert judge_all(asked, "j", Cache(file), lambda m: replies.pop(0)) == ["", "", "SCORE: 5"]
    with file.open("a") as stream:  # as releases before this one kept them
        stream.write(json.dumps({"key": asked[0].key("j"), "text": ""}) + "\n")
    assert (cost(asked, "j", Cache(file)).asked, cost(asked, "j", Cache(file)).cached) == (2, 1)
    assert judge_all(asked, "j", Cache(file), lambda m: Reply("SCORE: 8", 9, 8)) == ["SCORE: 8", "SCORE: 8", "SCORE: 5"]
    assert cost(asked, "j", Cache(file)).asked == 0
    longer = cost(asked, "j", Cache(file), (0.0, 1.0), max_tokens=2048)
    assert (longer.asked, longer.tokens_out) == (3, 3 * 2048), "another limit is another question"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. SCORE: 7", 7),
        ("score: **10**", 10),
        ("SCORE: 3 … no, SCORE: 4", 4),
        ("**SCORE**: 7", 7),
        ("**SCORE:** 7.", 7),
        ("### Score : 7/10\n", 7),
        ("SCORE: [7]", 7),
        ("SCORE: `7`\n\nI hope that this helps: ask again!", 7),
        ("SCORE: 7.0", 7),
        ("SCORE: 7 out of 10", 7),
        ("Rating: [[7]]", 7),
        ("[[10]]", 10),
        ("\\boxed{SCORE: 9}", 9),
        ("SCORE: 7.5", None),
        ("SCORE: 6\nSCORE: 7 or 8", None),
        ("SCORE: 0", None),
        ("SCORE: 11", None),
        ("SCORE: 100", None),
        ("SCORE:", None),
        ("[[seven]]", None),
        ("eleven", None),
    ],
)
def test_grades(text, expected):
    assert grade(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("VERDICT: A", "first"),
        ("**VERDICT**: A", "first"),
        ("Verdict: **B**", "second"),
        ("VERDICT: [[A]]", "first"),
        ("VERDICT: Assistant A", "first"),
        ("[[B]]", "second"),
        ("[[C]]", "tie"),
        ("VERDICT: TIE.", "tie"),
        ("VERDICT: a tie", "tie"),
        ("VERDICT: A and B tie", None),
        ("VERDICT: A or B", None),
        ("VERDICT: A\nOn reflection, VERDICT: neither", None),
        ("A is better", None),
    ],
)
def test_verdicts(text, expected):
    other = {"first": "second", "second": "first"}
    assert verdict(text, swapped=False) == expected
    assert verdict(text, swapped=True) == other.get(expected, expected)


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
            data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(reply, str) else "application/json")
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


def completion(text, reason="stop"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
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
        assert "3 judgements to request, 0 in the cache" in capsys.readouterr().out
        assert seen == [], "nothing is asked before --yes"
        assert cli.main([*command, "--yes"]) == 2
        said = capsys.readouterr()
        assert "does not answer: AuthenticationError" in said.err and KEY not in said.err + said.out
        assert cli.main([*command, "--yes"]) == 0
        assert "1 judgements to request, 2 in the cache" in capsys.readouterr().out
    assert len(seen) == 5
    assert {(path, key) for path, key, _ in seen} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert all(body["temperature"] == 0 and body["model"] == "judge" for _, _, body in seen)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kind"], summary["count"], summary["value"]) == ("rating", 3, pytest.approx((6 + 7 + 9) / 3))
    assert all(KEY not in f.read_text() for f in out.iterdir())


def judging(files, url, out, *more):
    questions, good = files
    return [
        "judge",
        str(good),
        "--endpoint",
        url,
        "--model",
        "j",
        "--out",
        str(out),
        "--questions",
        str(questions),
        *more,
    ]


def test_an_endpoint_of_models_that_reason_is_asked_in_its_way(files, tmp_path, capsys):
    pytest.importorskip("openai")

    def answer(body, number):
        for refused, said in (
            (
                "max_tokens",
                "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            ),
            ("temperature", "Unsupported value: 'temperature' does not support 0.0 with this model."),
        ):
            if refused in body:
                return 400, {"error": {"message": said, "code": "unsupported_parameter"}}
        if number < 5:
            return 200, completion(None, "length")
        return 200, completion("SCORE: 6")

    with server(answer) as (url, seen):
        command = judging(files, url, tmp_path / "out", "--yes", "--max-tokens", "700")
        assert cli.main(command) == 0
        said = capsys.readouterr().out
        assert "2 replies were empty or cut off and are not kept" in said and "--max-tokens 700" in said
        assert "2 questions left out" in said
        assert len(seen) == 5, "what it refuses is tried once, not for each question"
        assert all(body["max_completion_tokens"] == 700 for _, _, body in seen[2:])
        assert cli.main(command) == 0
        said = capsys.readouterr().out
        assert "2 judgements to request, 1 in the cache" in said and "cut off" not in said
    assert json.loads((tmp_path / "out/summary.json").read_text())["count"] == 3


@pytest.mark.parametrize(
    ("status", "reply", "said"),
    [
        (404, {"error": {"message": f"no model j for {KEY}"}}, "NotFoundError: Error code: 404 .*no model j for .key."),
        (400, {"error": {"message": "context too long"}}, "BadRequestError: .*400.*context too long"),
        (200, {"choices": None}, "the reply is not a chat completion"),
        (200, {"choices": ["x"]}, "the reply is not a chat completion"),
        (200, "<html>Welcome</html>", "the reply is not a chat completion .<html>Welcome</html>"),
    ],
)
def test_what_an_endpoint_says_is_shown_without_the_key(files, tmp_path, monkeypatch, capsys, status, reply, said):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with server(lambda body, number: (status, reply)) as (url, _):
        assert cli.main(judging(files, url, tmp_path / "out", "--yes")) == 2
    found = capsys.readouterr().err
    assert re.search(said, found), found
    assert "does not answer" in found and "check --endpoint" in found
    assert KEY not in found


def test_questions_of_mt_bench_are_read_and_wrong_ones_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    row = {"question_id": 81, "category": "math", "turns": ["1+1?", "Twice?"], "reference": ["2", "4"]}
    file.write_text(json.dumps(row) + "\n")
    assert read_questions(file) == [Question("81", "math", ("1+1?", "Twice?"), "2\n4")]
    for wrong, said in (
        ({"question_id": 82, "turns": "How are you?"}, "line 2: turns should be a list of texts"),
        ({"question_id": 82, "turns": []}, "line 2: turns should be a list of texts"),
        ({}, "line 2: another line has the id 81"),
        ({"question_id": None}, "line 2: id .or question_id. should be a text or a whole number"),
        ({"question_id": 82, "category": 3}, "line 2: category should be a text"),
        ({"question_id": 82, "reference": 4}, "line 2: reference should be a list of texts"),
    ):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(UserError, match=said):
            read_questions(file)
    file.write_text('{"question_id": 81, "answers": "ab"}\n')
    with pytest.raises(UserError, match="answers should be a list of texts, one a turn, not 'ab'"):
        read_answers(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="line 1: not a JSON object with category, turns"):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="contains no question"):
        read_questions(file)


def test_a_folder_that_is_no_instructed_model_says_so(files, tmp_path, capsys):
    questions, _ = files
    command = ["judge", str(tmp_path), "--endpoint", "http://127.0.0.1:9/v1", "--model", "j", "--out", str(tmp_path)]
    assert cli.main([*command, "--questions", str(questions)]) == 2
    assert "is neither a model folder (no config.json) nor an answers file" in capsys.readouterr().err


def chat_model(folder: Path, kind: str = "llama", positions: int = 8192) -> Path:
    """A tiny model with random weights, a byte-level tokenizer and a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer(["a small text, and another one. " * 20], 300, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": positions}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        more = {"intermediate_size": 16} if kind == "llama" else {}
        config = AutoConfig.for_model(kind, vocab_size=300, **sizes, **more, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_models_own_answers_are_made_once_and_each_is_kept_when_made(tmp_path, monkeypatch):
    from capacity_gap.judge import answers

    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 6)
    model, answered = chat_model(tmp_path / "model"), []

    def until_interrupted(*given):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(given)
        return answer(*given)

    answer = answers.answer
    monkeypatch.setattr(answers, "answer", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers.answer_all(model, QUESTIONS, tmp_path)
    (file,) = tmp_path.glob("answers-*.jsonl")
    assert len(file.read_text().splitlines()) == 2
    answered.clear()
    found = answers.answer_all(model, QUESTIONS, tmp_path)
    assert {i: len(a) for i, a in found.items()} == {"a": 2, "b": 1, "c": 1}
    assert [question.id for _, _, question in answered] == ["c"]
    monkeypatch.setattr(answers, "_load", lambda *_: pytest.fail("answered again"))
    assert answers.answer_all(model, QUESTIONS, tmp_path) == found


def test_a_model_answers_where_it_is_told_and_as_far_as_its_positions_reach(tmp_path, monkeypatch):
    from capacity_gap.judge import answers

    model, loaded = chat_model(tmp_path / "model", "gpt2", positions=48), []
    load = answers._load
    monkeypatch.setattr(answers, "_load", lambda folder, device: loaded.append(device) or load(folder, "cpu"))
    short = [Question("short", "x", ("1?",))]
    assert len(answers.answer_all(model, short, tmp_path, device="cuda:3")["short"]) == 1
    assert loaded == ["cuda:3"]
    with pytest.raises(UserError, match=r"question long has, .*, \d+ tokens, and .*model allows 48"):
        answers.answer_all(model, [Question("long", "x", ("z" * 60,))], tmp_path)


def test_the_cost_is_shown_before_a_model_answers(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    from capacity_gap.judge import answers

    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 6)
    model, (questions, _) = chat_model(tmp_path / "model"), files
    with server(lambda body, number: (200, completion("SCORE: 2"))) as (url, seen):
        command = judging((questions, model), url, tmp_path / "out")
        assert cli.main(command) == 0
        said = capsys.readouterr().out
        assert "3 judgements to request, 0 in the cache" in said
        assert "3 answers must be generated here (auto), counted above at their maximum length" in said
        assert not list((tmp_path / "out").glob("answers-*")) and not seen
        at_most = int(re.search(r"about ([\d,]+) tokens in", said)[1].replace(",", ""))
        assert cli.main([*command, "--device", "cpu", "--yes"]) == 0
        exact = [int(n.replace(",", "")) for n in re.findall(r"about ([\d,]+) tokens in", capsys.readouterr().out)]
        assert exact[0] == at_most >= exact[1]
        assert cli.main(command) == 0
        assert "0 judgements to request, 3 in the cache" in capsys.readouterr().out
    assert len(seen) == 3


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
        said = capsys.readouterr().out
        assert "questions left out: the verdict could not be parsed" in said
        cut = int(found[1]) if (found := re.search(r"(\d) replies were empty or cut off", said)) else 0
        file = tmp_path / "out/judgements.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert len(rows) + cut == 3
        assert all(r["tokens_in"] > 50 and r["tokens_out"] > 0 for r in rows)
        assert cli.main([a for a in arguments if a != "--yes"]) == 0
        assert f"{cut} judgements to request, {3 - cut} in the cache" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    "url", ["", "x", "localhost:80", "ftp://a/b", "http://", "http://a:99999", "file:///etc/passwd"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is not a URL"):
        endpoint.check_url(url)


def test_a_password_in_a_url_is_never_shown(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    url = "http://me:pass-word@127.0.0.1:9/v1"
    assert endpoint.redacted(url) == "http://[redacted]@127.0.0.1:9/v1"
    assert endpoint.redacted("https://host/v1?api_key=secret#x") == "https://host/v1"
    for wrong in ("http:/u:secret@host/v1", "u:secret@host/v1", "ftp://u:secret@host"):
        with pytest.raises(UserError) as found:
            endpoint.check_url(wrong)
        assert "secret" not in str(found.value)
    ask = endpoint.endpoint(url, "judge", "JUDGE_KEY")
    with pytest.raises(UserError) as error:
        ask([{"role": "user", "content": "x"}])
    assert "pass-word" not in str(error.value) and "secret-key" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://example.org/v1", True),
        ("https://example.org/v1", False),
        ("http://localhost:1", False),
        ("http://[::1]:1", False),
    ],
)
def test_a_key_over_plain_http_is_warned_of(url, told, monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    endpoint.endpoint(url, "judge", "JUDGE_KEY")
    said = capsys.readouterr().err
    assert ("over http" in said) is told and "secret-key" not in said
