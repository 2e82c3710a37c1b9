"""Models by hub id: downloads, revisions and offline mode, against a hub of this test's own."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import hf_reference
import huggingface_hub.constants
import numpy as np
import pytest

from opsdc_jax.config import InputError
from opsdc_jax.models import hf, weights

ID = "someone/qwen3-small"
EXTRA = {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"}


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot download speaks, for one repository.

    `commits` maps a commit to its files, `names` a branch or tag to a commit.
    """

    commits: dict[str, dict[str, bytes]]
    names: dict[str, str]
    asked: list[str]
    tokens: list[str | None]

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.asked.append(path)
        self.tokens.append(self.headers.get("Authorization"))
        revision, _, file = path.removeprefix(f"/{ID}/resolve/").partition("/")
        if path.startswith(f"/api/models/{ID}/revision/"):
            commit = self._commit(path.rpartition("/")[2])
            files = [{"rfilename": name} for name in self.commits.get(commit, ())]
            self._json(commit and {"id": ID, "sha": commit, "siblings": files})
        elif path.startswith(f"/api/models/{ID}/tree/"):
            files = self.commits.get(self._commit(path.rpartition("/")[2]))
            self._json(
                files
                and [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
            )
        else:
            data = self.commits.get(self._commit(revision), {}).get(file)
            self._answer(data, {"X-Repo-Commit": self._commit(revision)})

    do_HEAD = do_GET

    def _commit(self, revision):
        return self.names.get(revision, revision if revision in self.commits else "")

    def _json(self, value):
        self._answer(json.dumps(value).encode() if value else None, {})

    def _answer(self, data, headers):
        self.send_response(200 if data is not None else 404)
        data = data or b""
        headers |= {"Content-Length": str(len(data)), "ETag": f'"{_digest(data)}"'}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            # The client may hang up on a file that it has by another way.
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(data)

    def log_message(self, *_):
        pass


def _digest(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two commits: main, and the one tagged v1, whose weights are another model's."""
    files = {}
    for commit, name in (("a" * 40, "untied"), ("b" * 40, "tied")):
        folder = hf_reference.write_folder(tmp_path / name, name)
        files[commit] = {path.name: path.read_bytes() for path in folder.iterdir()} | EXTRA
    handler = type(
        "Hub",
        (_Hub,),
        {
            **{"commits": files, "names": {"main": "a" * 40, "v1": "b" * 40}},
            **{"asked": [], "tokens": []},
        },
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{repo_id}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/" + "".join(template[1:])
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def loaded(path):
    folder = hf.resolve_folder(path)
    config = hf.load_config(folder)
    return config, weights.load_params(folder, config)


@pytest.mark.parametrize(
    ("path", "name"),
    [(ID, "untied"), (f"{ID}@v1", "tied"), (f"{ID}@{'b' * 40}", "tied")],
)
def test_a_revision_is_respected(hub, path, name):
    config, params = loaded(path)
    expected = hf_reference.load(name)
    assert config.tie_word_embeddings == expected.config.tie_word_embeddings
    np.testing.assert_array_equal(params["embedding"], expected.params["embedding"])


def test_code_and_pickles_are_not_downloaded(hub):
    folder = hf.resolve_folder(ID)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert not any(name in request for request in hub.asked for name in EXTRA)


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be had from the hub"):
        hf.resolve_folder(ID)
    assert not hub.asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = hf.resolve_folder(f"{ID}@v1")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hf.resolve_folder(f"{ID}@v1") == online
    assert not hub.asked


def test_the_token_goes_to_the_hub_and_into_no_message(hub, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_TOKEN", "canary")
    caplog.set_level("DEBUG")
    hf.resolve_folder(ID)
    with pytest.raises(InputError) as caught:
        hf.resolve_folder("someone/else")
    assert "Bearer canary" in hub.tokens
    assert "canary" not in "".join([str(caught.value), *capfd.readouterr(), caplog.text])


@pytest.mark.parametrize("path", [f"{ID}@v2", "someone/else"])
def test_what_the_hub_does_not_have_is_one_sentence(hub, path):
    with pytest.raises(InputError, match="cannot be had from the hub") as caught:
        hf.resolve_folder(path)
    assert "\n" not in str(caught.value)
