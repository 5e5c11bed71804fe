"""From `edge-tcur publish` over a static HTTP server to `edge-tcur-device update`, as users run them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.errors import EdgeError
from edge_tcur_runtime.formats.bundle import open_bundle
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.offer import CanaryAnswers
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.update.fetch import Limits
from edge_tcur_runtime.update.run import UpdateSettings, run_update

PASSPHRASE = b"correct horse battery"
DATA = Path(__file__).parents[1] / "data"


def publish(ok, repo, bundle, path, *more):
    return ok("publish", "add", path, "--repo", repo, "--base", bundle, "--name", "banking", *more)


def test_publish_update_predict_withdraw(ok, repo, bundle, adapters, server):
    added = publish(ok, repo, bundle, adapters[0], "--metric", "accuracy=0.93", "--data", "bright columns")
    assert (added["version"], added["canary"], added["channel"]) == (1, True, "stable")
    result = ok("update", bundle, "--url", server.url)
    assert (result["action"], result["changed"], result["active"]) == ("install", True, added["digest"])
    assert result["health"] == "the signed answers on 2 canary samples"
    assert result["adapter"]["metrics"] == {"accuracy": "0.9300"}
    listed = ok("adapters", "list")
    assert (listed["active"], listed["adapters"][0]["name"]) == (added["digest"], "banking")
    answers = ok("predict", bundle, "--data", DATA / "user.npz")["predictions"]
    assert len(answers) == 80
    assert (
        answers == ok("predict", bundle, "--data", DATA / "user.npz", "--adapter", adapters[0])["predictions"]
    )
    ok("publish", "withdraw", "banking", 1, "--repo", repo)
    result = ok("update", bundle, "--url", server.url)
    assert (result["action"], result["active"], result["withdrawn"]) == ("base", None, added["digest"])


def test_what_an_update_costs(ok, repo, bundle, adapters, server):
    """At most the adapter plus 8 KiB in at most 6 requests; an unchanged check at most 3."""
    publish(ok, repo, bundle, adapters[0])
    ok("update", bundle, "--url", server.url)
    publish(ok, repo, bundle, adapters[1])
    server.reset()
    result = ok("update", bundle, "--url", server.url)
    assert result["requests"] == len(server.requests) <= 6
    assert result["received_bytes"] == server.sent <= adapters[1].stat().st_size + 8 * 2**10
    server.reset()
    result = ok("update", bundle, "--url", server.url)
    assert not result["changed"]
    assert len(server.requests) <= 3
    assert server.sent <= 2**10
    ok("publish", "rotate", "timestamp", "--repo", repo)
    publish(ok, repo, bundle, adapters[2])
    server.reset()
    assert ok("update", bundle, "--url", server.url)["changed"]
    assert len(server.requests) <= 6  # with a new root
    assert server.sent <= adapters[2].stat().st_size + 8 * 2**10


def test_a_page_instead_of_a_file_says_what_the_server_does_wrong(call, repo, bundle):
    (repo / "metadata" / "2.root.json").write_text("<html>not found</html>")
    code, payload = call("update", bundle, "--url", repo)
    assert (code, payload["error"]["code"]) == (6, "trust")
    assert "404" in payload["error"]["hint"]


def warnings_of_status(repo, capsys):
    """The lines that ``publish status`` warns with."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(edge_tcur, ["publish", "status", "--repo", str(repo)])
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_metadata_of_twenty_lines_leaves_room(repo, bundle, adapters, make_variant, monkeypatch, capsys):
    """What an update costs beside its adapter, for 1, 20 and 50 lines, without and with a new root."""
    from edge_tcur.publish import facts
    from edge_tcur.publish.facts import Description
    from edge_tcur.publish.keys import KeyStore
    from edge_tcur.publish.operations import add_adapter, metadata_size, rotate, status
    from edge_tcur.publish.repository import Repository

    answers = CanaryAnswers((0, 1, 2, 3), (3230, 5362, -1234, 12_345))  # as if it had four samples
    monkeypatch.setattr(facts, "canary_answers", lambda *_: answers)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    opened = Repository(repo, KeyStore(repo.with_name("repo.keys"), lambda _role: PASSPHRASE))
    rotate(opened, ("timestamp",))
    root = len(opened.root_bytes())
    sizes = {}
    for number in range(50):
        path = adapters[0].with_name(f"line-{number}.safetensors")
        path.write_bytes(make_variant(100 + number))
        add_adapter(opened, path, Description(metrics={"accuracy": 0.9312}), bundle)
        sizes[number + 1] = metadata_size(status(opened)[1])
        if number + 1 in (25, 26):
            told = warnings_of_status(repo, capsys)
            assert len(told) == number + 1 - 25, (number + 1, told)
    assert "with 26 adapters listed" in told[0]
    assert "more than 8.0 KiB; take out those that no device needs ('edge-tcur publish withdraw" in told[0]
    print("lines | metadata | with a new root")
    for lines in (1, 2, 18, 20, 26, 50):
        print(f"{lines:5} | {sizes[lines]:8} | {sizes[lines] + root:8}")
    assert sizes[20] <= 7 * 2**10, sizes
    assert sizes[18] + root <= 8 * 2**10, (sizes, root)


