"""A draft model that is right now and then."""

from __future__ import annotations

import shutil
from pathlib import Path


def noisy_copy(model: Path) -> Path:
    """The model with some noise on its weights, in the folder `draft` beside it."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = model.parent / "draft"
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    noisy = {k: w + 0.1 * w.std(correction=0) * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
