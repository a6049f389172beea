"""The device of a run, the precision of its matrix products, and the number of its processes."""

import psutil
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for; for None and "auto" the best of this machine: CUDA, then MPS, then CPU.

    Raises:
        ValueError: an unknown device, or one that this machine or this build of torch lacks.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: {device!r} is unknown; use auto, cpu, mps, cuda or cuda:N") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(
                f"device: {device!r} was asked for, but torch sees {count} CUDA device(s); use auto or cpu"
            )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device: 'mps' was asked for, but this machine has none; use auto or cpu")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the precision of the matrix products; "auto" is bfloat16 if the device multiplies it in hardware.

    Raises:
        ValueError: a dtype other than auto, float32 and bfloat16.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; use auto, {' or '.join(DTYPES)}")
    return DTYPES[dtype]


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def check_memory(what: str, size: int, device: torch.device) -> None:
    """Refuse what cannot fit into memory, before it is asked for.

    Args:
        what: the setting that decides the size, and its value.
        size: bytes.

    Raises:
        ValueError: the device has less.
    """
    total = total_memory(device)
    if size > total:
        whose = device if device.type == "cuda" else "this machine"
        raise ValueError(f"{what} needs {size / 2**30:,.0f} GiB of memory; {whose} has {total / 2**30:,.1f}")


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older releases of torch do not know it
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


def process_count(key: str, processes: int | str, device: torch.device) -> int:
    """Return how many processes share the work: for `auto` one per GPU, and one on a CPU or on a numbered GPU.

    Args:
        key: the settings that ask for them, named in an error.

    Raises:
        ValueError: more than there are GPUs, or several on a device that only one can use.
    """
    numbered = device.type == "cuda" and device.index is not None
    gpus = torch.cuda.device_count() if device.type == "cuda" and not numbered else 1
    if processes == "auto":
        return gpus
    if processes > 1 and device.type == "cuda" and processes > gpus:
        raise ValueError(f"{key}.processes: {processes} is more than the {gpus} GPU(s) of device {device}")
    if processes > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"{key}.processes: several processes need device cpu or cuda, not {device}")
    return processes
