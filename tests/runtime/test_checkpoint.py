"""Checkpoint files: what is written reads back bit for bit, and nothing that was changed is taken."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_tcur_runtime.checkpoint import (
    FILES,
    Checkpoints,
    Progress,
    parse_checkpoint,
    serialize_checkpoint,
)
from edge_tcur_runtime.errors import (
    BadInputError,
    DiskError,
    EdgeError,
    FormatVersionError,
    IncompatibleError,
    IntegrityError,
)

IDENTITY = {"base": "sha256:1", "data": "sha256:2", "settings": "{}"}
FLOATS = st.floats(width=64)  # infinities and NaN too
ARRAYS = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=5),
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    max_size=3,
)


def progress_of(steps, **changes):
    values = {"group.core": np.full((2, 2, 2), float(steps)), "head.weight": np.arange(3.0)}
    moments = {name: value / 7 for name, value in values.items()}
    return Progress(
        **{
            "steps": steps, "values": values, "first": moments, "second": moments,
            "losses": tuple(1 / (n + 3) for n in range(steps)), "before": (0.5, 0.7), "micro_batch": 4,
            **changes,
        }
    )  # fmt: skip


def same(first, second):
    """Bit for bit."""
    for part in ("values", "first", "second", "best"):
        one, two = getattr(first, part), getattr(second, part)
        assert {name: (v.shape, v.tobytes()) for name, v in one.items()} == {
            name: (v.shape, v.tobytes()) for name, v in two.items()
        }
    for part in ("losses", "scores", "held_out_losses", "before", "after"):
        one, two = (
            None if value is None else [x.hex() for x in value]
            for value in (getattr(first, part), getattr(second, part))
        )
        assert one == two
    assert (first.steps, first.micro_batch) == (second.steps, second.micro_batch)
    assert first.predicted == second.predicted


@given(
    ARRAYS, ARRAYS, st.lists(FLOATS, max_size=5), st.none() | st.tuples(FLOATS, FLOATS),
    st.integers(1, 2**40), st.sampled_from([0, 2**28]),
)  # fmt: skip
@settings(max_examples=100)
def test_what_is_written_reads_back_bit_for_bit(values, moments, losses, pair, generation, predicted):
    progress = progress_of(
        3, values=values, first=moments, best=values, losses=tuple(losses), held_out_losses=tuple(losses),
        before=pair, after=pair, predicted=predicted,
    )  # fmt: skip
    raw = serialize_checkpoint(progress, IDENTITY, generation)
    found, identity, number = parse_checkpoint(raw, "here")
    same(found, progress)
    assert (identity, number) == (IDENTITY, generation)


def test_a_changed_byte_or_a_cut_is_never_taken():
    raw = serialize_checkpoint(progress_of(2), IDENTITY, 1)
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1
        with pytest.raises((BadInputError, IntegrityError, FormatVersionError)):
            parse_checkpoint(bytes(changed), "here")
        with pytest.raises((BadInputError, IntegrityError)):
            parse_checkpoint(raw[:place], "here")
    with pytest.raises(IntegrityError):
        parse_checkpoint(raw + b"\0", "here")


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200)
def test_any_bytes_are_refused_by_an_error_of_ours(content, signed):
    if signed:  # what follows the first line is what the digest promises, and no safetensors
        from edge_tcur_runtime.formats.digest import digest_bytes

        content = f"edge-tcur-checkpoint 1 {digest_bytes(content)} {len(content)}\n".encode() + content
    with pytest.raises(EdgeError) as caught:
        parse_checkpoint(content, "here")
    assert caught.value.exit_code != 1


def test_a_newer_version_is_refused():
    raw = serialize_checkpoint(progress_of(1), IDENTITY, 1)
    with pytest.raises(FormatVersionError, match="version 2 is newer than 1"):
        parse_checkpoint(raw.replace(b"checkpoint 1", b"checkpoint 2", 1), "here")


def opened(path, identity=None):
    checkpoints = Checkpoints(path, IDENTITY if identity is None else identity)
    checkpoints.hold()
    return checkpoints


def test_two_files_are_written_in_turn_and_the_newest_whole_one_holds(tmp_path):
    checkpoints = opened(tmp_path / "c")
    assert checkpoints.load() is None
    for steps in (1, 2, 3):
        checkpoints.save(progress_of(steps))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(FILES)
    assert {oct((tmp_path / "c" / name).stat().st_mode & 0o777) for name in FILES} == {"0o600"}
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    checkpoints.release()
    again = opened(tmp_path / "c")
    same(again.load(), progress_of(3))
    newest = max((tmp_path / "c" / name for name in FILES), key=lambda path: path.stat().st_size)
    newest.write_bytes(newest.read_bytes()[:-1])  # more losses: the newest is the longest
    again.release()
    older = opened(tmp_path / "c")
    same(older.load(), progress_of(2))
    assert "cut or altered; this copy is not used" in older.warnings[0]
    older.save(progress_of(9))  # over the damaged one
    older.release()
    whole = opened(tmp_path / "c")
    same(whole.load(), progress_of(9))
    assert whole.warnings == []
    whole.release()


def test_with_both_damaged_a_run_starts_over(tmp_path):
    checkpoints = opened(tmp_path)
    for steps in (1, 2):
        checkpoints.save(progress_of(steps))
    checkpoints.release()
    for name in FILES:
        (tmp_path / name).write_bytes(b"\0" * 64)
    damaged = opened(tmp_path)
    assert damaged.load() is None
    assert len(damaged.warnings) == 2
    damaged.release()


@pytest.mark.parametrize("key", IDENTITY)
def test_a_checkpoint_of_another_run_is_refused_and_what_differs_named(tmp_path, key):
    checkpoints = opened(tmp_path)
    checkpoints.save(progress_of(1))
    checkpoints.release()
    other = opened(tmp_path, {**IDENTITY, key: "other"})
    with pytest.raises(IncompatibleError, match=f"of another run: {key} differ") as caught:
        other.load()
    assert "--resume no" in caught.value.hint
    other.release()


def test_a_second_process_is_kept_out(tmp_path):
    checkpoints = opened(tmp_path / "c")
    code = (
        "import sys, pathlib\nfrom edge_tcur_runtime.checkpoint import Checkpoints\n"
        "from edge_tcur_runtime.errors import BadInputError\n"
        "try:\n    Checkpoints(pathlib.Path(sys.argv[1]), {}).hold()\n"
        "except BadInputError as error:\n    print(error)\n"
    )

    def other_process():
        command = [sys.executable, "-c", code, str(tmp_path / "c")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "another process is training" in other_process()
    checkpoints.release()
    assert other_process() == ""


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    checkpoints = opened(tmp_path)
    checkpoints.save(progress_of(1))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskError, match="No space left"):
            checkpoints.save(progress_of(2))
    checkpoints.release()
    again = opened(tmp_path)
    same(again.load(), progress_of(1))
    assert again.warnings == []
    again.save(progress_of(2))
    same(opened_again(again, tmp_path).load(), progress_of(2))


def opened_again(checkpoints, path):
    checkpoints.release()
    return opened(path)


def test_nothing_but_its_own_files_is_removed(tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.save(progress_of(1))
    (tmp_path / ".checkpoint-0.0123456789ab.tmp").write_bytes(b"left by a kill")
    (tmp_path / "mine").write_text("mine")
    checkpoints.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert checkpoints.load() is None
    checkpoints.release()
    Checkpoints(tmp_path, {}).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_removed_with_its_directory_while_another_process_waits(tmp_path):
    folder = tmp_path / "checkpoints" / "personal"
    checkpoints = opened(folder)
    checkpoints.save(progress_of(1))
    with pytest.raises(BadInputError, match="another process"):
        Checkpoints(folder, {}).remove()
    checkpoints.release()
    Checkpoints(folder, {}).remove()
    assert list(tmp_path.iterdir()) == []
    Checkpoints(folder, {}).remove()  # nothing there: nothing to do
    again = opened(folder)
    again.save(progress_of(2))
    assert folder.is_dir()


def test_a_link_or_a_pipe_in_the_place_of_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / FILES[0])
    with pytest.raises(BadInputError, match="not a regular file"):
        opened(tmp_path).load()


def test_not_a_number_survives():
    progress = progress_of(1, losses=(math.nan, -math.inf), before=(0.0, math.nan))
    same(parse_checkpoint(serialize_checkpoint(progress, IDENTITY, 1), "here")[0], progress)


def test_a_checkpoint_of_the_form_before_early_stopping_is_passed_over(tmp_path):
    """It lacks the held-out losses: the run starts over and says so."""
    from edge_tcur_runtime.formats.digest import digest_bytes

    content = serialize_checkpoint(progress_of(1), IDENTITY, 1).partition(b"\n")[2]
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b', \\"held_out_losses\\": []', b"")
    assert len(header) < size
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    line = f"edge-tcur-checkpoint 1 {digest_bytes(content)} {len(content)}\n"
    (tmp_path / FILES[0]).write_bytes(line.encode() + content)
    older = opened(tmp_path)
    assert older.load() is None
    assert "the field 'held_out_losses' is missing; this copy is not used" in older.warnings[0]
    older.release()
