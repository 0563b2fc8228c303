"""PyTorch's own files (.bin, .pth, .pt): what is in them, and slices of it. Torch reads them and runs none of them."""

import math
import pickle
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from longvid_jax.errors import CheckpointError

SUFFIXES = (".bin", ".pth", ".pt")
WRAPPERS = ("model", "state_dict")  # where LAVIS and Lightning put the tensors, beside their optimizer's state
TORCH = (2, 6)  # in older versions code could run in spite of weights_only (CVE-2025-32434)
HELD_BYTES = 1 << 27


def headers(file: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape, dtype in the words of safetensors, and bytes of each tensor; CheckpointError if the file will not do."""
    tensors, _ = _load(file)
    return {key: (tuple(tensor.shape), _word(tensor.dtype), tensor.nbytes) for key, tensor in tensors.items()}


class Reader:
    """Reads slices, and keeps the file that it read last: to open one takes some 20 ms.

    Pages of a mapped file count as memory of the process once they were read, so it is mapped anew after HELD_BYTES.
    What cannot be mapped (from before torch 1.6, or compressed) is in memory whole until another file is read.
    """

    def __init__(self):
        self._file, self._tensors, self._left = None, {}, 0.0

    def read(self, file: Path, key: str, index: tuple[slice, ...]) -> np.ndarray:
        if file != self._file or self._left <= 0:
            self._file, self._tensors = None, {}  # the old one goes before the new one comes
            self._tensors, mapped = _load(file)
            self._file, self._left = file, HELD_BYTES if mapped else math.inf
        part = _array(self._tensors[key])[(*index, ...)]
        first, end = np.lib.array_utils.byte_bounds(part)
        self._left -= end - first
        return part.copy()


def _load(file: Path) -> tuple[dict, bool]:
    """The tensors of a file by name, and whether they are mapped and not in memory."""
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or torch.__version__ < TORCH:
        raise CheckpointError(
            f"{file} can be read by torch only, {TORCH[0]}.{TORCH[1]} or newer: `pip install torch`, "
            "or save the model as safetensors (safe_serialization=True)."
        )
    try:
        mapped = _can_be_mapped(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what is damaged makes it raise almost anything
        raise CheckpointError(_fault(file, error)) from error
    return _named_tensors(file, content), mapped


def _can_be_mapped(file: Path) -> bool:
    """Whether it is of the newer kind, a zip archive, and not compressed: torch would map that all the same."""
    try:
        with zipfile.ZipFile(file) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except zipfile.BadZipFile:
        return False


def _fault(file: Path, error: Exception) -> str:
    said = str(error)
    if code := re.search(r"GLOBAL (\S+)|(TorchScript)", said):
        return f"{file} holds code other than tensors ({code[1] or code[2]}), which is not run; give safetensors."
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in said:
        return f"{file} is damaged or holds other things than tensors; fetch this file again or give safetensors."
    cause = re.split(r"\.?(\s*\n|\.\s|$)", said.strip())[0] or type(error).__name__
    return f"{file} cannot be read as a PyTorch file ({cause}); fetch this file again."


def _named_tensors(file: Path, content) -> dict:
    """All tensors at the top of a checkpoint and in its WRAPPERS; the rest is a trainer's, or a version number."""
    import torch

    top = content if isinstance(content, dict) else {}
    found = {}
    for part in (top, *(top.get(name) for name in WRAPPERS)):
        for key, tensor in part.items() if isinstance(part, dict) else ():
            if not isinstance(tensor, torch.Tensor):
                continue
            if not isinstance(key, str):
                raise CheckpointError(f"{file} has a tensor with the key {key!r}, which is no name; save it by names.")
            if key in found:
                raise CheckpointError(f"{file} has the tensor {key} at its top and below; keep one.")
            if tensor.layout is not torch.strided or tensor.is_meta:
                raise CheckpointError(f"{file}: the tensor {key} is sparse or has no values; save it as a dense one.")
            found[key] = tensor
    if not found:
        raise CheckpointError(
            f"{file} holds no tensors by name, neither at its top nor under {' or '.join(WRAPPERS)}; "
            "give the weights, and move what is something else out of their folder."
        )
    return found


def _array(tensor) -> np.ndarray:
    """A view, without a copy; NumPy knows bfloat16 from ml_dtypes only."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def _word(dtype) -> str:
    """F32 for torch.float32, BF16 for torch.bfloat16, I64 for torch.int64, U8 for torch.uint8."""
    name = str(dtype).removeprefix("torch.").upper()
    return name.replace("FLOAT", "F").replace("INT", "I").replace("UI", "U")
