"""W&B's server at the network edge: as much of it as uploading runs and reading them back takes, on the loopback."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "local-" + "0123456789" * 4


class FakeWandb:
    """What was uploaded, by run id: `config`, `group`, `tags`, `job_type`, `history`, `summary`."""

    def __init__(self):
        self.runs, self.url = {}, ""

    def run(self, name):
        fresh = {"config": {}, "group": None, "tags": [], "job_type": None, "history": {}, "summary": {}, "uploads": 0}
        return self.runs.setdefault(name, fresh)

    def answer(self, query, given):
        if "upsertBucket" in query:
            return self.upsert(given)
        if "query Runs(" in query:
            return {"project": self.project(given)}
        if "historyTail" in query:
            return {"model": self.model(given)}
        if "viewer" in query:
            who = {"id": "u", "entity": "team", "username": "u", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": who}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}

    def upsert(self, given):
        run = self.run(given["name"])
        run["config"] |= json.loads(given["config"] or "{}")
        for ours, theirs in (("group", "groupName"), ("tags", "tags"), ("job_type", "jobType")):
            run[ours] = given.get(theirs) or run[ours]
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {"id": given["name"], "name": given["name"], "displayName": None, "description": None, "config": None}
        return {
            "upsertBucket": {
                "bucket": bucket | {"sweepName": None, "project": project, "historyLineCount": 0},
                "inserted": True,
            }
        }

    def model(self, given):
        """What a client asks before it goes on with a run: where its history ends."""
        run = self.runs.get(given["name"], {"history": {}})
        bucket = run["history"] and {
            "id": given["name"],
            "name": given["name"],
            "displayName": given["name"],
            "summaryMetrics": json.dumps(run["summary"]),
            "config": json.dumps(run["config"]),
            "wandbConfig": json.dumps({"t": 1}),
            "tags": run["tags"],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": len(run["history"]),
            "historyTail": json.dumps([json.dumps(run["history"][max(run["history"])])]),
        }
        return {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}, "bucket": bucket or None}

    def project(self, given):
        if given["project"] != "gap":
            return None
        wanted = json.loads(given["filters"] or "{}").get("jobType")
        nodes = [self.node(n, r) for n, r in self.runs.items() if wanted in (None, r["job_type"])]
        edges = [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes)]
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "internalId": "1",
            "runCount": len(nodes),
            "readOnly": False,
            "runs": {"edges": edges, "pageInfo": page},
        }

    def node(self, name, run):
        return {
            "projectId": "1",
            "id": name,
            "name": name,
            "displayName": name,
            "tags": run["tags"],
            "sweepName": None,
            "state": "finished",
            "config": json.dumps(run["config"]),
            "group": run["group"],
            "jobType": run["job_type"],
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "description": None,
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "user": {"name": "u", "username": "u"},
            "historyKeys": None,
        }

    def stream(self, name, body):
        run = self.run(name)
        files = body.get("files") or {}
        for file, part in files.items():
            lines = part["content"]
            if file == "wandb-history.jsonl":
                run["history"] |= {part["offset"] + i: json.loads(line) for i, line in enumerate(lines)}
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(lines[-1])
        run["uploads"] += bool(body.get("complete"))


@contextlib.contextmanager
def serving(answers=True):
    """The server, with its address; with `answers=False` it takes every request and says nothing."""
    fake, silent = FakeWandb(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            if not answers:
                silent.wait(60)
                return
            if self.path == "/graphql":
                said = {"data": fake.answer(body["query"], body.get("variables") or {})}
            else:
                fake.stream(self.path.split("/")[-2], body)
                said = {}
            self.say(said)

        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say({})

        def say(self, said):
            out = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield fake, fake.url
    finally:
        silent.set()
        server.shutdown()
        server.server_close()
