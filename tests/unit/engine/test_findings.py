"""What one worker found out about a model, the next one takes; nothing else."""

from pathlib import Path

import pytest

from tests.engines import CPU
from trainer_service.engine.engine import Engine
from trainer_service.engine.findings import Findings
from trainer_service.engine.models import source
from trainer_service.engine.models.positions import Boundary
from trainer_service.engine.models.runner import HeadTraits, Traits
from trainer_service.engine.sampling import service
from trainer_service.engine.sampling.service import Sampling

FOUND = Traits("sdpa", boundaries=(Boundary("rope", 64),), head=HeadTraits(softcap=30.0))
MADE_OF = (Traits, Boundary, HeadTraits)


def found_anew() -> Traits:
    return Traits("found anew")


def test_what_was_found_is_recalled(tmp_path: Path) -> None:
    assert Findings(tmp_path, ["a model"]).recall("traits", lambda: FOUND, made_of=MADE_OF) == FOUND
    assert Findings(tmp_path, ["a model"]).recall("traits", found_anew, made_of=MADE_OF) == FOUND


def test_of_another_model_and_without_a_folder_it_is_found_anew(tmp_path: Path) -> None:
    Findings(tmp_path, ["a model"]).recall("traits", lambda: FOUND, made_of=MADE_OF)
    assert Findings(tmp_path, ["another"]).recall("traits", found_anew, made_of=MADE_OF) == found_anew()
    assert Findings().recall("traits", found_anew, made_of=MADE_OF) == found_anew()


@pytest.mark.parametrize("damage", [b"", b"garbage", b"PK\x03\x04", b"\x80\x04.", None])
def test_a_file_that_cannot_be_read_is_found_anew(tmp_path: Path, damage: bytes | None) -> None:
    Findings(tmp_path).recall("traits", lambda: FOUND, made_of=MADE_OF)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    assert Findings(tmp_path).recall("traits", found_anew, made_of=MADE_OF) == found_anew()
    # And kept again.
    assert Findings(tmp_path).recall("traits", lambda: FOUND, made_of=MADE_OF) == found_anew()


def test_nothing_but_what_findings_are_made_of_is_read(tmp_path: Path) -> None:
    Findings(tmp_path).recall("traits", lambda: FOUND, made_of=MADE_OF)
    assert Findings(tmp_path).recall("traits", found_anew, made_of=[Traits]) == found_anew()


def test_the_next_worker_tries_nothing_out(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = tmp_path / "findings"
    findings.mkdir()
    engines = []
    for _ in range(2):
        engine = Engine(str(tiny_llama), device=CPU, checkpoint_dir=tmp_path, findings_folder=findings)
        sampling = Sampling(engine, checkpoint_dir=tmp_path, send=lambda _: None)
        engines.append((engine.traits, sampling.decoding))
        monkeypatch.setattr(source, "find_traits", lambda *_, **__: pytest.fail("traits were tried again"))
        monkeypatch.setattr(service, "find_decoding", lambda *_, **__: pytest.fail("decoding was tried again"))
    assert engines[0] == engines[1]
    assert engines[0][0].packed
