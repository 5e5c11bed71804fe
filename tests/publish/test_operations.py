"""What a publisher does, and what stops one."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_tcur.cli import edge_tcur
from edge_tcur.publish.keys import KeyStore
from edge_tcur.publish.operations import superseded
from edge_tcur.publish.repository import Repository
from edge_tcur_runtime.cli.framework import run
from edge_tcur_runtime.errors import DiskError
from edge_tcur_runtime.formats.offer import AdapterFacts, BaseFacts, Entry, Offer, adapter_path


def add(ok, repo, path, *more):
    return ok("publish", "add", path, "--repo", repo, "--name", "banking", *more)


def test_init_makes_keys_that_only_their_owner_reads_and_never_overwrites(ok, call, repo, tmp_path):
    keys = tmp_path / "repo.keys"
    files = sorted(path.name for path in keys.glob("*.pem"))
    assert files == [
        "root-1.pem",
        "root-2.pem",
        "root-3.pem",
        "snapshot-1.pem",
        "targets-1.pem",
        "timestamp-1.pem",
    ]
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for path in keys.glob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"BEGIN PRIVATE KEY" not in path.read_bytes()
    assert not any(
        "PRIVATE" in path.read_text(errors="replace") for path in repo.rglob("*") if path.is_file()
    )
    assert call("publish", "init", repo)[0] == 3
    assert call("publish", "init", tmp_path / "other", "--keys", keys)[0] == 3
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("keys", ["repo", "repo/inside"])
def test_keys_that_would_be_served_are_refused(call, tmp_path, keys):
    code, payload = call("publish", "init", tmp_path / "repo", "--keys", tmp_path / keys)
    assert (code, payload["error"]["code"]) == (2, "usage")
    assert not (tmp_path / "repo").exists()


def test_a_wrong_passphrase(call, repo, adapters, monkeypatch):
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", "something else")
    before = {
        path: path.read_bytes() for path in repo.rglob("*") if path.is_file() and "metadata" in str(path)
    }
    code, payload = call("publish", "add", adapters[0], "--repo", repo)
    assert (code, payload["error"]["code"]) == (6, "integrity")
    assert before == {path: path.read_bytes() for path in before}
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", "short")
    assert call("publish", "add", adapters[0], "--repo", repo)[0] == 2
    monkeypatch.delenv("EDGE_TCUR_PASSPHRASE")
    code, payload = call("publish", "add", adapters[0], "--repo", repo)
    assert (code, payload["error"]["code"]) == (2, "usage")


def test_passphrases_from_files_and_two_of_them(ok, call, tmp_path, monkeypatch, adapters):
    monkeypatch.delenv("EDGE_TCUR_PASSPHRASE")
    online, root = tmp_path / "online", tmp_path / "root"
    online.write_text("for the online keys\n")
    root.write_text("for the root keys\n")
    both = ("--passphrase-file", online, "--root-passphrase-file", root)
    ok("publish", "init", tmp_path / "r", *both)
    add(ok, tmp_path / "r", adapters[0], "--passphrase-file", online)
    assert (
        call("publish", "rotate", "timestamp", "--repo", tmp_path / "r", "--passphrase-file", online)[0] == 6
    )
    ok("publish", "rotate", "timestamp", "--repo", tmp_path / "r", *both)


def test_passphrases_are_asked_on_a_terminal_and_confirmed_for_new_keys(ok, tmp_path, monkeypatch):
    asked = []

    def prompt(text, **options):
        asked.append((text, options["hide_input"], options["confirmation_prompt"]))
        return "typed by hand"

    monkeypatch.delenv("EDGE_TCUR_PASSPHRASE")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("click.prompt", prompt)
    ok("publish", "init", tmp_path / "r")
    ok("publish", "refresh", "--repo", tmp_path / "r")
    assert asked == [
        ("Passphrase of the root's keys", True, True),
        ("Passphrase of the publisher's keys", True, True),
        ("Passphrase of the publisher's keys", True, False),
    ]


def test_versions_count_on_and_never_come_back(ok, call, repo, adapters):
    assert [add(ok, repo, path)["version"] for path in adapters[:2]] == [1, 2]
    ok("publish", "withdraw", "banking", 2, "--repo", repo)
    assert add(ok, repo, adapters[2])["version"] == 3
    code, payload = call("publish", "add", adapters[2], "--repo", repo, "--name", "again")
    assert (code, payload["error"]["code"]) == (3, "bad-input")
    assert "rollout" in payload["error"]["hint"]
    assert call("publish", "withdraw", "banking", 2, "--repo", repo)[0] == 2


def test_what_lines_have_in_common_is_signed_once_and_read_by_each(ok, repo, adapters):
    """Base, fit, rank and runtime: also while they change, and for the one line that differs."""
    import json

    def listed():
        return {
            a["name"]: (a["runtime"], a["rank"]) for a in ok("publish", "status", "--repo", repo)["adapters"]
        }

    def customs():
        newest = max(
            (repo / "metadata").glob("*.targets.json"), key=lambda path: int(path.name.split(".")[0])
        )
        return [t["custom"] for t in json.loads(newest.read_text())["signed"]["targets"].values()]

    for number, runtime in enumerate(("0.1.0", "0.0.9", "0.0.9", "0.1.0")):
        ok(
            "publish",
            "add",
            adapters[number],
            "--repo",
            repo,
            "--name",
            f"n{number}",
            "--min-runtime",
            runtime,
        )
    assert listed() == {"n0": ("0.1.0", 3), "n1": ("0.0.9", 3), "n2": ("0.0.9", 3), "n3": ("0.1.0", 3)}
    assert [len({"base", "fit", "rank"} & set(custom)) for custom in customs()] == [0, 0, 0, 0]
    assert sum("runtime" in custom for custom in customs()) == 2
    ok("publish", "rollout", "n0", 1, "50%", "--repo", repo)
    ok("publish", "withdraw", "n3", 1, "--repo", repo)
    assert listed() == {"n0": ("0.1.0", 3), "n1": ("0.0.9", 3), "n2": ("0.0.9", 3)}
    assert [custom.get("runtime") for custom in customs()] == ["0.1.0", None, None]


def test_the_card_says_what_it_is_and_its_digest_is_signed(ok, repo, bundle, adapters):
    from hashlib import sha256

    add(
        ok,
        repo,
        adapters[0],
        "--base",
        bundle,
        "--metric",
        "accuracy=0.93",
        "--data",
        "60 pictures",
        "--note",
        "N.",
    )
    card = (repo / "cards" / "banking-1.md").read_bytes()
    for text in (
        "# banking, version 1",
        "60 pictures",
        "accuracy: 0.9300",
        "rank 3",
        "sha256:602d2cf7",
        "N.",
    ):
        assert text in card.decode()
    assert str(repo.parent) not in card.decode()
    (targets,) = repo.glob("metadata/2.targets.json")
    assert sha256(card).hexdigest()[:32] in targets.read_text()


def test_the_metrics_of_the_run_are_taken(ok, repo, adapters, tmp_path):
    """A run directory as `train` writes it, beside the adapter."""
    from pathlib import Path

    from edge_tcur.settings import TrainConfig
    from edge_tcur.training.run import Run, write_run

    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter.safetensors").write_bytes(adapters[0].read_bytes())
    (run / "tokenizer.json").write_text("{}")
    config = TrainConfig(base="/home/anna/base", data="/home/anna/data.csv", task="image-classification")
    write_run(
        run,
        Run(run, config, ("a", "b"), "sha256:0", {}, {"accuracy": 0.875, "seconds": 12.0, "losses": [1.0]}),
    )
    added = ok("publish", "add", Path(run / "adapter.safetensors"), "--repo", repo)
    assert (added["name"], added["metrics"]) == ("adapter", {"accuracy": "0.8750"})
    card = (repo / "cards" / "adapter-1.md").read_text()
    assert "edge-tcur train --base base --data data.csv" in card
    assert "anna" not in card


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rollout", "101%"), ("--rollout", "x"), ("--metric", "accuracy"), ("--metric", "a=nan"),
        ("--name", "../x"),
        ("--min-runtime", "new"), ("--channel", "nightly"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_written(call, repo, adapters, arguments):
    code, _ = call("publish", "add", adapters[0], "--repo", repo, *arguments)
    assert code in (2, 3)
    assert not (repo / "targets").exists()


def test_an_adapter_that_does_not_work_with_the_bundle_is_not_published(call, repo, bundle, tmp_path):
    from pathlib import Path

    other = Path(__file__).parents[1] / "data" / "sketch-v1" / "adapter.safetensors"
    code, payload = call("publish", "add", other, "--repo", repo, "--base", bundle)
    assert (code, payload["error"]["exit_code"]) == (4, 4)
    assert not (repo / "targets").exists()


def test_a_changed_repository_is_not_signed_again(call, repo, adapters):
    path = repo / "metadata" / "1.targets.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    code, payload = call("publish", "add", adapters[0], "--repo", repo)
    assert (code, payload["error"]["code"]) == (6, "trust")


def test_rotation_is_followed_by_devices(ok, repo, bundle, adapters):
    first = add(ok, repo, adapters[0])
    ok("update", bundle, "--url", repo)
    for roles in (("timestamp",), ("targets", "snapshot", "timestamp"), ("root",)):
        ok("publish", "rotate", *roles, "--repo", repo)
    second = add(ok, repo, adapters[1])
    assert second["digest"] != first["digest"]
    assert ok("update", bundle, "--url", repo)["active"] == second["digest"]
    status = ok("publish", "status", "--repo", repo)
    assert status["roles"]["root"]["version"] == 4
    assert status["roles"]["root"]["keys"] == ["root-4", "root-5", "root-6"]
    assert status["roles"]["timestamp"]["keys"] == ["timestamp-3"]


def test_one_lost_root_key_is_replaced_and_two_cannot_be(ok, call, repo, tmp_path):
    keys, stick = tmp_path / "repo.keys", tmp_path / "stick"
    (keys / "root-2.pem").unlink()
    ok("publish", "rotate", "root", "--repo", repo)
    stick.mkdir()
    for name in ("root-4.pem", "root-5.pem", "root-6.pem"):
        (keys / name).rename(stick / name)
    code, payload = call("publish", "rotate", "timestamp", "--repo", repo)
    assert (code, payload["error"]["code"]) == (3, "bad-input")
    assert "--root-keys-at" in payload["error"]["hint"]
    ok("publish", "rotate", "timestamp", "--repo", repo, "--root-keys-at", stick)
    (stick / "root-4.pem").unlink()
    (stick / "root-6.pem").unlink()
    assert call("publish", "rotate", "timestamp", "--repo", repo, "--root-keys-at", stick)[0] == 3


def test_a_signer_of_securesystemslib(ok, call, repo, bundle, adapters, tmp_path, pem_files):
    """Here the simplest one, an unencrypted key file; a token or a KMS is the same to us."""
    key, public = pem_files(tmp_path, Ed25519PrivateKey.generate())
    options = ("--signer", f"file2:{key}", "--public-key", public)
    ok("publish", "rotate", "targets", "--repo", repo, *options)
    added = add(ok, repo, adapters[0])
    assert ok("update", bundle, "--url", repo)["active"] == added["digest"]
    key.unlink()
    assert call("publish", "add", adapters[1], "--repo", repo)[0] == 3
    assert call("publish", "rotate", "targets", "--repo", repo, "--signer", "file2:/x")[0] == 2


def test_refresh_signs_the_timestamp_always_and_the_others_when_due(ok, tmp_path, repo):
    assert ok("publish", "refresh", "--repo", repo)["signed"] == ["timestamp"]
    short = tmp_path / "short"
    ok("publish", "init", short, "--snapshot-days", "1", "--targets-days", "1")
    ring = tmp_path / "short.keys" / "keyring.json"
    ring.write_text(
        ring.read_text().replace('"snapshot": 1', '"snapshot": 30').replace('"targets": 1', '"targets": 9')
    )
    assert ok("publish", "refresh", "--repo", short)["signed"] == ["targets", "snapshot", "timestamp"]
    status = ok("publish", "status", "--repo", short)["roles"]
    assert (status["targets"]["version"], status["snapshot"]["version"]) == (2, 2)
    assert status["snapshot"]["days_left"] > 29
    assert ok("publish", "refresh", "--all", "--repo", short)["signed"][0] == "root"


def test_two_publishers_at_once(call, repo, tmp_path):
    with KeyStore(tmp_path / "repo.keys", lambda role: b"").locked():
        assert call("publish", "refresh", "--repo", repo)[0] == 3


def test_an_interrupted_publication_is_not_there(ok, call, repo, bundle, adapters):
    first = add(ok, repo, adapters[0])

    def full(*_):
        raise DiskError("cannot write: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repository, "publish_timestamp", full)
        assert call("publish", "add", adapters[1], "--repo", repo, "--name", "banking")[0] == 7
    assert ok("update", bundle, "--url", repo)["active"] == first["digest"]
    second = add(ok, repo, adapters[2])
    assert second["version"] == 2
    assert ok("update", bundle, "--url", repo)["active"] == second["digest"]


def test_trust_ships_the_root_once(ok, repo, bundle):
    before = (bundle / "manifest.json").read_bytes()
    ok("publish", "trust", bundle, "--repo", repo)
    assert (bundle / "manifest.json").read_bytes() == before
    assert (bundle / "trusted-root.json").read_bytes() == (repo / "metadata" / "1.root.json").read_bytes()


def test_what_nothing_refers_to_is_named_and_removed_later(ok, call, repo, bundle, adapters, tmp_path):
    """Chunks and index of a replaced bundle, and what an interrupted publication left."""
    add(ok, repo, adapters[0])
    ok("publish", "bundle", bundle, "--repo", repo, "--chunk", "16KiB")
    assert ok("publish", "status", "--repo", repo)["unreferenced"] == {}
    ok("publish", "bundle", bundle, "--repo", repo, "--chunk", "20KiB")
    left = ok("publish", "status", "--repo", repo)["unreferenced"]
    assert sum("/chunks/" in path for path in left) > 3
    assert sum("/bundles/" in path for path in left) == 1
    assert ok("publish", "clean", "--repo", repo)["removed"] == []  # it was replaced just now
    long_ago = time.time() - 8 * 86400
    for path in repo.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    fresh = repo / "targets" / "chunks" / "00" / ("0" * 64)  # of a publication that was broken off just now
    fresh.parent.mkdir(exist_ok=True)
    fresh.write_bytes(b"x")
    assert ok("publish", "clean", "--repo", repo)["removed"] == sorted(left)
    assert list(ok("publish", "status", "--repo", repo)["unreferenced"]) == [str(fresh.relative_to(repo))]
    root = repo / "metadata" / "1.root.json"
    result = ok("update", tmp_path / "fresh", "--install", "--url", repo, "--root", root)
    assert result["installed_bundle"]
    assert result["changed"]
    (index,) = (repo / "targets" / "bundles" / "bundle").iterdir()
    index.write_bytes(index.read_bytes() + b" ")
    assert call("publish", "clean", "--repo", repo)[0] == 6


BASE = BaseFacts("sha256:" + "0" * 64, "text-classification")
offers = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]), st.sampled_from(["stable", "beta"]), st.sampled_from([0, 5000, 10_000]),
        st.sampled_from(["0.1.0", "0.2.0"]), st.sampled_from(["f", "g"]),
    ),
    max_size=8,
)  # fmt: skip


@given(offers)
def test_no_device_loses_its_adapter_to_superseding(found):
    """Whatever a device could be offered before, its best version is still there after."""
    line = tuple(
        Offer(
            Entry(adapter_path(name, n), 1, "0" * 64),
            AdapterFacts(name, n, channel, rollout, BASE, fit, 1, 1, runtime),
        )
        for n, (name, channel, rollout, runtime, fit) in enumerate(found, start=1)
    )
    kept = [o for o in line if o not in superseded(line, "a")]
    assert [o for o in kept if o.facts.name == "b"] == [o for o in line if o.facts.name == "b"]
    for runtime in ("0.1.0", "0.2.0"):
        for fit in ("f", "g"):
            for part in (0, 5000):

                def best(those, runtime=runtime, fit=fit, part=part):
                    return max(
                        (o.facts.version for o in those if o.facts.name == "a" and o.facts.channel == "stable"
                         and o.facts.rollout > part and o.facts.runtime <= runtime and o.facts.fit == fit),
                        default=None,
                    )  # fmt: skip

                assert best(kept) == best(line)


def test_superseding_keeps_one_to_go_back_to():
    line = tuple(
        Offer(
            Entry(adapter_path("a", n), 1, "0" * 64),
            AdapterFacts("a", n, "stable", 10_000, BASE, "f", 1, 1, "0.1"),
        )
        for n in range(1, 6)
    )
    assert [o.facts.version for o in superseded(line, "a")] == [3, 2, 1]
    canary = replace(line[4], facts=replace(line[4].facts, rollout=100))
    assert [o.facts.version for o in superseded((*line[:4], canary), "a")] == [2, 1]


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_file_of_an_adapter_is_named_and_put_back(ok, call, repo, bundle, adapters, damage):
    added = ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "a")
    (place,) = (repo / "targets" / "adapters" / "a").iterdir()
    place.unlink() if damage == "missing" else place.write_bytes(b"x" * place.stat().st_size)
    assert ok("publish", "status", "--repo", repo)["damaged"] == [str(place.relative_to(repo))]
    again = ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "a")
    assert again["put_back"]
    assert not added["put_back"]
    assert again["version"] == added["version"]
    assert ok("update", bundle, "--url", repo)["active"] == added["digest"]
    assert ok("publish", "status", "--repo", repo)["damaged"] == []
    assert call("publish", "add", adapters[0], "--repo", repo)[0] == 3  # whole: published already


def test_damaged_chunks_are_named_and_repaired_by_publishing_the_bundle_again(
    ok, call, repo, bundle, tmp_path, capsys
):
    ok("publish", "bundle", bundle, "--repo", repo, "--chunk", "64KiB")
    root = repo / "metadata" / "1.root.json"
    chunks = [path for path in (repo / "targets" / "chunks").rglob("*") if path.is_file()]
    chunk = max(chunks, key=os.path.getsize)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    install = ("update", tmp_path / "fresh", "--install", "--url", repo, "--root", root)
    assert call(*install)[0] == 6
    lost = min(chunks, key=os.path.getsize)
    lost.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(edge_tcur, ["publish", "status", "--repo", str(repo)])
    told = capsys.readouterr().err
    for path in (chunk, lost):
        assert f"{path.relative_to(repo)} is missing or damaged; 'edge-tcur publish bundle'" in told
    assert "--name bundle" in told
    places = {str(path.relative_to(repo)) for path in (chunk, lost)}
    assert set(ok("publish", "status", "--repo", repo)["damaged"]) == places
    ok("publish", "bundle", bundle, "--repo", repo, "--chunk", "64KiB")
    assert ok("publish", "status", "--repo", repo)["damaged"] == []
    assert ok(*install)["installed_bundle"]


@pytest.mark.parametrize("path", ["adapters/banking/1.safetensors", "bundles/bundle/1.json"])
def test_files_of_a_newer_publishers_entries_are_left_alone(ok, repo, bundle, adapters, tmp_path, path):
    """What such an entry refers to is not known: its file, its card, the chunks of its index."""
    add(ok, repo, adapters[0])
    ok("publish", "bundle", bundle, "--repo", repo)
    add_unknown_field(repo, tmp_path / "repo.keys", path)
    long_ago = time.time() - 30 * 86400
    for file in repo.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    status = ok("publish", "status", "--repo", repo)
    assert status["unreferenced"] == {}
    assert list(status["skipped"]) == [path]
    assert ok("publish", "clean", "--repo", repo)["removed"] == []


def add_unknown_field(repo, keys, path):
    """Signs the entry at `path` with a field that only a newer version knows."""
    store = KeyStore(keys, lambda role: b"correct horse battery")
    with Repository(repo, store).changing() as change:
        change.targets.signed.targets[path].unrecognized_fields["custom"]["later"] = 1


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.root.json"])
def test_lost_metadata_say_what_to_restore(call, repo, name):
    (repo / "metadata" / name).unlink()
    code, payload = call("publish", "status", "--repo", repo)
    assert code == 3
    assert "the copy on your server" in payload["error"]["hint"]
