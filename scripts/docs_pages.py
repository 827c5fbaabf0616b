"""The page of the documentation that nobody writes by hand: protocol.md, out of protos/ (a hook, see mkdocs.yml)."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# mkdocs loads this file by its path, not as a module beside others.
sys.path.insert(0, str(Path(__file__).parent))
from gen_protos import compile_protos

PACKAGE = "gradwire.v1"
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
"""Numbers of FileDescriptorProto's fields, of which paths to comments are made."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of the protocol."""
    files.append(File.generated(config, "protocol.md", content=protocol_page()))
    return files


def protocol_page() -> str:
    """The page of the wire: every service, message and enum of the package, as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "all.pb"
        compile_protos(f"--descriptor_set_out={found}", "--include_source_info")
        described = FileDescriptorSet.FromString(found.read_bytes())
    lines = [
        "# Protocol",
        "",
        f"Package `{PACKAGE}`, from `protos/gradwire/v1`. Every call can be typed by hand with grpcurl; a field that "
        "is `optional` tells 0 from absent.",
    ]
    files = [file for file in described.file if file.package == PACKAGE]
    for file in sorted(files, key=lambda file: (not file.service, file.name)):
        lines += ["", f"## {Path(file.name).name}", "", *_file(file)]
    return "\n".join(lines) + "\n"


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    for number, service in enumerate(file.service):
        yield from _service(service, comments, (_SERVICE, number))
    for number, message in enumerate(file.message_type):
        yield from _message(message, comments, (_MESSAGE, number))
    for number, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (_ENUM, number), enum.name)


def _service(
    service: ServiceDescriptorProto, comments: Mapping[tuple[int, ...], str], path: tuple[int, ...]
) -> Iterator[str]:
    yield from (f"### {service.name}", "", _text(comments.get(path)), "")
    for number, method in enumerate(service.method):
        asked, answered = _short(method.input_type), _short(method.output_type)
        asked, answered = (
            f"stream {name}" if streams else name
            for name, streams in ((asked, method.client_streaming), (answered, method.server_streaming))
        )
        yield from (f"**{method.name}** (`{asked}`) → `{answered}`", "")
        yield from (_text(comments.get((*path, 2, number))), "")


def _message(
    message: DescriptorProto, comments: Mapping[tuple[int, ...], str], path: tuple[int, ...], within: str = ""
) -> Iterator[str]:
    name = f"{within}{message.name}"
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    yield from (f"### {name}", "", _text(comments.get(path)), "")
    if message.field:
        yield from ("| Field | Type | Meaning |", "|---|---|---|")
        for number, field in enumerate(message.field):
            meaning = _text(comments.get((*path, 2, number))).replace("|", "\\|").replace("\n", " ")
            yield f"| `{field.name}` = {field.number} | {_type(field, message, maps)} | {meaning} |"
        yield ""
    for number, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, comments, (*path, 3, number), f"{name}.")
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, comments, (*path, 4, number), f"{name}.{enum.name}")


def _enum(
    enum: EnumDescriptorProto, comments: Mapping[tuple[int, ...], str], path: tuple[int, ...], name: str
) -> Iterator[str]:
    yield from (f"### {name}", "", _text(comments.get(path)), "", "| Value | Meaning |", "|---|---|")
    for number, value in enumerate(enum.value):
        meaning = _text(comments.get((*path, 2, number))).replace("|", "\\|").replace("\n", " ")
        yield f"| `{value.name}` = {value.number} | {meaning} |"
    yield ""


def _type(field: FieldDescriptorProto, message: DescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    own = field.type_name.rpartition(".")[2]
    if own in maps:
        key, value = maps[own].field
        return f"map of {_plain(key)} to {_plain(value)}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {_plain(field)}"
    if field.proto3_optional:
        return f"optional {_plain(field)}"
    if field.HasField("oneof_index"):
        return f"{_plain(field)}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return _plain(field)


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return f"`{_short(field.type_name)}`"
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _short(name: str) -> str:
    return name.removeprefix(f".{PACKAGE}.").removeprefix(".")


def _text(comment: str | None) -> str:
    """A comment as Markdown: what looks like a tag or a placeholder stays text."""
    return (comment or "").strip().replace("<", "&lt;").replace("\n ", "\n")
