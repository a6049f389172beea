"""The PCA of pooled hidden states: fitted once, kept in a file without code, applied row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qlib.log import get_module_logger
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from kronos_qlib.files import whole_file

logger = get_module_logger("KronosFactors")
BLOCK = 65_536  # rows projected at a time: their float64 copy is small then


@dataclass(frozen=True)
class Projection:
    """Principal components of hidden states of width d.

    mean: float64 [d]. components: float64 [K, d], of length 1, the largest coordinate of each positive. explained:
    share of the variance that each holds, float64 [K].
    """

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray

    @classmethod
    def fit(cls, hidden: np.ndarray, components: int) -> "Projection":
        """Fit to hidden states [N, d]; on one thread, whose sums do not depend on how many cores there are."""
        with threadpool_limits(1):
            pca = PCA(components, svd_solver="full").fit(hidden.astype(np.float64))
        rows = np.arange(components)
        signs = np.sign(pca.components_[rows, np.abs(pca.components_).argmax(1)])
        return cls(pca.mean_, pca.components_ * signs[:, None], pca.explained_variance_ratio_)

    def apply(self, hidden: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Project the hidden states at `rows` (int [N]) to float32 [N, K]; a row's sums do not depend on the others."""
        projected = np.empty((len(rows), len(self.components)), np.float32)
        for start in range(0, len(rows), BLOCK):
            block = slice(start, start + BLOCK)
            projected[block] = np.einsum("nd,kd->nk", hidden[rows[block]] - self.mean, self.components)
        return projected

    def save(self, path: Path) -> None:
        """Write a whole safetensors file."""
        with whole_file(path) as draft:
            save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, draft)

    @classmethod
    def load(cls, path: Path) -> "Projection | None":
        """Load what `save` wrote; None if it is not there, or with a warning if it is damaged."""
        try:
            return cls(**load_file(path))
        except FileNotFoundError:
            return None
        except (SafetensorError, TypeError) as error:
            logger.warning(f"{path} is damaged ({error}): the PCA is fitted again")
            return None
