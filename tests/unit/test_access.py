"""API keys: what a file may hold, whose key is whose, and what changes without a restart."""

import hashlib
import logging
import os
import time
from pathlib import Path

import pytest

from trainer_service.access import ANYBODY, ApiKeys, Caller
from trainer_service.command_lines import SettingsError


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def rewrite(file: Path, text: str) -> None:
    """As an editor does: a new file in the place of the old."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, file)


def write_in_place(file: Path, text: str | bytes, *, age_s: float = 0) -> None:
    """As a shell's > does: the file that is there gets other content, last written to age_s ago."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    written_s = time.time() - age_s
    os.utime(file, (written_s, written_s))


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
        write_in_place(file, broken, age_s=10)
    for _ in range(3):
        assert named(keys, "k1").name == "alice"
        assert keys.find("root") is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    write_in_place(file, "bob k2\n", age_s=5)
    assert (keys.find("k1"), named(keys, "k2").name) == (None, "bob")


def test_a_file_written_in_place_counts_once_it_is_left_alone_and_half_of_it_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = key_file(tmp_path, "alice first-key\nbob k2\n")
    keys = ApiKeys(file=file)
    alice, bob = named(keys, "first-key"), named(keys, "k2")
    for written in ("", "alice fir", "alice first-key\nb", "alice first-key\n"):
        write_in_place(file, written)
        assert keys.find("fir") is None
        assert keys.still_opens(alice)
        assert keys.still_opens(bob)
    write_in_place(file, "alice first-key\ncarol k3", age_s=1.5)
    assert not keys.still_opens(bob)
    assert keys.still_opens(alice)
    assert named(keys, "k3").name == "carol"
    # A file system whose clock is ahead says nothing of how long ago it was written to.
    write_in_place(file, "alice first-key\n", age_s=-3600)
    assert keys.find("k3") is not None
    monkeypatch.setattr("trainer_service.access.SETTLE_S", 0)
    assert keys.find("k3") is None


def test_a_new_file_without_its_last_line_s_end_may_be_half_written(tmp_path: Path):
    file = key_file(tmp_path, "alice first-key\n")
    keys = ApiKeys(file=file)
    rewrite(file, "alice fir")
    assert keys.find("fir") is None
    assert keys.find("first-key") is not None
    rewrite(file, "alice second-key\n")
    assert keys.find("first-key") is None


def test_a_fifo_or_a_folder_in_the_file_s_place_holds_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = key_file(tmp_path, "alice k1\n")
    keys = ApiKeys(file=file)
    file.unlink()
    os.mkfifo(file)
    assert named(keys, "k1").name == "alice"
    with pytest.raises(SettingsError, match="is not a regular file"):
        ApiKeys(file=file)
    file.unlink()
    file.mkdir()
    assert named(keys, "k1").name == "alice"
    with pytest.raises(SettingsError, match="is not a regular file"):
        ApiKeys(file=file)
    assert len(caplog.records) == 1


def test_a_file_as_large_as_no_key_file_is_refused(tmp_path: Path):
    file = tmp_path / "keys"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)
    with pytest.raises(SettingsError, match="more than 4194304 bytes"):
        ApiKeys(file=file)


def test_a_comment_begins_where_a_word_could_and_a_key_may_hold_its_sign(tmp_path: Path):
    keys = ApiKeys(file=key_file(tmp_path, "alice kh#tag # hers\n#bob k2\n\t# carol k3\nk4# #\n"))
    assert named(keys, "kh#tag").name == "alice"
    assert named(keys, "k4#").name == "unnamed"
    for wrong in ("kh", "k2", "k3", "k4", "#", "hers"):
        assert keys.find(wrong) is None


def test_the_owner_of_a_key_without_a_name_tells_neither_it_nor_its_digest():
    plain, digested = ApiKeys(("k1",)), ApiKeys((hashed("k1"),))
    owner = named(plain, "k1").owner
    assert owner == named(digested, "k1").owner
    assert named(plain, "k1").digest.hex()[:8] not in owner
    with pytest.raises(SettingsError):
        ApiKeys((f"sha256:{owner.removeprefix('key:')}",))


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
