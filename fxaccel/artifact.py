"""Saved models: one safetensors file that holds the weights and, in its header, the graphs as JSON.

    header "fxaccel"   {"format": 1, "captures": [...], "state": [...], "report": {...}}
    header "sha256"    of that JSON and of every tensor's bytes, in the order of their names
    tensors            parameters and buffers by their state_dict names (tied ones once), and the graph's
                       constants as "constant/<capture>/<name>"

Nothing in the file is executed. Operators are looked up in `torch.ops` and in a short list of arithmetic
functions; sizes and guards are parsed as arithmetic; the Python code is generated again from the graph.
Loading runs no pass. A result type that this process has not imported comes back as a dict.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxaccel import decode, encode
from fxaccel.errors import ArtifactError
from fxaccel.module import AcceleratedModule

FORMAT = 6


def save(module: AcceleratedModule, path: str | os.PathLike[str]) -> None:
    """Write the module to `path`; raises ArtifactError for what a file cannot hold. See README.md."""
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, "torch": torch.__version__, **encode.model(module, tensors)}
    text = json.dumps(content, separators=(",", ":"))
    target, temporary = Path(path), Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, {"fxaccel": text, "sha256": _digest(text, tensors)})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        raw = tensors[name].reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> AcceleratedModule:
    """The module that `save` wrote: its weights and its graphs, with no pass run again.

    It serves the modes and input structures that were captured before saving. Raises ArtifactError for a
    file that is damaged, truncated, foreign or of another version; executes nothing that the file holds.
    """
    content, tensors = _read(path)
    try:
        return decode.model(content, tensors)
    except (
        KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, ImportError, SyntaxError,
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{os.fspath(path)} does not describe a model: {type(error).__name__}: {error}",
            "save the model again",
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {name}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{name} is not a saved model, or is damaged: {error}", "expected a file that fast.save() wrote"
        ) from error
    if "fxaccel" not in header:
        raise ArtifactError(f"{name} is a safetensors file of something else", "expected fast.save()'s")
    if _digest(header["fxaccel"], tensors) != header.get("sha256"):
        raise ArtifactError(f"{name} is damaged: its checksum does not match", "save the model again")
    content = json.loads(header["fxaccel"])
    if not isinstance(content, dict):
        raise ArtifactError(f"{name} describes no model", "expected a file that fast.save() wrote")
    if content.get("format") != FORMAT:
        raise ArtifactError(
            f"{name} has format {content.get('format')!r}, this version reads {FORMAT}",
            "load it with the fxaccel version that wrote it and save it again",
        )
    return content, tensors