def test_nothing_about_the_device_is_sent(ok, repo, bundle, adapters, server, tmp_path):
    publish(ok, repo, bundle, adapters[0])
    ok("update", bundle, "--url", server.url)
    identity = json.loads((tmp_path / "store" / "update" / "state-0.json").read_text())["device_id"]
    for headers in server.headers:
        assert set(headers) <= {"Host", "User-Agent", "Accept-Encoding"}
        assert identity not in str(headers)
    assert not any(identity in path for path in server.requests)


PURE = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cryptography", "torch"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
from edge_tcur_runtime.cli import main
sys.argv = ["edge-tcur-device", *sys.argv[1:]]
main()
"""


def test_a_device_without_cryptography_and_torch_verifies(ok, call, repo, bundle, adapters, server, tmp_path):
    """In pure Python, in a process of its own: it takes what is signed and refuses what is not."""
    added = publish(ok, repo, bundle, adapters[0])
    command = [sys.executable, "-c", PURE, "update", str(bundle), "--url", server.url, "--json"]

    def run():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    code, result = run()
    assert (code, result["active"]) == (0, added["digest"])
    publish(ok, repo, bundle, adapters[1])
    path = repo / "metadata" / "timestamp.json"
    document = json.loads(path.read_text())
    document["signed"]["expires"] = "2999-01-01T00:00:00Z"
    path.write_text(json.dumps(document))
    code, result = run()
    assert (code, result["error"]["code"]) == (6, "trust")


def test_a_stick_instead_of_a_network(ok, call, repo, bundle, adapters, tmp_path, monkeypatch):
    added = publish(ok, repo, bundle, adapters[0])
    stick = tmp_path / "my stick"
    shutil.copytree(repo, stick)
    monkeypatch.setattr("socket.socket", lambda *_: pytest.fail("a socket was opened"))
    code, error = call("update", bundle, "--url", "http://127.0.0.1:1/", "--offline")
    assert (code, error["error"]["code"]) == (2, "usage")
    result = ok("update", bundle, "--url", stick.as_uri(), "--offline")
    assert result["active"] == added["digest"]


def spoil(repo, names):
    for path in repo.rglob(names):
        path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("change", "code", "kind"),
    [
        (lambda repo, url: (url, repo.rename(repo.with_name("gone"))), 8, "network"),
        (lambda repo, url: ("http://127.0.0.1:9/", None), 8, "network"),
        (lambda repo, url: (url, spoil(repo, "timestamp.json")), 6, "trust"),
        (lambda repo, url: (url, spoil(repo, "*.safetensors")), 6, "trust"),
        (lambda repo, url: ("ftp://example.org/", None), 2, "usage"),
        (lambda repo, url: ("/no/such/directory", None), 3, "bad-input"),
    ],
)  # fmt: skip
def test_bad_input_has_its_exit_code_and_advice(ok, call, repo, bundle, adapters, server, change, code, kind):
    first = publish(ok, repo, bundle, adapters[0])
    ok("update", bundle, "--url", server.url)
    publish(ok, repo, bundle, adapters[1])
    url, _ = change(repo, server.url)
    found, payload = call("update", bundle, "--url", url)
    assert (found, payload["error"]["code"]) == (code, kind)
    assert payload["error"]["hint"]
    assert ok("adapters", "list")["active"] == first["digest"]


def test_a_full_disk(ok, call, repo, bundle, adapters, server, monkeypatch):
    import os

    publish(ok, repo, bundle, adapters[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, payload = call("update", bundle, "--url", server.url)
    assert (code, payload["error"]["code"]) == (7, "disk")


def test_an_adapter_for_another_base_is_skipped(ok, repo, bundle, adapters, server):
    other = DATA / "sketch-v1" / "adapter.safetensors"
    assert ok("publish", "add", other, "--repo", repo, "--name", "other")["canary"]  # the bundle beside it
    result = ok("update", bundle, "--url", server.url)
    assert (result["action"], result["active"]) == ("nothing", None)
    (why,) = result["skipped"].values()
    assert "another base" in why
    assert not any(path.endswith(".safetensors") for path in server.requests)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_bundle_is_installed_in_chunks_and_a_broken_download_goes_on(
    ok, call, repo, bundle, adapters, make_server, tmp_path, ranges
):
    server = make_server(repo, ranges=ranges)
    published = ok("publish", "bundle", bundle, "--repo", repo, "--chunk", "16KiB")
    added = publish(ok, repo, bundle, adapters[0])
    root = repo / "metadata" / "1.root.json"
    target = tmp_path / "fresh" / "bundle"
    target.parent.mkdir()
    arguments = ("update", target, "--install", "--url", server.url, "--root", root)
    chunks = 0

    def cut(handler, content):
        nonlocal chunks
        if "/chunks/" in handler.path:
            chunks += 1
            if chunks == 5:
                return content[: len(content) // 2]
        return content

    server.fault = cut
    code, payload = call(*arguments)
    assert (code, payload["error"]["code"]) == (8, "network")
    assert not target.exists()
    first = server.sent
    server.reset()
    result = ok(*arguments)
    assert result["installed_bundle"]["size"] == published["bytes"]
    assert server.sent < published["bytes"] + 16 * 2**10  # nothing that had arrived was fetched again
    assert server.sent + first < published["bytes"] + 48 * 2**10
    assert result["active"] == added["digest"]
    assert open_bundle(target).manifest.base_digest == open_bundle(bundle).manifest.base_digest
    assert digest_file(target / "base.bin") == digest_file(bundle / "base.bin")
    server.reset()
    ok("update", target, "--url", server.url)
    assert not any("/chunks/" in path or "/bundles/" in path for path in server.requests)


def test_a_changed_chunk_is_refused(ok, call, repo, bundle, server, tmp_path):
    ok("publish", "bundle", bundle, "--repo", repo)
    chunk = max(
        (repo / "targets" / "chunks").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
    target = tmp_path / "fresh"
    root = repo / "metadata" / "1.root.json"
    code, payload = call("update", target, "--install", "--url", server.url, "--root", root)
    assert (code, payload["error"]["code"]) == (6, "trust")
    assert not target.exists()
    code, payload = call("update", target, "--install", "--url", server.url)
    assert (code, payload["error"]["code"]) == (2, "usage")


def test_two_hundred_devices_update_through_one_server_with_random_faults(
    ok, repo, bundle, adapters, server, tmp_path, monkeypatch
):
    """All end on the right adapter, none ever on an unverified one."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    first = publish(ok, repo, bundle, adapters[0])
    home = tmp_path / "home"
    run_update(bundle, home, UpdateSettings(url=str(repo)), health=lambda *_: "looks well")
    second = publish(ok, repo, bundle, adapters[1], "--rollout", "50%")
    generator, lock = random.Random(7), threading.Lock()

    def fault(handler, content):
        with lock:
            dice, place = generator.random(), generator.random()
        if dice < 0.10:
            return None  # the connection ends after the headers
        if dice < 0.20:
            return content[: int(len(content) * place)]
        if dice < 0.25 and content:
            spot = int(len(content) * place)
            return content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :]
        return content

    server.fault = fault
    settings = UpdateSettings(url=server.url, limits=Limits(total_seconds=30, silence_seconds=5))
    allowed = {first["digest"], second["digest"]}

    def one(number):
        store = tmp_path / "devices" / str(number)
        shutil.copytree(home, store, symlinks=True)
        for path in (store / "update").glob("state-?.json"):
            path.unlink()  # an id of its own
        errors = []
        for _ in range(40):
            try:
                result = run_update(bundle, store, settings, health=lambda *_: "looks well")
            except EdgeError as error:
                errors.append(error.code)
                assert Store.open(store).active_digest() in allowed
                continue
            return result.active, errors, result.decision.skipped
        return None, errors, {}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(200)))
    codes = {code for _, errors, _ in results for code in errors}
    assert codes == {"network", "trust"}
    new = sum(active == second["digest"] for active, *_ in results)
    held = sum(active == first["digest"] and any("50 %" in why for why in skipped.values())
               for active, _, skipped in results)  # fmt: skip
    assert new + held == 200
    assert 70 <= new <= 130  # half of them, each by its own random number


def test_from_a_text_run_to_a_device(ok, repo, tmp_path, bert_dir, texts_csv):
    """`train`, `export`, `publish` and `update` in a row, with the defaults: tokenizer and labels fit."""
    run, bundle = tmp_path / "run", tmp_path / "texts"
    ok("train", "--base", bert_dir, "--data", texts_csv, "--rank", 2, "--epochs", 1, "--out", run)
    ok("export", run, "--out", bundle, "--target", "onnx")
    ok("publish", "trust", bundle, "--repo", repo)
    added = ok("publish", "add", run / "adapter.safetensors", "--repo", repo, "--channel", "stable")
    assert (added["name"], added["task"], added["canary"]) == ("adapter", "text-classification", False)
    result = ok("update", bundle, "--url", repo)
    assert (result["active"], result["skipped"]) == (added["digest"], {})
    assert result["health"].startswith("finite outputs")
    answers = ok("predict", bundle, "--text", "where is my card")["predictions"]
    assert answers[0]["label"] in ("card", "money")
    card = (repo / "cards" / "adapter-1.md").read_text()
    assert "--base bert --data texts.csv" in card
