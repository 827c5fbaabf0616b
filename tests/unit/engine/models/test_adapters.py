"""Adapters in and out as peft folders, merged exports, resumable state of LoRA runs, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import InvalidArgumentError, NotFoundError
from gradwire.types import AdamParams
from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from tests.engines import BATCH, CROSS_ENTROPY
from tests.loras import ALL, BODY, adapter, lora_engine, plain_peft, randomize, train
from tests.numerics.plain import load_plain, plain_logprobs, random_sequences, to_batch
from tests.tiny import VOCAB_SIZE, make_tiny_llama
from trainer_service.adapter_folders import adapter_folder, adapter_rank
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.worker.run_life import lora_settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SEQUENCES = random_sequences((9, 16), vocab_size=VOCAB_SIZE)
STEP = AdamParams(learning_rate=1e-2)


def found(engine: Engine, run_id: str = "lora") -> np.ndarray:
    return engine.forward(run_id, 90, engine.stage(to_batch(SEQUENCES))).logprobs_TK


def plain_found(model: Any) -> np.ndarray:
    return torch.cat([plain_logprobs(model, sequence) for sequence in SEQUENCES]).detach().numpy()


def close(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4)


@pytest.fixture
def engine(tiny_llama: Path, tmp_path: Path) -> Engine:
    """One LoRA run, "lora", whose head is adapted too and whose values are not zero."""
    made = lora_engine(tiny_llama, tmp_path / "checkpoints", lora=ALL)
    randomize(made, "lora")
    return made


def saved_folder(engine: Engine, tmp_path: Path, **arguments: Any) -> Path:
    engine.save_weights_for_sampler("lora", "a", **arguments)
    return tmp_path / "checkpoints" / "lora" / "sampler_weights" / "a"


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_peft_opens_what_is_saved(engine: Engine, tiny_llama: Path, tmp_path: Path) -> None:
    folder = saved_folder(engine, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    close(
        plain_found(PeftModel.from_pretrained(load_plain(tiny_llama), str(folder)).eval().get_base_model()),
        found(engine),
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(tiny_llama))
    # Short names, as servers of adapters look for them.
    assert "q_proj" in config["target_modules"]
    # The file has the adapter and nothing else: an embedding alone would be larger.
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_opens_what_is_merged(tmp_path: Path, tied: bool) -> None:
    base = make_tiny_llama(tmp_path / "base", tied=tied)
    engine = lora_engine(base, tmp_path / "checkpoints", lora=ALL, body=BODY)
    for run_id in ("lora", "body"):
        randomize(engine, run_id)
        before = found(engine, run_id)
        engine.save_weights_for_sampler(run_id, "merged", merged=True)
        folder = tmp_path / "checkpoints" / run_id / "sampler_weights" / "merged"
        assert (folder / "tokenizer.json").is_file()
        close(plain_found(load_plain(folder)), before)
        # Merging left the run, and the base model it shares, as they were.
        np.testing.assert_array_equal(found(engine, run_id), before)


# ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_starts_from_what_another_saved(engine: Engine, tmp_path: Path) -> None:
    folder = saved_folder(engine, tmp_path)
    engine.create_run("next", adapter=str(folder))
    np.testing.assert_array_equal(found(engine, "next"), found(engine))
    ours, theirs = adapter(engine, "next"), adapter(engine, "lora")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    train(engine, "next", range(1))
    assert not np.array_equal(found(engine, "next"), found(engine))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": r".*layers\.1\..*(q|down)_proj"},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "layers_to_transform": None},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
)
def test_a_run_starts_from_somebody_elses_adapter(tiny_llama: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = plain_peft(tiny_llama, BODY, **config)
    for parameter in plain.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    plain.to(torch.bfloat16).float()
    plain.save_pretrained(str(tmp_path / "theirs"))
    engine = lora_engine(tiny_llama, tmp_path / "checkpoints")
    engine.create_run("lora", adapter=str(tmp_path / "theirs"))
    close(found(engine), plain_found(load_plain_with(tiny_llama, tmp_path / "theirs")))
    before = found(engine)
    train(engine, "lora", range(2))
    assert not np.allclose(found(engine), before)
    # It goes out again as it came in.
    engine.save_weights_for_sampler("lora", "a")
    again = tmp_path / "checkpoints" / "lora" / "sampler_weights" / "a"
    close(found(engine), plain_found(load_plain_with(tiny_llama, again)))


def load_plain_with(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load_plain(base), str(folder)).eval().get_base_model()


def spoilt(folder: Path, **config: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def with_tensors(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first_bad(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = torch.nan


EVIL = r"(.*.*.*.*.*.*.*.*.*.*)*!"
"""An expression that Python's re would be busy with for hours."""
SPOILT: dict[str, tuple[Any, str]] = {
    "another kind": (lambda f: spoilt(f, peft_type="IA3"), "is of peft_type IA3; it must be LORA"),
    "no kind": (lambda f: (f / "adapter_config.json").write_text("{}"), "is of peft_type None"),
    "no configuration": (lambda f: (f / "adapter_config.json").write_text("[]"), "cannot be read: it is a list"),
    "a wrong type": (lambda f: spoilt(f, target_modules=["q_proj"], layers_pattern="x"), "cannot be read"),
    "newer peft": (lambda f: spoilt(f, use_next_idea=True), "has use_next_idea in adapter_config.json, which"),
    "dora": (lambda f: spoilt(f, use_dora=True), "has use_dora=True"),
    "biases": (lambda f: spoilt(f, bias="all"), "has bias='all'"),
    "whole modules": (lambda f: spoilt(f, modules_to_save=["lm_head"]), "has modules_to_save=['lm_head']"),
    "pissa": (lambda f: spoilt(f, init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the base"),
    "other layers": (
        lambda f: spoilt(f, target_modules=["qkv"]),
        "target_modules are ['qkv'], of which this model has none",
    ),
    "an embedding": (
        lambda f: spoilt(f, target_modules=["q_proj", "embed_tokens"]),
        "adapts model.embed_tokens, which is no linear layer",
    ),
    "higher rank": (lambda f: spoilt(f, r=5), "its rank is 5, and its matrices have other sizes: 4 at most"),
    "a rank no memory has": (lambda f: spoilt(f, r=(1 << 31) - 1), "its matrices have other sizes: 4 at most"),
    "lower rank": (lambda f: spoilt(f, r=3), "has matrices of other sizes than this model"),
    "alpha text": (lambda f: spoilt(f, lora_alpha="8"), "whose lora_alpha is '8'; it must be a number"),
    "alpha beyond float32": (lambda f: spoilt(f, lora_alpha=1e39), "whose lora_alpha is 1e+39; it must be a number"),
    "alpha not a number": (lambda f: spoilt(f, lora_alpha=float("nan")), "whose lora_alpha is nan"),
    "alpha beyond all": (lambda f: spoilt(f, lora_alpha=10**400), "whose lora_alpha is 1000"),
    "rank text": (lambda f: spoilt(f, r="4"), "whose r is '4'; it must be a whole number"),
    "rank true": (lambda f: spoilt(f, r=True), "whose r is True"),
    "rank pattern text": (lambda f: spoilt(f, rank_pattern="q_proj"), "whose rank_pattern is 'q_proj'; it must be"),
    "rank pattern of texts": (lambda f: spoilt(f, rank_pattern={"q_proj": "2"}), "whose rank_pattern is"),
    "rank pattern an expression": (lambda f: spoilt(f, rank_pattern={EVIL: 2}), "at most 512 layers' names"),
    "alpha pattern an expression": (lambda f: spoilt(f, alpha_pattern={EVIL: 2}), "at most 512 layers' names"),
    "alpha pattern long": (
        lambda f: spoilt(f, alpha_pattern={f"a{n}": 1 for n in range(513)}),
        "at most 512 layers' names",
    ),
    "layers pattern an expression": (
        lambda f: spoilt(f, layers_to_transform=[1], layers_pattern=EVIL),
        "whose layers_pattern is",
    ),
    "layers of texts": (lambda f: spoilt(f, layers_to_transform=["1"]), "whose layers_to_transform is"),
    "targets null": (lambda f: spoilt(f, target_modules=[None]), "whose target_modules is [None]; it must be a list"),
    "targets nested": (lambda f: spoilt(f, target_modules=[["q_proj"]]), "whose target_modules is [['q_proj']]"),
    "targets none": (lambda f: spoilt(f, target_modules=[]), "whose target_modules is []"),
    "targets a number": (lambda f: spoilt(f, target_modules=7), "whose target_modules is 7"),
    "excluded null": (lambda f: spoilt(f, exclude_modules=[None]), "whose exclude_modules is [None]"),
    "rslora text": (lambda f: spoilt(f, use_rslora="yes"), "whose use_rslora is 'yes'; it must be true or false"),
    "loftq": (lambda f: spoilt(f, init_lora_weights="loftq"), "init_lora_weights='loftq', which changes the base"),
    "started from a list": (lambda f: spoilt(f, init_lora_weights=[]), "init_lora_weights=[], which changes the base"),
    "nested": (lambda f: (f / "adapter_config.json").write_bytes(b"[" * 100_000), "it is nested too deeply"),
    "long": (lambda f: (f / "adapter_config.json").write_bytes(b" " * (1 << 21)), "it has more than 1048576 bytes"),
    "F8": (
        lambda f: with_tensors(f, lambda t: t.update({min(t): t[min(t)].to(torch.float8_e4m3fn)})),
        "in F8_E4M3; it must be F32, BF16, F16, F64",
    ),
    "integers": (lambda f: with_tensors(f, lambda t: t.update({min(t): t[min(t)].long()})), "in I64; it must be F32"),
    "beyond float32": (
        lambda f: with_tensors(f, lambda t: t.update({min(t): t[min(t)].double() + 1e300})),
        "has a tensor that is not finite",
    ),
    "a number for a matrix": (
        lambda f: with_tensors(f, lambda t: t.update({key: torch.zeros(()) for key in t})),
        "its matrices have other sizes: 0 at most",
    ),
    "cut file": (cut, "adapter_model.safetensors that cannot be read"),
    "missing tensor": (lambda f: with_tensors(f, lambda t: t.pop(min(t))), "lacks 1 tensors"),
    "unknown tensor": (
        lambda f: with_tensors(f, lambda t: t.update(x=torch.zeros(1))),
        "has 1 unknown tensors, for example x",
    ),
    "not finite": (lambda f: with_tensors(f, first_bad), "has a tensor that is not finite"),
}


@pytest.mark.parametrize("how", list(SPOILT))
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(
    engine: Engine, tiny_llama: Path, tmp_path: Path, how: str
) -> None:
    spoil, why = SPOILT[how]
    folder = saved_folder(engine, tmp_path)
    copied = tmp_path / "spoilt"
    shutil.copytree(folder, copied)
    spoil(copied)
    before = found(engine)
    with pytest.raises(InvalidArgumentError) as caught:
        engine.create_run("next", adapter=str(copied))
    assert caught.value.message.startswith("adapter_path names an adapter that ")
    assert why in caught.value.message
    # Nothing of it is left: in particular the base model is as it was.
    np.testing.assert_array_equal(found(engine), before)
    engine.create_run("next", lora=BODY)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_no_expression_of_an_adapter_is_evaluated_and_its_tensors_say_which_layers_it_has(
    engine: Engine, tmp_path: Path, field: str
) -> None:
    copied = shutil.copytree(saved_folder(engine, tmp_path), tmp_path / "copied")
    spoilt(copied, **{field: EVIL})
    engine.create_run("next", adapter=str(copied))
    np.testing.assert_array_equal(found(engine, "next"), found(engine))
    assert adapter(engine, "next").keys() == adapter(engine, "lora").keys()


def test_as_many_names_as_fit_a_configuration_do_not_hold_the_worker(engine: Engine, tmp_path: Path) -> None:
    copied = shutil.copytree(saved_folder(engine, tmp_path), tmp_path / "copied")
    config = json.loads((copied / "adapter_config.json").read_text())
    names = [f"n{number}" for number in range(80_000)]
    spoilt(copied, target_modules=config["target_modules"] + names, exclude_modules=names[:20_000])
    engine.create_run("next", adapter=str(copied))
    np.testing.assert_array_equal(found(engine, "next"), found(engine))
    engine.save_weights_for_sampler("next", "again")
    again = tmp_path / "checkpoints" / "next" / "sampler_weights" / "again" / "adapter_config.json"
    assert sorted(json.loads(again.read_text())["target_modules"]) == sorted(config["target_modules"])


def test_an_adapter_that_no_settings_make_says_so_in_its_state(
    engine: Engine, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = saved_folder(engine, tmp_path)

    def said(**config: Any) -> Any:
        copied = shutil.copytree(folder, tmp_path / "copied")
        spoilt(copied, **config)
        engine.create_run("next", adapter=str(copied))
        saved = engine.save_state("next", "s", overwrite=True)
        engine.delete_run("next")
        shutil.rmtree(copied)
        return json.loads((Path(saved.uri.removeprefix("file://")) / "manifest.json").read_text())["lora"]

    settings = {"alpha": ALL.alpha, "train_mlp": True, "train_attn": True, "train_unembed": True}
    assert settings.items() <= said().items()
    assert said(use_rslora=True) is None
    assert said(alpha_pattern={"q_proj": 1}) is None


def test_adapters_lead_nowhere_but_to_checkpoints_and_the_owners_folder(tmp_path: Path) -> None:
    roots = {"checkpoint_dir": tmp_path / "checkpoints", "adapter_dir": tmp_path / "adapters"}
    inside = [roots["adapter_dir"] / "mine", roots["checkpoint_dir"] / "run-1" / "sampler_weights" / "a"]
    outside = tmp_path / "secret"
    for folder in (*inside, outside):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"r": 7}')
        (folder / "adapter_model.safetensors").write_bytes(b"")
    (roots["adapter_dir"] / "link").symlink_to(outside)
    for path, folder in (
        ("mine", inside[0]),
        (str(inside[0]), inside[0]),
        ("gradwire://run-1/sampler_weights/a", inside[1]),
    ):
        assert adapter_folder(path, **roots) == folder
        assert adapter_rank(folder, path) == 7
    (roots["adapter_dir"] / "ring").symlink_to(roots["adapter_dir"] / "ring")
    for path in (
        "ring",
        "ring/a",
        "x" * 300,
        f"mine/{'x' * 300}",
        "../secret",
        str(outside),
        "link",
        "",
        ".",
        "mine/../../secret",
        "/etc",
        "a\0b",
        "x" * 10_000,
    ):
        with pytest.raises(InvalidArgumentError, match="--adapter-dir") as caught:
            adapter_folder(path, **roots)
        assert caught.value.field_violations[0][0] == "adapter_path"
        assert len(caught.value.message) < 700
    with pytest.raises(InvalidArgumentError, match="adapter_path"):
        adapter_folder("gradwire://../../secret", **roots)
    with pytest.raises(InvalidArgumentError, match="resumable state"):
        adapter_folder("gradwire://run-1/state/a", **roots)
    for path in ("yours", "gradwire://run-1/sampler_weights/b"):
        with pytest.raises(NotFoundError):
            adapter_folder(path, **roots)
    (inside[0] / "adapter_model.safetensors").rename(inside[0] / "adapter_model.bin")
    with pytest.raises(InvalidArgumentError, match="has no adapter_model.safetensors"):
        adapter_folder("mine", **roots)
    (inside[0] / "adapter_config.json").write_text('{"r": "x"}')
    with pytest.raises(InvalidArgumentError, match="r is 'x'"):
        adapter_rank(inside[0], "mine")


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (LoraSettings(rank=0), "lora_rank"),
        (LoraSettings(rank=33), "lora_rank"),
        (LoraSettings(rank=4, alpha=0.0), "lora_alpha"),
        (LoraSettings(rank=4, alpha=float("nan")), "lora_alpha"),
        (LoraSettings(rank=4, train_attn=False, train_mlp=False, train_unembed=False), "train_attn"),
    ],
)
def test_settings_out_of_range_are_named(engine: Engine, settings: LoraSettings, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        engine.create_run("next", lora=settings)
    assert caught.value.field_violations[0][0] == field


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (CreateRunRequest(lora_alpha=16), "lora_alpha"),
        (CreateRunRequest(train_mlp=False), "train_mlp"),
        (CreateRunRequest(seed=0), "seed"),
        (CreateRunRequest(lora_rank=4, adapter_path="a", train_attn=True), "train_attn"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(request_: CreateRunRequest, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        lora_settings(request_)
    assert caught.value.field_violations[0][0] == field


def test_defaults_are_those_that_the_protocol_names() -> None:
    assert lora_settings(CreateRunRequest()) is None
    assert lora_settings(CreateRunRequest(lora_rank=8)) == LoraSettings(8, 32.0, 0, True, True, True)
    given = CreateRunRequest(lora_rank=8, lora_alpha=4, seed=3, train_mlp=False, train_attn=True, train_unembed=False)
    assert lora_settings(given) == LoraSettings(8, 4.0, 3, False, True, False)


# ── resumable state ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_merged_full_run_is_the_run_itself(tiny_llama: Path, tmp_path: Path) -> None:
    engine = lora_engine(tiny_llama, tmp_path)
    engine.create_run("full")
    engine.forward_backward("full", 1, engine.stage(BATCH, CROSS_ENTROPY))
    engine.save_weights_for_sampler("full", "a", merged=True)
    close(plain_found(load_plain(tmp_path / "full" / "sampler_weights" / "a")), found(engine, "full"))


def test_peft_itself_makes_what_is_refused_here_as_it_should() -> None:
    """The list of what is no plain LoRA follows peft's own defaults: its plainest configuration is taken."""
    from trainer_service.engine.models.adapter_files import _FREE, _default

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    changed = [
        name
        for name, field in LoraConfig.__dataclass_fields__.items()
        if name not in _FREE and getattr(config, name) and getattr(config, name) != _default(field)
    ]
    assert changed == []
