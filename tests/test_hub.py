"""`--push-to-hub` through huggingface_hub's own client, against a stand-in of the hub on this machine: who may not is told before any work, a new repository is private, the card arrives."""
import base64, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from seqwarm.batch import hub
from seqwarm.batch.cli import main
from seqwarm.core.card import Card, checksums
from seqwarm.core.errors import Refusal
from tiny import notebook

class Hub(BaseHTTPRequestHandler):
    "Knows one user, who has an organisation and one where they may only read; takes files whole."
    def log_message(self, *_): pass
    def answer(self, code: int, what) -> None:
        body = json.dumps(what).encode(); self.send_response(code)
        self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self):
        self.server.asked.append(("GET", self.path, None))
        if self.headers.get("Authorization") != "Bearer hf_good": return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path.startswith("/api/whoami"):
            return self.answer(200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": self.server.role}},
                                     "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "far", "roleInOrg": "read"}]})
        self.answer(200, {"id": "me/model", "sha": "0"*40, "siblings": [], "private": True})
    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)); path = self.path.partition("?")[0]
        lines = [json.loads(x) for x in raw.splitlines() if x.strip()] if path.endswith(("commit/main",)) else json.loads(raw or b"{}")
        self.server.asked.append(("POST", path, lines))
        if self.server.broken and "commit" in path: return self.answer(403, {"error": "quota exceeded"})
        if path.endswith("repos/create"): return self.answer(200, {"url": f"http://{self.headers['Host']}/me/model", "id": "me/model"})
        if "preupload" in path: return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines["files"]]})
        if "commit" in path: return self.answer(200, {"success": True, "commitUrl": f"http://{self.headers['Host']}/me/model/commit/" + "1"*40, "commitOid": "1"*40, "hookOutput": ""})
        self.answer(200, {"errors": [], "warnings": []})

@pytest.fixture
def server(monkeypatch):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub); made.asked, made.role, made.broken = [], "write", False
    thread = threading.Thread(target=made.serve_forever, daemon=True); thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}"); monkeypatch.setenv("HF_TOKEN", "hf_good"); monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"): monkeypatch.delenv(name, raising=False)
    yield made
    made.shutdown(); made.server_close()

def checkpoint(folder: Path) -> Path:
    "What looks like one: it has a card and a README, and something hidden."
    folder.mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("model.safetensors", "numbers"), ("README.md", "# toy\n"), (".lock", "")): (folder/name).write_text(text)
    Card("toy", "clp").sealed("w", checksums(folder)).write(folder)
    return folder

def sent(server) -> dict[str, bytes]:
    "The files of the one commit that was made."
    [lines] = [what for how, path, what in server.asked if path.endswith("/commit/main")]
    return {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}

def test_a_checkpoint_arrives_whole_in_a_private_repository(tmp_path, server):
    folder = checkpoint(tmp_path/"toy")
    hub.allowed("me/model"); hub.allowed("lab/model")
    assert server.asked and all(x[0] == "GET" for x in server.asked)        # nothing was made yet
    assert hub.push(folder, "me/model").endswith("me/model")
    assert sent(server) == {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    [made] = [what for _, path, what in server.asked if path.endswith("repos/create")]
    assert made.get("private") is True or made.get("visibility") == "private", made

@pytest.mark.parametrize("repo, token, role, says", [
    ("model", "hf_good", "write", "'model' cannot name a repository on the hub (it has no owner); write --push-to-hub USER/NAME"), ("a b/c", "hf_good", "write", "cannot name a repository"),
    ("me/model", "", "write", "nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"), ("me/model", "hf_old", "write", "the hub does not know who you are"),
    ("me/model", "hf_good", "read", "your token for the hub may only read; make one that may write"), ("you/model", "hf_good", "write", "me may not write to you on the hub; choose one of: me, lab"),
    ("far/model", "hf_good", "write", "me may not write to far on the hub")])
def test_who_may_not_is_told_before_any_work(tmp_path, server, monkeypatch, capsys, repo, token, role, says):
    server.role = role; monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_TOKEN", token)
    if not token: monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    nb = notebook(tmp_path/"10_tiny.ipynb")
    for command in (["run", str(nb)], ["graft", "encoder", "out"], ["clp", "a", "b", "out"], ["grow", "a", "out"], ["upcycle", "a", "out"], ["extract", "a", "out"]):
        assert main([*command, "--push-to-hub", repo]) == 2
        err = capsys.readouterr().err; assert says in err and len(err.splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10_tiny.ipynb"] and not [x for x in server.asked if x[0] == "POST"]

def test_an_upload_that_fails_leaves_the_checkpoint_and_says_how_to_go_on(tmp_path, server):
    server.broken = True; folder = checkpoint(tmp_path/"toy")
    with pytest.raises(hub.Failure, match=r"toy is written, but could not be uploaded \(.*\); to try again: hf upload me/model .*toy"): hub.push(folder, "me/model")
    assert (folder/"model.safetensors").exists()

def test_a_command_uploads_what_it_wrote_and_a_dry_run_nothing(tmp_path, server, capsys):
    def command(out: str, dry_run: bool = False) -> None:
        if not dry_run: checkpoint(Path(out))
    call = hub.pushing(command)
    call(out=str(tmp_path/"x"), dry_run=True, push_to_hub="me/model"); call(out=str(tmp_path/"y"))
    assert not [x for x in server.asked if x[0] == "POST"]
    call(out=str(tmp_path/"x"), push_to_hub="me/model")
    assert "README.md" in sent(server) and capsys.readouterr().out.startswith("uploaded to ")

def test_a_run_uploads_the_checkpoint_that_is_named(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path); nb = notebook(tmp_path/"10_tiny.ipynb"); asked = dict(recipe=str(nb), p=['["name", "one"]'], name=None, runs=None)
    with pytest.raises(Refusal, match="has 0 checkpoints; nothing was uploaded; leave"): hub.of_run(asked, None)
    real = checkpoint(tmp_path/"runs"/"store"/"x"); links = tmp_path/"runs"/"one"/"checkpoints"; links.mkdir(parents=True); (links/"clp-0").symlink_to(real)
    assert hub.of_run(asked, None) == real.resolve() == hub.of_run(asked, "clp-0")
    (links/"clp-1").symlink_to(real)
    with pytest.raises(Refusal, match="has 2 checkpoints.* one of: clp-0, clp-1"): hub.of_run(asked, None)
    with pytest.raises(Refusal, match="no checkpoint 'clp'"): hub.of_run(asked, "clp")
    with pytest.raises(Refusal, match="a checkpoint is named, and nothing is uploaded"): main_raises(["run", str(nb), "--checkpoint", "x"])

def main_raises(args: list[str]) -> None:
    import typer
    from seqwarm.batch.cli import app
    typer.main.get_command(app).main(args=args, standalone_mode=False)
