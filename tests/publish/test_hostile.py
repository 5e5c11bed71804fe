"""What a hostile reviewer of the publisher asked."""

from __future__ import annotations

import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Signer

from edge_tcur.publish import repository as repository_module
from edge_tcur.publish.keys import KeyStore
from edge_tcur.publish.operations import rotate
from edge_tcur.publish.repository import Repository
from edge_tcur_runtime.errors import BadInputError, DiskError


class Killed(BaseException):
    pass


def open_repo(path):
    return Repository(path, KeyStore(path.with_name("repo.keys"), lambda role: b"correct horse battery"))


def dies_at(patch, number, error=Killed):
    """The `number`-th file of the repository is not written, but `error` raised; how many were asked for."""
    count = [0]
    write = repository_module.write_atomic

    def dying(*arguments, **options):
        count[0] += 1
        if count[0] == number:
            raise error
        write(*arguments, **options)

    patch.setattr(repository_module, "write_atomic", dying)
    return count


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("roles", [("timestamp",), ("targets", "snapshot", "timestamp"), ("root", "targets")])
def test_a_rotation_killed_at_any_write_can_be_read_and_run_again(
    ok, repo, bundle, adapters, tmp_path, roles, lost
):
    """A device that reads at that moment, new or old, takes it; and the publisher is not stuck."""
    ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    ok("update", bundle, "--url", repo)
    if lost:
        (tmp_path / "repo.keys" / f"{max(set(roles) - {'root'})}-1.pem").unlink()
    for name in ("repo", "repo.keys", "store"):
        shutil.copytree(tmp_path / name, tmp_path / "saved" / name, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        writes = dies_at(patch, 0)
        rotate(open_repo(repo), roles)
    assert writes[0] >= 2
    for number in range(1, writes[0] + 1):
        for name in ("repo", "repo.keys", "store"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(tmp_path / "saved" / name, tmp_path / name, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(patch, number)
            with pytest.raises(Killed):
                rotate(open_repo(repo), roles)
        assert not ok("update", bundle, "--url", repo)["changed"], number
        shutil.rmtree(tmp_path / "store")
        assert ok("update", bundle, "--url", repo)["changed"], number
        rotate(open_repo(repo), roles)
        assert not ok("update", bundle, "--url", repo)["changed"], number


class Token(Signer):
    """A signer of another library: it needs a PIN as a hardware token does, and can be pulled."""

    private = Ed25519PrivateKey.generate()
    pulled = False

    def __init__(self, inner):
        self._inner = inner

    @classmethod
    def from_priv_key_uri(cls, uri, public_key, secrets_handler=None):
        if secrets_handler is None or secrets_handler("PIN") != "1234":
            raise ValueError("wrong PIN")
        inner = CryptoSigner(cls.private)
        inner._public_key = public_key
        return cls(inner)

    @property
    def public_key(self):
        return self._inner.public_key

    def sign(self, payload):
        if self.pulled:
            raise RuntimeError("the token is not there")
        return self._inner.sign(payload)


@pytest.fixture
def token(monkeypatch, tmp_path, pem_files):
    """Options of a registered token with the PIN 1234."""
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "token", Token)
    monkeypatch.setattr(Token, "pulled", False)
    monkeypatch.setenv("EDGE_TCUR_PIN", "1234")
    return ("--signer", "token:1", "--public-key", pem_files(tmp_path, Token.private)[1])


def test_a_registered_signer_with_a_pin_does_everything(ok, call, repo, bundle, adapters, token, monkeypatch):
    ok("publish", "rotate", "targets", "--repo", repo, *token)
    added = ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    assert ok("update", bundle, "--url", repo)["active"] == added["digest"]
    ok("publish", "refresh", "--all", "--repo", repo)
    ok("publish", "withdraw", "banking", "1", "--repo", repo)
    assert ok("update", bundle, "--url", repo)["active"] is None
    monkeypatch.setattr(Token, "pulled", True)
    before = (repo / "metadata" / "timestamp.json").read_bytes()
    code, payload = call("publish", "add", adapters[1], "--repo", repo, "--name", "banking")
    assert (code, "not there" in payload["error"]["message"]) == (3, True)
    assert (repo / "metadata" / "timestamp.json").read_bytes() == before
    monkeypatch.delenv("EDGE_TCUR_PIN")
    code, payload = call("publish", "refresh", "--all", "--repo", repo)
    assert code == 2
    assert "EDGE_TCUR_PIN" in str(payload["error"])


def test_a_signer_of_another_key_is_refused_before_devices_see_it(call, repo, token, tmp_path, pem_files):
    other = tmp_path / "other"
    other.mkdir()
    public = pem_files(other, Ed25519PrivateKey.generate())[1]
    code, payload = call(
        "publish", "rotate", "targets", "--repo", repo, "--signer", "token:1", "--public-key", public
    )
    assert code == 3
    assert "public key" in payload["error"]["hint"]
    assert not (repo / "metadata" / "2.root.json").exists()


@pytest.mark.parametrize("uri", ["sigstore:?identity=a&issuer=b", "hsm:", "nonsense", "gnupg:ABCDEF01"])
def test_signers_that_are_not_there_are_refused_clearly(call, repo, tmp_path, pem_files, uri):
    public = pem_files(tmp_path, Ed25519PrivateKey.generate())[1]
    code, payload = call(
        "publish", "rotate", "targets", "--repo", repo, "--signer", uri, "--public-key", public
    )
    assert code == 3
    assert payload["error"]["hint"]
    assert not (repo / "metadata" / "2.root.json").exists()


def test_a_lost_repository_is_followed_by_a_new_one(ok, repo, bundle, adapters, tmp_path):
    """docs/ota.md, two root keys lost: the bundle ships the root of a new repository; the store stays."""
    ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    ok("publish", "rotate", "targets", "--repo", repo)
    ok("update", bundle, "--url", repo)
    new = tmp_path / "new"
    ok("publish", "init", new)
    added = ok("publish", "add", adapters[1], "--repo", new, "--base", bundle, "--name", "banking")
    ok("publish", "trust", bundle, "--repo", new)
    assert ok("update", bundle, "--url", new)["active"] == added["digest"]


@pytest.mark.parametrize("command", ["add", "withdraw", "refresh"])
def test_a_change_that_dies_at_any_write_leaves_the_state_before(
    ok, repo, bundle, adapters, tmp_path, command
):
    first = ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    arguments = {
        "add": ("add", adapters[1], "--base", bundle, "--name", "banking"),
        "withdraw": ("withdraw", "banking", "1"),
        "refresh": ("refresh", "--all"),
    }[command]

    for number in range(1, 4):
        with pytest.MonkeyPatch.context() as patch:
            dies_at(patch, number, DiskError("cannot write: No space left on device"))
            with pytest.raises((AssertionError, BadInputError)):
                ok("publish", *arguments, "--repo", repo)
        assert ok("update", bundle, "--url", repo)["active"] == first["digest"], number


def test_gnupg_says_what_to_use_instead(call, repo, tmp_path, pem_files):
    public = pem_files(tmp_path, Ed25519PrivateKey.generate())[1]
    options = ("--signer", "gnupg:ABCDEF01", "--public-key", public)
    error = call("publish", "rotate", "targets", "--repo", repo, *options)[1]["error"]
    assert "OpenPGP" in error["message"]
    assert "file2:" in error["hint"]


def names_of(ok, repo, role):
    status = ok("publish", "status", "--repo", repo)["roles"][role]
    return status["keys"], status["threshold"]


def test_a_repository_begins_with_keys_that_live_elsewhere(
    ok, call, bundle, adapters, token, tmp_path, pem_files
):
    """`init --signer ROLE=URI`: a token for targets, key files of others for the root."""
    pairs = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        pairs.append(pem_files(tmp_path / str(number), Ed25519PrivateKey.generate()))
    options = ["--signer", "targets=token:1", "--public-key", f"targets={token[3]}"]
    for key, public in pairs:
        options += ["--signer", f"root=file2:{key}", "--public-key", f"root={public}"]
    new = tmp_path / "new"
    made = ok("publish", "init", new, *options)
    assert made["keys"] == ["root-1", "root-2", "root-3", "targets-1", "snapshot-1", "timestamp-1"]
    files = sorted(path.name for path in (tmp_path / "new.keys").glob("*.pem"))
    assert files == ["root-3.pem", "snapshot-1.pem", "timestamp-1.pem"]
    assert names_of(ok, new, "root") == (["root-1", "root-2", "root-3"], 2)
    ok("publish", "trust", bundle, "--repo", new)
    added = ok("publish", "add", adapters[0], "--repo", new, "--base", bundle, "--name", "banking")
    assert ok("update", bundle, "--url", new)["active"] == added["digest"]
    pairs[0][0].unlink()  # one root key is lost: the other two do
    ok("publish", "rotate", "timestamp", "--repo", new)
    assert not ok("update", bundle, "--url", new)["changed"]


@pytest.mark.parametrize(
    "options",
    [
        ("--signer", "targets=file2:x"),
        ("--signer", "file2:x", "--public-key", "targets=x"),
        ("--signer", "mirror=file2:x", "--public-key", "mirror=x"),
        ("--signer", "targets=file2:x", "--public-key", "targets=x") * 2,
    ],
)
def test_signers_of_init_that_do_not_pair_up(call, tmp_path, options):
    assert call("publish", "init", tmp_path / "new", *options)[0] == 2
    assert not list(tmp_path.glob("*new*"))


def test_an_external_root_key_keeps_the_threshold_and_the_other_keys(ok, call, repo, bundle, token):
    """One key in the place of another; never 1 of 1 without a word."""
    rotate_root = ("publish", "rotate", "root", "--repo", repo, *token)
    assert call(*rotate_root, "--replaces", "root-9")[0] == 2
    ok(*rotate_root, "--replaces", "root-2")
    assert names_of(ok, repo, "root") == (["root-1", "root-3", "root-4"], 2)
    assert not ok("update", bundle, "--url", repo)["changed"]
    ok("publish", "rotate", "root", "--repo", repo)  # all of them new: the count stays
    assert names_of(ok, repo, "root") == (["root-5", "root-6", "root-7"], 2)
    ok("publish", "refresh", "--repo", repo)
    assert not ok("update", bundle, "--url", repo)["changed"]
    assert call("publish", "rotate", "targets", "--repo", repo, *token, "--replaces", "root-5")[0] == 2


def test_an_external_root_key_joins_the_others(ok, repo, bundle, token):
    ok("publish", "rotate", "root", "--repo", repo, *token)
    assert names_of(ok, repo, "root") == (["root-1", "root-2", "root-3", "root-4"], 2)
    assert not ok("update", bundle, "--url", repo)["changed"]


def test_a_wrong_passphrase_is_not_a_lost_key(ok, call, repo, monkeypatch):
    """Else a rotation would take the way of a lost key, of two roots."""
    monkeypatch.setenv("EDGE_TCUR_ROOT_PASSPHRASE", "correct horse battery")
    monkeypatch.setenv("EDGE_TCUR_PASSPHRASE", "wrong and long enough")
    code, payload = call("publish", "rotate", "timestamp", "--repo", repo)
    assert (code, payload["error"]["code"]) == (6, "integrity")
    assert "passphrase" in payload["error"]["hint"]
    assert not (repo / "metadata" / "2.root.json").exists()


def test_an_init_killed_at_any_write_is_run_again(ok, tmp_path):
    """Wherever it dies there is no half repository, and the same command then works."""
    import os

    from edge_tcur.publish import keys as keys_module

    def dying(patch, number):
        count = [0]

        def counted(real):
            def call(*arguments, **options):
                count[0] += 1
                if count[0] == number:
                    raise Killed
                return real(*arguments, **options)

            return call

        for owner, name in ((repository_module, "write_atomic"), (keys_module, "write_atomic")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(repository_module.os, "rename", counted(os.rename))
        return count

    with pytest.MonkeyPatch.context() as patch:
        writes = dying(patch, 0)
        open_repo(tmp_path / "whole").create(3, 2)
    assert writes[0] >= 15
    for number in range(1, writes[0] + 1):
        place = tmp_path / str(number) / "repo"
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, number)
            with pytest.raises(Killed):
                open_repo(place).create(3, 2)
        assert not place.exists(), number
        open_repo(place).create(3, 2)
        assert names_of(ok, place, "root") == (["root-1", "root-2", "root-3"], 2)
        ok("publish", "refresh", "--repo", place)
        assert sorted(path.name for path in place.parent.iterdir()) == ["repo", "repo.keys"], number


@pytest.mark.parametrize("renames", [None, 0, 1])
def test_an_empty_directory_becomes_the_repository_itself(ok, tmp_path, monkeypatch, renames):
    """It may be a mount, or where the user stands: it is filled, not replaced; also after a kill.

    `renames`: how many were done when it died (the keys, then the metadata); None: at the first write.
    """
    place = tmp_path / "repo"
    place.mkdir()
    monkeypatch.chdir(place)
    node, done, real = place.stat().st_ino, [], repository_module.os.rename

    def rename(*arguments):
        if len(done) == renames:
            raise Killed
        done.append(real(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        if renames is None:
            dies_at(patch, 1)
        patch.setattr(repository_module.os, "rename", rename)
        with pytest.raises(Killed):
            open_repo(place).create(3, 2)
    assert len(ok("publish", "init", ".")["keys"]) == 6
    assert place.stat().st_ino == node
    assert sorted(path.name for path in place.iterdir()) == ["metadata"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo", "repo.keys"]


def test_keys_with_a_keyring_of_another_repository_are_never_taken(call, repo, tmp_path):
    shutil.copytree(repo, tmp_path / ".new.init")
    assert call("publish", "init", tmp_path / "third")[0] == 0
    (tmp_path / "third.keys").rename(tmp_path / "new.keys")
    assert call("publish", "init", tmp_path / "new")[0] == 3
    assert not (tmp_path / "new").exists()


def test_keys_of_another_repository_are_never_taken(call, repo, tmp_path):
    """Leftovers of a killed `init` beside keys that are not theirs."""
    shutil.copytree(repo, tmp_path / ".new.init")
    (tmp_path / "new.keys").mkdir()
    (tmp_path / "new.keys" / "mine.pem").write_text("precious")
    assert call("publish", "init", tmp_path / "new")[0] == 3
    assert (tmp_path / "new.keys" / "mine.pem").read_text() == "precious"


def test_a_malformed_signed_catalogue_is_a_matter_of_trust(ok, call, repo, bundle, adapters):
    """On the device and at the publisher: 6, and what is in use stays."""
    from edge_tcur_runtime.formats.offer import EXTRA

    first = ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    ok("update", bundle, "--url", repo)
    opened = open_repo(repo)
    with opened.changing() as change:
        change.targets.signed.unrecognized_fields[EXTRA] = {"format_version": 1, "bases": 7}
    for arguments in (("update", bundle, "--url", repo), ("publish", "add", adapters[1], "--repo", repo)):
        code, payload = call(*arguments)
        assert (code, payload["error"]["code"]) == (6, "trust")
    assert ok("adapters", "list")["active"] == first["digest"]


def test_a_signed_file_that_is_no_adapter_is_a_matter_of_trust(ok, call, repo, bundle, adapters):
    from edge_tcur.publish import operations

    ok("publish", "add", adapters[0], "--repo", repo, "--base", bundle, "--name", "banking")
    with pytest.MonkeyPatch.context() as patch:
        real = Repository.add_file
        patch.setattr(
            operations.Repository, "add_file",
            lambda self, path, raw, **more: real(self, path, b"{}" + raw[:100], **more),
        )  # fmt: skip
        ok("publish", "add", adapters[1], "--repo", repo, "--base", bundle, "--name", "banking")
    code, payload = call("update", bundle, "--url", repo)
    assert (code, payload["error"]["code"]) == (6, "trust")


def test_a_bundle_over_the_limit_is_refused_before_its_first_chunk(
    ok, call, repo, bundle, make_server, tmp_path
):
    server = make_server(repo)
    published = ok("publish", "bundle", bundle, "--repo", repo)
    arguments = ("update", tmp_path / "fresh", "--install", "--url", server.url,
                 "--root", repo / "metadata" / "1.root.json")  # fmt: skip
    code, payload = call(*arguments, "--max-bundle", f"{published['bytes'] - 1}")
    assert (code, payload["error"]["code"]) == (2, "usage")
    assert "--max-bundle" in payload["error"]["hint"]
    assert not any("/chunks/" in path for path in server.requests)
    assert not (tmp_path / "fresh").exists()
    assert ok(*arguments, "--max-bundle", f"{published['bytes']}")["installed_bundle"]
