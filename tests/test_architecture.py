"""The rooms, and the doors between them: imports run one way (trainer_service/, sdk/gradwire/)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "trainer_service"
SDK = ROOT / "sdk" / "gradwire"

GROUND = {
    "access",
    "adapter_folders",
    "addresses",
    "atomic_folders",
    "certificates",
    "config",
    "open_files",
    "executing",
    "gateway_child",
    "network_interfaces",
    "join_token",
    "model_folder",
    "ports",
    "http_protocols",
    "http_server",
    "metrics_server",
    "logs",
    "metrics",
    "command_lines",
    "paths",
    "processes",
    "field_limits",
    "served_model",
    "tracing",
    "startup_checks",
    "user_metadata",
    "worker_config",
    "worker_frames",
}
"""Imported by all; import only each other."""
ROOF = {"trainer": {"rpc", "runs", "fleet", "checkpoints"}, "control_plane": {"rpc", "jobs"}}
"""What builds a whole server, and the rooms it builds it of; __main__ alone imports it."""
DOORS = {
    **ROOF,
    "rpc": {"runs", "fleet", "jobs", "checkpoints"},
    "page": {"runs", "fleet", "checkpoints"},
    "runs": {"fleet", "checkpoints"},
    "fleet": set(),
    "checkpoints": set(),
    "jobs": set(),
    "engine": set(),
    "gateway": set(),
}
"""Room to the rooms it may import, beside its own and the ground floor."""
ENGINE_FLOORS = (
    "counters",
    "freed_memory",
    "device",
    "products",
    "row_sums",
    "findings",
    "rank_store_client",
    "rank_channels",
    "tensor_files",
    "losses",
    "spinning",
    "packed",
    "fused",
    "parallel",
    "models",
    "memory",
    "loss_totals",
    "validation",
    "microbatch",
    "step_bounds",
    "optim",
    "run_state",
    "passes",
    "base_models",
    "adapter_offload",
    "storage",
    "engine",
    "sampling",
    "worker",
    "__main__",
)
"""What engine/ is built of, from the ground up: each file or wing imports only what stands before it."""
WIRE_HALF = {"gradwire.v1", "gradwire._wire", "gradwire.errors", "gradwire.types"}
"""What the server may import of the SDK."""
TORCH = {"torch", "transformers", "safetensors", "peft", "accelerate"}


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, full name) of everything a file imports, inside functions too; TYPE_CHECKING blocks left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            # `from package import module` may import a module; both spellings are looked at.
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def server_files() -> list[Path]:
    return sorted(SERVER.rglob("*.py"))


def room_of(file: Path) -> str:
    """ "rpc" for trainer_service/trainer.py, "config" for trainer_service/config.py."""
    return file.relative_to(SERVER).parts[0].removesuffix(".py")


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def complaints(file: Path, allowed: set[str]) -> list[str]:
    """Imports of our own that the file's room has no door to."""
    return [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(file)
        if within(name, {"trainer_service", "gradwire"}) and not within(name, allowed)
    ]


def test_the_server_imports_through_its_doors_only():
    ground = {f"trainer_service.{name}" for name in GROUND}
    wrong: list[str] = []
    for file in server_files():
        room = room_of(file)
        if room in ("__main__", "__init__"):
            continue
        assert room in DOORS or room in GROUND, f"trainer_service/{room} is a room without a place in this test"
        rooms = {f"trainer_service.{name}" for name in DOORS.get(room, set()) | ({room} - GROUND)}
        wrong += complaints(file, ground | rooms | WIRE_HALF)
    assert wrong == []


def test_the_engine_is_built_from_the_ground_up():
    wrong: list[str] = []
    for file in sorted((SERVER / "engine").rglob("*.py")):
        floor = file.relative_to(SERVER / "engine").parts[0].removesuffix(".py")
        if floor == "__init__":
            continue
        assert floor in ENGINE_FLOORS, f"trainer_service/engine/{floor} has no place in this test"
        below = {*ENGINE_FLOORS[: ENGINE_FLOORS.index(floor)]} | ({floor} if file.parent.name == floor else set())
        wrong += [
            f"{file.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imports(file)
            if within(name, {"trainer_service.engine"}) and name.split(".")[2] not in below
        ]
    assert wrong == []


def test_only_the_wirer_imports_the_roof():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in server_files()
        if room_of(file) not in ("__main__", *ROOF)
        for line, name in imports(file)
        if within(name, {f"trainer_service.{roof}" for roof in ROOF})
    ]
    assert wrong == []


def test_nobody_imports_engine_or_the_wirer():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in server_files()
        if room_of(file) != "engine"
        for line, name in imports(file)
        if within(name, {"trainer_service.engine", "trainer_service.__main__"})
    ]
    assert wrong == []


def test_torch_is_for_engine_alone():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in server_files()
        if room_of(file) != "engine"
        for line, name in imports(file)
        if within(name, TORCH)
    ]
    assert wrong == []


def test_the_sdk_knows_no_server_and_imports_torch_only_inside_functions():
    wrong: list[str] = []
    for file in sorted(SDK.rglob("*.py")):
        wrong += [
            f"{file.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imports(file)
            if within(name, {"trainer_service"})
        ]
        top_level = {node.lineno for node in ast.parse(file.read_text()).body}
        wrong += [
            f"{file.relative_to(ROOT)}:{line} imports {name} when it is imported"
            for line, name in imports(file)
            if within(name, TORCH) and line in top_level
        ]
    assert wrong == []


def test_the_wire_half_stands_alone():
    """The server loads it, so it must not pull the client half in by itself."""
    files = [SDK / "errors.py", *sorted((SDK / "_wire").rglob("*.py")), *sorted((SDK / "types").rglob("*.py"))]
    assert [line for file in files for line in complaints(file, WIRE_HALF)] == []


def modules_after(code: str) -> set[str]:
    """Names of the modules a fresh interpreter has after running `code`."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(printed.stdout.split())


def test_import_gradwire_is_light():
    loaded = modules_after("import gradwire")
    assert {name for name in loaded if within(name, TORCH | {"trainer_service", "opentelemetry"})} == set()


@pytest.mark.parametrize(
    "module",
    [
        "trainer_service.__main__",
        "trainer_service.trainer",
        "trainer_service.control_plane",
        "trainer_service.page.server",
        "trainer_service.runs.registry",
        "trainer_service.fleet.supervisor",
        "trainer_service.fleet.joining",
        "trainer_service.jobs.local",
        "trainer_service.jobs.kubernetes",
        "trainer_service.gateway.process",
        "trainer_service.checkpoints.catalog",
    ],
)
def test_the_front_ends_never_load_torch(module: str):
    loaded = modules_after(f"import {module}")
    assert {name for name in loaded if within(name, TORCH | {"trainer_service.engine"})} == set()


def test_the_worker_says_hello_before_it_loads_torch():
    """So that a trainer knows within a moment that its worker lives."""
    assert {
        name for name in modules_after("import trainer_service.engine.__main__") if within(name, {"torch"})
    } == set()


def test_a_module_of_the_sdk_is_for_users_or_in_a_folder_that_says_otherwise():
    import gradwire

    homes = {
        vars(gradwire)[name].__module__ for name in gradwire.__all__ if hasattr(vars(gradwire)[name], "__module__")
    }
    public = {f"gradwire.{file.stem}" for file in SDK.glob("*.py")} - {
        "gradwire.__init__",
        "gradwire.cli",
        "gradwire.fireworks",
        "gradwire.loggers",
    }
    assert public - homes == set()
