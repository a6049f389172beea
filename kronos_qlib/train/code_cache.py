"""The cache of codes: those of all training windows, computed once and kept on disk for the epochs to come."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from kronos_qlib.data.windows import Windows
from kronos_qlib.files import save_array
from kronos_qlib.nn import KronosTokenizer
from kronos_qlib.train.distributed import Compute

CHUNK, BATCH = 32_768, 64  # windows a file and at a time; a killed encoding goes on after the last whole file


@dataclass(frozen=True)
class CodeCache:
    """Ids s1 and s2 of every bar of every window: uint16 `[≤ CHUNK, T, 2]` arrays, mapped from files."""

    chunks: list[np.ndarray]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the codes of the windows at `rows` (int `[B]`): int32 `[B, T, 2]`."""
        taken = np.empty((len(rows), *self.chunks[0].shape[1:]), np.int32)
        for chunk in np.unique(rows // CHUNK):
            here = rows // CHUNK == chunk
            taken[here] = self.chunks[chunk][rows[here] % CHUNK]
        return taken


def encode_windows(
    folder: Path,
    tokenizer: KronosTokenizer,
    windows: Windows,
    compute: Compute,
    should_stop: Callable[[], int] = lambda: 0,
) -> CodeCache | None:
    """Encode all windows into a folder of this tokenizer and these windows, or read what is there already.

    The processes divide the files among them.

    Args:
        should_stop: called between batches; where it returns true in one process, None is returned in every one.

    Raises:
        ValueError: codes of more than 16 bits. OSError: in every process, if one cannot write.
    """
    if max(tokenizer.s1_bits, tokenizer.s2_bits) > 16:
        raise ValueError(f"cache_codes: codes of {tokenizer.s1_bits} and {tokenizer.s2_bits} bits do not fit into 16")
    group, error, stopped = compute.group, None, False
    paths = [folder / f"codes-{number:05d}.npy" for number in range(-(-len(windows) // CHUNK))]
    missing = group.run_on_first(lambda: [number for number, path in enumerate(paths) if not path.exists()])
    own = missing[group.rank :: group.size]
    with tqdm(total=len(own) * CHUNK, desc="codes", unit="window", disable=not (group.is_first and own)) as bar:
        for number in own:
            encoded, batches = [], _batches_of_chunk(number, windows)
            for codes in compute.map_on_cores(lambda rows: _encode(tokenizer, windows, rows, compute), batches):
                encoded.append(codes)
                bar.update(len(codes))
                stopped = bool(should_stop())
                if stopped:
                    break
            if stopped:
                break
            try:
                save_array(paths[number], np.concatenate(encoded))
            except OSError as failed:  # raised below, in every process: the others wait there
                error = failed
                break
    for failed, also_stopped in group.all_gather((error, stopped)):
        if failed is not None:
            raise failed
        stopped |= also_stopped
    if stopped:
        return None
    return CodeCache([np.load(path, mmap_mode="r") for path in paths])


def _batches_of_chunk(chunk: int, windows: Windows) -> list[np.ndarray]:
    end = min((chunk + 1) * CHUNK, len(windows))
    return [np.arange(start, min(start + BATCH, end)) for start in range(chunk * CHUNK, end, BATCH)]


@torch.no_grad()
def _encode(tokenizer: KronosTokenizer, windows: Windows, rows: np.ndarray, compute: Compute) -> np.ndarray:
    x = torch.from_numpy(windows.normalised(rows).x).to(compute.device)
    with compute.autocast:
        s1, s2 = tokenizer.encode(x, half=True)
    return torch.stack([s1, s2], dim=-1).cpu().numpy().astype(np.uint16)
