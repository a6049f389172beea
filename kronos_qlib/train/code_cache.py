"""The codes of all training windows, computed once and kept on disk for the epochs to come."""

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
class Codes:
    """Ids s1 and s2 of every bar of every window: uint16 `[≤ CHUNK, T, 2]` arrays, mapped from files."""

    chunks: list[np.ndarray]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The codes of the windows at `rows` (int `[B]`): int32 `[B, T, 2]`."""
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
    stopped: Callable[[], int] = lambda: 0,
) -> Codes | None:
    """Encode all windows into `folder`, or take up what is there already; the processes divide the files.

    The folder belongs to this tokenizer and these windows; its caller sees to that.

    Args:
        stopped: asked between windows; None is returned, in every process, if it has said so in one.

    Raises:
        ValueError: codes of more than 16 bits. OSError: in every process, if one cannot write.
    """
    if max(tokenizer.s1_bits, tokenizer.s2_bits) > 16:
        raise ValueError(f"cache_codes: codes of {tokenizer.s1_bits} and {tokenizer.s2_bits} bits do not fit into 16")
    group, error, ended = compute.group, None, False
    paths = [folder / f"codes-{number:05d}.npy" for number in range(-(-len(windows) // CHUNK))]
    missing = group.once(lambda: [number for number, path in enumerate(paths) if not path.exists()])
    own = missing[group.rank :: group.size]
    with tqdm(total=len(own) * CHUNK, desc="codes", unit="window", disable=not (group.first and own)) as bar:
        for number in own:
            batches = []
            for codes in compute.each(lambda rows: _encode(tokenizer, windows, rows, compute), _rows(number, windows)):
                batches.append(codes)
                bar.update(len(codes))
                ended = bool(stopped())
                if ended:
                    break
            if ended:
                break
            try:
                save_array(paths[number], np.concatenate(batches))
            except OSError as failed:  # told to the others below: they wait there
                error = failed
                break
    for failed, left in group.gather((error, ended)):
        if failed is not None:
            raise failed
        ended |= left
    if ended:
        return None
    return Codes([np.load(path, mmap_mode="r") for path in paths])


def _rows(chunk: int, windows: Windows) -> list[np.ndarray]:
    end = min((chunk + 1) * CHUNK, len(windows))
    return [np.arange(start, min(start + BATCH, end)) for start in range(chunk * CHUNK, end, BATCH)]


@torch.no_grad()
def _encode(tokenizer: KronosTokenizer, windows: Windows, rows: np.ndarray, compute: Compute) -> np.ndarray:
    x = torch.from_numpy(windows.normalised(rows).x).to(compute.device)
    with compute.autocast:
        s1, s2 = tokenizer.encode(x, half=True)
    return torch.stack([s1, s2], dim=-1).cpu().numpy().astype(np.uint16)
