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


@pytest.mark.parametrize("uri", ["sigstore:?identity=a&issuer=b", "hsm:", "nonsense"])
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
