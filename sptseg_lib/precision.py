"""Which number type the frozen backbone computes in."""

import os
import shutil
import subprocess

import torch

# Ask the driver whether there is a GPU, not CUDA: processes can be forked in a notebook only before CUDA is in use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def has_fast_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself, instead of emulating them more slowly."""
    if device == "cuda":
        if shutil.which("nvidia-smi"):  # for the same reason
            asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            answer = subprocess.run(asked, capture_output=True, text=True)
            if answer.returncode == 0 and answer.stdout.strip():
                return min(float(line) for line in answer.stdout.split()) >= 8.0
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device == "cpu" and probe()


def backbone_dtype(precision: str, device: str) -> torch.dtype:
    """float32, bfloat16, or with "auto" bfloat16 where the hardware has it."""
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def find_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
