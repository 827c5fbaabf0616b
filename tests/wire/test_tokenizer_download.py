"""get_tokenizer against a trainer with a fake worker, and against trainers that lie."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from gradwire import ServiceClient
from gradwire._client.tokenizer_client import fetch_tokenizer, load_tokenizer
from gradwire._client.transport import Connection
from gradwire._wire.tokenizer_files import MAX_FILE_BYTES
from gradwire.errors import DataLossError, NotFoundError, ResourceExhaustedError
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceServicer, add_TrainerServiceServicer_to_server
from gradwire.v1.worker_service_pb2 import WorkerReady

from tests.fakes import READY
from tests.front_end import FrontEnd, front_end, front_end_on_a_thread


def serving(trainer: FrontEnd, folder: Path) -> None:
    """Its worker says that the model lies there."""
    trainer.worker.ready = WorkerReady(model=READY.model, losses=READY.losses, model_folder=str(folder))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADWIRE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@contextmanager
def connected(address: str) -> Iterator[Connection]:
    connection = Connection(f"http://{address}")
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def trainer_of(folder: Path) -> Iterator[Connection]:
    with front_end_on_a_thread() as trainer, connected(trainer.address) as connection:
        serving(trainer, folder)
        yield connection


def kept(home: Path) -> list[str]:
    return sorted(os.listdir(home / "tokenizers")) if (home / "tokenizers").exists() else []


def test_the_tokenizer_comes_from_the_trainer_and_is_kept_by_content(home: Path, model: Path):
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}", timeout_s=20) as service:
        serving(trainer, model)
        client = service.create_training_client()
        tokenizer = client.get_tokenizer()
        # Of a folder that only the trainer has: base_model is "fake", which no hub and no folder here knows.
        assert tokenizer.decode(tokenizer("Hello")["input_ids"]) == "Hello"
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
            "Hi<|im_end|>"
        )
        (digest,) = kept(home)
        folder = home / "tokenizers" / digest
        assert [folder.stat().st_mode & 0o777, folder.parent.stat().st_mode & 0o777] == [0o700, 0o700]
        assert not list(folder.glob("*.safetensors"))
        inode = folder.stat().st_ino
        sampler = service.create_sampling_client()
        assert sampler.get_tokenizer()("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
        assert (kept(home), folder.stat().st_ino) == ([digest], inode)
        # A copy that was damaged is brought anew; another tokenizer is another folder.
        (folder / "tokenizer.json").write_text("{}")
        assert client.get_tokenizer()("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
        (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        assert client.get_tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
        assert len(kept(home)) == 2


def test_several_may_bring_the_same_tokenizer_at_once(home: Path, model: Path):
    with trainer_of(model) as connection, futures.ThreadPoolExecutor(4) as pool:
        folders = [made.result(60) for made in [pool.submit(fetch_tokenizer, connection) for _ in range(8)]]
        assert len(set(folders)) == 1
        assert kept(home) == [folders[0].name]
        # Nothing whole is replaced: somebody may be reading it.
        inode = (folders[0] / "tokenizer.json").stat().st_ino
        assert (fetch_tokenizer(connection) / "tokenizer.json").stat().st_ino == inode


def test_templates_beside_the_first_come_along_and_no_other_file(home: Path, model: Path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (model / "additional_chat_templates" / "notes.txt").write_text("private")
    (model / "private.json").write_text("private")
    with trainer_of(model) as connection:
        folder = fetch_tokenizer(connection)
        assert load_tokenizer(connection).get_chat_template("tools") == "tools"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert found == expected | {"additional_chat_templates/tools.jinja"}


async def test_only_a_tokenizers_files_are_handed_out(tiny_llama: Path):
    names = ("model.safetensors", "../secret", "/etc/passwd", "", "tokenizer.json\n" + "x" * 4000)
    async with front_end() as trainer:
        serving(trainer, tiny_llama)
        for name in names:
            call = trainer.stub.DownloadTokenizer(pb.DownloadTokenizerRequest(file=name))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            details = caught.value.details() or ""
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "it must be one of config.json, tokenizer.json" in details
            assert len(details) < 1000


def test_a_model_without_a_tokenizer_says_so(home: Path, model: Path):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / file).unlink()
    with trainer_of(model) as connection, pytest.raises(NotFoundError, match="has no tokenizer") as caught:
        load_tokenizer(connection)
    assert caught.value.reason == "TOKENIZER_NOT_FOUND"


def test_a_tokenizer_too_large_is_not_handed_out(home: Path, model: Path):
    with (model / "vocab.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with trainer_of(model) as connection, pytest.raises(ResourceExhaustedError, match="bytes in one file; at most"):
        load_tokenizer(connection)


def test_while_the_model_loads_the_tokenizer_is_waited_for(home: Path, model: Path):
    with front_end_on_a_thread() as trainer, connected(trainer.address) as connection:
        trainer.worker.ready = None
        with futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fetch_tokenizer, connection)
            assert not futures.wait([waiting], 0.3).done
            serving(trainer, model)
            assert (waiting.result(60) / "tokenizer.json").is_file()


# ── trainers that lie ─────────────────────────────────────────────────────────────────────────────────────────────────


class Liar(TrainerServiceServicer):
    """Answers as it was told."""

    def __init__(self, files: list[pb.TokenizerFile], content: dict[str, bytes]) -> None:
        self._files, self._content = files, content
        self.sent_bytes = 0

    def GetTokenizer(self, request: Any, context: Any) -> pb.GetTokenizerResponse:
        return pb.GetTokenizerResponse(files=self._files)

    def DownloadTokenizer(self, request: Any, context: Any) -> Iterator[pb.DownloadTokenizerResponse]:
        data = self._content[request.file]
        for start in range(0, len(data), 1 << 16):
            self.sent_bytes += len(data[start : start + (1 << 16)])
            yield pb.DownloadTokenizerResponse(data=data[start : start + (1 << 16)])


@contextmanager
def liar(files: list[pb.TokenizerFile], content: dict[str, bytes]) -> Iterator[tuple[Connection, Liar]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Liar(files, content)
    add_TrainerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connected(f"127.0.0.1:{port}") as connection:
            yield connection, servicer
    finally:
        server.stop(None).wait()


def file_of(name: str, data: bytes, **changes: Any) -> pb.TokenizerFile:
    fields = {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return pb.TokenizerFile(**fields | changes)


@pytest.mark.parametrize(
    "name",
    [
        "../tokenizer.json",
        "/tmp/tokenizer.json",
        "tokenizer.json\0",
        "tokenizer.json\n",
        "additional_chat_templates/../../x.jinja",
        "additional_chat_templates/",
        "additional_chat_templates",
        ".",
        "",
        "tokenization_evil.py",
        "model.safetensors",
        "x" * 100_000,
    ],
)
def test_a_name_that_is_none_of_a_tokenizers_is_refused_and_nothing_written(home: Path, name: str):
    files = [file_of("tokenizer.json", b"{}"), file_of(name, b"x")]
    with liar(files, {}) as (connection, _), pytest.raises(DataLossError, match="no file of a tokenizer") as caught:
        fetch_tokenizer(connection)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert kept(home) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (list, "says 0 files"),
        (lambda: [file_of("vocab.txt", b"a"), file_of("vocab.txt", b"b")], "2 files by 1 names"),
        (lambda: [file_of("vocab.txt", b"", size_bytes=MAX_FILE_BYTES + 1)], "more than are taken"),
        (lambda: [file_of(f"{n}.json", b"", size_bytes=MAX_FILE_BYTES) for n in range(3)], "more than are taken"),
        (lambda: [file_of(f"additional_chat_templates/{n}.jinja", b"") for n in range(65)], "more than are taken"),
    ],
)
def test_more_than_a_tokenizer_has_is_refused(home: Path, files: Callable[[], list[pb.TokenizerFile]], message: str):
    with liar(files(), {}) as (connection, _), pytest.raises(DataLossError, match=message):
        fetch_tokenizer(connection)


def test_a_file_longer_than_it_was_said_to_be_is_cut_off(home: Path):
    with liar([file_of("vocab.txt", b"12345")], {"vocab.txt": bytes(64 << 20)}) as (connection, servicer):
        with pytest.raises(DataLossError, match=r"sent more of vocab.txt than the 5 bytes it said"):
            fetch_tokenizer(connection)
        assert servicer.sent_bytes < 32 << 20
    assert kept(home) == []


@pytest.mark.parametrize("sent", [b"other", b"", b"1234"])
def test_a_file_of_another_content_is_refused(home: Path, sent: bytes):
    trainer = liar([file_of("vocab.txt", b"12345")], {"vocab.txt": sent})
    with trainer as (connection, _), pytest.raises(DataLossError, match="vocab.txt with another content"):
        fetch_tokenizer(connection)
    assert kept(home) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"fast_tokenizer_files": ["../../tokenizer.1.json"]}', "lead out of its folder"),
        (b"[" * 200_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
    ],
)
def test_a_config_that_leads_elsewhere_is_refused(home: Path, config: bytes, message: str):
    content = {"tokenizer_config.json": config}
    trainer = liar([file_of(name, data) for name, data in content.items()], content)
    with trainer as (connection, _), pytest.raises(DataLossError, match=message):
        fetch_tokenizer(connection)
    assert kept(home) == []


def test_code_that_a_tokenizer_names_is_never_run(home: Path, tiny_llama: Path, tmp_path: Path):
    """Neither from the hub nor from the trainer, and whatever is answered on a terminal."""
    trap = tmp_path / "ran"
    config = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    content = {
        "tokenizer.json": (tiny_llama / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    files = [file_of(name, data) for name, data in content.items()]
    with liar(files, content) as (connection, _):
        folder = fetch_tokenizer(connection)
        # As if an attacker had got it there some other way.
        (folder / "tokenization_evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_tokenizer(connection)
    assert not trap.exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADWIRE_HOME", str(tmp_path / "file"))
    with trainer_of(tiny_llama) as connection, pytest.raises(OSError, match=str(tmp_path / "file")):
        fetch_tokenizer(connection)
