"""What a trainer may answer that means harm: nothing it says is a path, a size it keeps to, or a terminal's command."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from gradwire import ServiceClient
from gradwire._client import downloads
from gradwire._client.transport import Connection
from gradwire._wire import delta
from gradwire.errors import DataLossError, GradwireError, error, to_status
from gradwire.v1 import checkpoint_service_pb2 as pb
from gradwire.v1 import trainer_service_pb2 as trainer_pb
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_KIND_SAMPLER_WEIGHTS, Checkpoint, CheckpointFile
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceServicer, add_CheckpointServiceServicer_to_server
from gradwire.v1.run_pb2 import Run
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceServicer, add_TrainerServiceServicer_to_server
from grpc_status import rpc_status

from tests.cli import gradwire, refusal

PATH, BASE = "gradwire://run-1/sampler_weights/a", "gradwire://run-1/sampler_weights/b"
CLEAR = "\x1b[2J"
TURNED = "\u202e"


class Hostile(CheckpointServiceServicer, TrainerServiceServicer):
    """Answers what a test tells it to.

    Attributes:
        checkpoints: By path.
        contents: Of files, by name: the pieces sent.
        sent_bytes: So far.
    """

    def __init__(self) -> None:
        self.url = ""
        self.checkpoints: dict[str, Checkpoint] = {}
        self.contents: dict[str, Iterable[bytes]] = {}
        self.sent_bytes = 0
        self.refusal: GradwireError | None = None

    def put(self, files: dict[str, bytes], *, path: str = PATH, **fields: Any) -> Checkpoint:
        """A checkpoint of these files."""
        self.contents |= {name: [content] if content else [] for name, content in files.items()}
        made = self.checkpoints[path] = Checkpoint(
            **({"path": path, "name": "a", "kind": CHECKPOINT_KIND_SAMPLER_WEIGHTS} | fields)
        )
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            made.files.append(CheckpointFile(name=name, size_bytes=len(content), sha256=digest))
        return made

    def GetCheckpoint(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self.refusal is not None:
            context.abort_with_status(rpc_status.to_status(to_status(self.refusal)))
        return pb.GetCheckpointResponse(checkpoint=self.checkpoints[request.path])

    def ListCheckpoints(self, request: Any, context: Any) -> Any:
        return pb.ListCheckpointsResponse(checkpoints=self.checkpoints.values())

    def ListRuns(self, request: Any, context: Any) -> Any:
        run = Run(run_id=CLEAR, display_name=TURNED, created_at=Timestamp(seconds=1 << 60))
        run.state = 77  # pyright: ignore[reportAttributeAccessIssue]
        return trainer_pb.ListRunsResponse(runs=[run])

    def DownloadCheckpoint(self, request: Any, context: Any) -> Any:
        for piece in self.contents[request.file]:
            self.sent_bytes += len(piece)
            yield pb.DownloadCheckpointResponse(data=piece)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    made = Hostile()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_CheckpointServiceServicer_to_server(made, server)
    add_TrainerServiceServicer_to_server(made, server)
    made.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    server.stop(None).wait(10)


@pytest.fixture
def connection(hostile: Hostile) -> Iterator[Connection]:
    made = Connection(hostile.url)
    yield made
    made.close()


NAMES = ["../a", "<tmp_path>/outside", "a/../../b", "..", ".", "", "a//b", "a\\b", "C:b", "a\0b", "a\nb", ".bashrc"]
NAMES += ["x/.ssh/keys", "n" * 300, "a/" * 40 + "b", f"a{CLEAR}", f"a{TURNED}b"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_file_leads_out_of_the_folder_or_to_a_hidden_file(
    hostile: Hostile, connection: Connection, tmp_path: Path, name: str
):
    hostile.put({"good": b"good", name.replace("<tmp_path>", str(tmp_path)): b"evil"})
    for fetch in (downloads.download, downloads.export):
        with pytest.raises(DataLossError, match="is no name of a file in a folder"):
            fetch(connection, PATH, tmp_path / "in" / "here")
    # Not even what comes before it.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_in_the_folder_is_no_way_out_of_it(hostile: Hostile, connection: Connection, tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    hostile.put({"link/a": b"evil"})
    with pytest.raises(DataLossError, match="leads out of the folder over a link"):
        downloads.download(connection, PATH, tmp_path / "in")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["../../../outside", "<tmp_path>/outside", "a\0b", "", "n" * 5000])
def test_the_name_of_a_checkpoint_is_no_path_of_a_folder(
    hostile: Hostile, connection: Connection, tmp_path: Path, name: str
):
    name = name.replace("<tmp_path>", str(tmp_path))
    for path in (PATH, BASE):
        hostile.put({"delta.json": b"{}"}, path=path, name=name, base_path=BASE if path == PATH else "")
    with pytest.raises(DataLossError, match=r"delta\.json is not as it was written"):
        downloads.export(connection, PATH, tmp_path / "in" / "here")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["in", "in/here"]


def test_no_more_is_written_than_was_said(hostile: Hostile, connection: Connection, tmp_path: Path):
    hostile.put({"model.safetensors": b"x" * 26})
    mebibyte = b"x" * (1 << 20)
    hostile.contents["model.safetensors"] = (mebibyte for _ in range(400))
    with pytest.raises(DataLossError, match="came with another content than the trainer says"):
        downloads.download(connection, PATH, tmp_path)
    assert list(tmp_path.iterdir()) == []
    # What the connection's own buffers took, and not all there was.
    assert hostile.sent_bytes < 200 << 20


def test_a_trainer_that_sends_nothing_for_ever_is_not_listened_to(
    hostile: Hostile, connection: Connection, tmp_path: Path
):
    hostile.put({"a": b"x"})
    hostile.contents["a"] = (b"" for _ in range(10_000_000))
    with pytest.raises(DataLossError):
        downloads.download(connection, PATH, tmp_path)


def export_refusal(hostile: Hostile, folder: Path) -> str:
    """The last line of an export that is refused."""
    return gradwire(hostile.url, "export", PATH, folder, code=1).stderr.splitlines()[-1]


def sound(**changes: Any) -> dict[str, Any]:
    entry = {"size_bytes": 4, "sha256": hashlib.sha256(b"abcd").hexdigest()} | changes
    return {"base": {"path": BASE, "files": {"m.safetensors": ""}}, "files": {"m.safetensors": entry}}


def renamed(name: str) -> dict[str, Any]:
    one = sound()
    return {"base": {"path": BASE, "files": {name: ""}}, "files": {name: one["files"]["m.safetensors"]}}


NESTED = b"[" * 100_000
DESCRIPTIONS: dict[str, object] = {
    "nested": NESTED,
    "a list": [],
    "a text": {"base": "", "files": ""},
    "null": {"base": {"path": BASE, "files": None}, "files": None},
    "numbers": {"base": {"path": BASE, "files": {"m.safetensors": 1}}, "files": sound()["files"]},
    "no size": {"base": sound()["base"], "files": {"m.safetensors": {}}},
    "a size below 0": sound(size_bytes=-1),
    "a size beyond all": sound(size_bytes=1 << 70),
    "a size that is true": sound(size_bytes=True),
    "a NUL": renamed("a\0.safetensors"),
    "a way out": renamed("../a.safetensors"),
    "a hidden file": renamed(".a.safetensors"),
}


@pytest.mark.parametrize("which", DESCRIPTIONS)
def test_a_delta_that_says_nonsense_is_damaged_and_no_traceback(hostile: Hostile, tmp_path: Path, which: str):
    said = DESCRIPTIONS[which]
    content = said if isinstance(said, bytes) else json.dumps(said).encode()
    hostile.put({"delta.json": content, "delta.safetensors": b""}, base_path=BASE)
    hostile.put({"m.safetensors": b"abcd"}, path=BASE)
    assert "delta.json is not as it was written" in export_refusal(hostile, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def header(encoded: bytes) -> bytes:
    return len(encoded).to_bytes(8, "little") + encoded


@pytest.mark.parametrize(
    "tensors",
    [
        header(NESTED),
        header(b"[]"),
        header(b"{}"),
        header(b'{"m.safetensors#0": {"data_offsets": [-5, 3]}}'),
        header(b'{"m.safetensors#0": {"data_offsets": [3, 0]}}'),
        header(b'{"m.safetensors#0": {"data_offsets": [0, 1180591620717411303424]}}'),
        header(b'{"m.safetensors#0": {"data_offsets": [1180591620717411303424, 1180591620717411303424]}}'),
        header(b'{"m.safetensors#0": {"data_offsets": [0.5, true]}}'),
        header(b'{"m.safetensors#0": {"data_offsets": null}}'),
        b"\xff" * 8,
        b"",
    ],
)
def test_chunks_of_a_delta_that_are_none_are_damage(hostile: Hostile, tmp_path: Path, tensors: bytes):
    described = sound(sha256="")
    described["base"]["files"]["m.safetensors"] = hashlib.sha256(b"abcd").hexdigest()
    hostile.put({"delta.json": json.dumps(described).encode(), "delta.safetensors": tensors}, base_path=BASE)
    hostile.put({"m.safetensors": b"abcd"}, path=BASE)
    assert "delta.safetensors is not as it was written" in export_refusal(hostile, tmp_path / "out")


def test_a_delta_without_its_chunks_is_damaged(hostile: Hostile, tmp_path: Path):
    hostile.put({"delta.json": json.dumps(sound()).encode()}, base_path=BASE)
    hostile.put({"m.safetensors": b"abcd"}, path=BASE)
    assert f"{delta.TENSORS} is not as it was written" in export_refusal(hostile, tmp_path / "out")


def test_no_text_of_a_trainer_steers_the_terminal(hostile: Hostile, tmp_path: Path):
    evil = f"{CLEAR}{TURNED}\x9b5n\r\a\x7f"
    hostile.put({"a": b"x"}, base_model=evil, architecture=evil, base_path=evil)
    outputs = [
        gradwire(hostile.url, "runs", "list"),
        gradwire(hostile.url, "checkpoints", "list"),
        gradwire(hostile.url, "checkpoints", "show", PATH),
        gradwire(hostile.url, "checkpoints", "show", PATH, "--json"),
    ]
    hostile.put({"a": b"x"}, path=evil)
    hostile.checkpoints[PATH] = hostile.checkpoints[evil]
    outputs.append(gradwire(hostile.url, "checkpoints", "download", PATH, tmp_path))
    hostile.refusal = error("CHECKPOINT_NOT_FOUND", f"There is none.{evil}")
    outputs.append(gradwire(hostile.url, "checkpoints", "show", PATH, code=1))
    for done in outputs:
        for text in (done.stdout, done.stderr):
            assert all(char.isprintable() or char == "\n" for char in text), text
    assert "\\x1b[2J\\u202e\\x9b5n\\r\\x07\\x7f" in outputs[-1].stderr
    with ServiceClient(hostile.url) as service, pytest.raises(GradwireError) as caught:
        service.checkpoints.get(PATH)
    assert str(caught.value).isprintable()


def test_a_time_that_is_none_is_no_traceback(hostile: Hostile):
    hostile.put({"a": b"x"}, created_at=Timestamp(seconds=1 << 60), expires_at=Timestamp(seconds=-(1 << 60)))
    assert "  ?  " in gradwire(hostile.url, "checkpoints", "list").stdout
    assert "The trainer answered what cannot be shown" in refusal(hostile.url, "checkpoints", "show", PATH)
    with ServiceClient(hostile.url) as service, pytest.raises(GradwireError, match="created_at that is no time"):
        service.checkpoints.get(PATH)


def test_a_path_copied_from_a_trainer_is_no_folder_either(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("gradwire://run-1/sampler_weights/..", "gradwire://run-1/sampler_weights/.ssh"):
        hostile.put({"a": b"x"}, path=path)
        gradwire(hostile.url, "checkpoints", "download", path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "here",
        "here/checkpoint",
        "here/checkpoint/a",
    ]
