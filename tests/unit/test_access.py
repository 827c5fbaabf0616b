"""API keys: what a file may hold, whose key is whose, and what changes without a restart."""

import hashlib
import logging
import os
from pathlib import Path

import pytest

from trainer_service.access import ANYBODY, ApiKeys, Caller
from trainer_service.config import SettingsError


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def rewrite(file: Path, text: str) -> None:
    """As an editor does: a new file in the place of the old."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, file)


def key_file(folder: Path, text: str) -> Path:
    file = folder / "keys"
    file.write_text(text)
    return file


def named(keys: ApiKeys, key: str) -> Caller:
    caller = keys.find(key)
    assert caller is not None
    return caller


def test_a_file_names_keys_plain_or_hashed_and_admins(tmp_path: Path):
    file = key_file(tmp_path, f"# ours\nalice k1\n\nbob {hashed('k2')}  # theirs\nops k3 admin\nk4\n")
    keys = ApiKeys(file=file)
    assert keys.required
    assert [(named(keys, key).name, named(keys, key).admin) for key in ("k1", "k2", "k3", "k4")] == [
        ("alice", False),
        ("bob", False),
        ("ops", True),
        ("unnamed", False),
    ]
    for wrong in ("", "k", "k11", "alice", "alice k1", hashed("k2"), hashed("k1"), "é"):
        assert keys.find(wrong) is None


def test_the_environment_adds_keys_and_without_any_key_none_is_asked_for():
    keys = ApiKeys(("k1", "ops k2 admin"))
    assert (named(keys, "k1").name, named(keys, "k2").name) == ("unnamed", "ops")
    open_to_all = ApiKeys()
    assert not open_to_all.required
    assert open_to_all.still_opens(ANYBODY)


def test_keys_of_one_name_own_the_same_and_keys_without_one_own_apart():
    keys = ApiKeys(("alice k1", "alice k2", "k3", "k4"))
    assert named(keys, "k1").owner == named(keys, "k2").owner
    assert len({named(keys, key).owner for key in ("k1", "k3", "k4")}) == 3


def test_only_an_admin_sees_what_others_own():
    alice, ops = Caller(name="alice", owner="alice"), Caller(name="ops", owner="ops", admin=True)
    assert alice.may_see("alice")
    assert not alice.may_see("bob")
    assert not alice.may_see("")
    assert ops.may_see("alice")


def test_a_changed_file_counts_from_the_next_call_on(tmp_path: Path):
    file = key_file(tmp_path, "alice k1\nbob k2\n")
    keys = ApiKeys(file=file)
    alice, bob = named(keys, "k1"), named(keys, "k2")
    rewrite(file, "bob k2 admin\ncarol k3\n")
    assert keys.find("k1") is None
    assert not keys.still_opens(alice)
    assert not keys.still_opens(bob)  # The key is there, but its rights are others now.
    assert named(keys, "k2").admin
    assert named(keys, "k3").name == "carol"


def test_the_last_key_taken_out_opens_the_server_to_nobody_not_to_all(tmp_path: Path):
    file = key_file(tmp_path, "alice k1\n")
    keys = ApiKeys(file=file)
    rewrite(file, "# none\n")
    assert keys.find("k1") is None
    assert keys.find("") is None
    assert keys.required


@pytest.mark.parametrize("broken", [None, "alice k1 root\n", "a/b k1\n", "alice sha256:12\n", b"\xff\xfe\x00"])
def test_a_file_that_went_bad_changes_nothing_and_is_complained_of_once(
    broken: str | bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = key_file(tmp_path, "alice k1\n")
    keys = ApiKeys(file=file)
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    for _ in range(3):
        assert named(keys, "k1").name == "alice"
        assert keys.find("root") is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    rewrite(file, "bob k2\n")
    assert (keys.find("k1"), named(keys, "k2").name) == (None, "bob")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alice secret root", "line 1: must be `key`, `name key` or `name key admin`; got 3 words"),
        ("# x\nalice secret admin more", "line 2: .* got 4 words"),
        ("../up secret", "line 1: the name must be"),
        (f"{'x' * 65} secret", "line 1: the name must be"),
        ("alice sha256:secret", "line 1: sha256: must be followed by 64 hex digits"),
        ("# nothing", "has no key"),
    ],
)
def test_a_file_that_cannot_be_is_refused_naming_the_line_and_no_key(text: str, said: str, tmp_path: Path):
    with pytest.raises(SettingsError, match=said) as caught:
        ApiKeys(file=key_file(tmp_path, text))
    assert "secret" not in str(caught.value)


def test_nothing_printed_of_a_caller_tells_its_key_or_digest():
    caller = named(ApiKeys(("alice k1",)), "k1")
    assert "k1" not in repr(caller)
    assert caller.digest.hex() not in repr(caller)
    assert repr(caller.digest) not in repr(caller)
