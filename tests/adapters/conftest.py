"""A base model, and folders made by editing a good adapter."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import CONFIG, WEIGHTS

Edit = Callable[[dict[str, Tensor]], object]
Edited = Callable[..., Path]


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    return BaseModel.open(base_folder)


@pytest.fixture
def edited(adapter_folders: dict[str, Path], tmp_path: Path) -> Edited:
    """Copy a good adapter to `edited`, change settings and then tensors."""

    def edit(
        settings: Mapping[str, object] | None = None,
        tensors: Edit | None = None,
        *,
        of: str = "ada",
        drop: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(adapter_folders[of], folder, dirs_exist_ok=True)
        config = json.loads((folder / CONFIG).read_text()) | (settings or {})
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
        if tensors:
            content = load_file(folder / WEIGHTS)
            tensors(content)
            save_file({k: v.contiguous() for k, v in content.items()}, folder / WEIGHTS)
        return folder

    return edit
