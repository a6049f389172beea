"""The networks that a server answers with: one of each checkpoint, loaded at start and prepared once."""

from dataclasses import dataclass
from pathlib import Path

from kronos_qlib.forecast.predictor import KronosPredictor, own_weights
from kronos_qlib.nn import zoo
from kronos_qlib.web.problems import Problem
from kronos_qlib.workflow.named_predictor import load_predictor


@dataclass(frozen=True)
class NamedNetwork:
    """A predictor, the name or folder that it was loaded from, what is said of it, and a digest of its weights."""

    name: str
    source: str
    predictor: KronosPredictor
    note: str
    digest: str

    @property
    def trained_until(self) -> str | None:
        """The last date of its pre-training, where that is known."""
        entry = zoo.MODELS.get(self.source)
        return None if entry is None else entry.trained_until


class Networks:
    """Gives networks by the names that were named at start, and by no others.

    Raises:
        ValueError: one of them cannot be loaded.
    """

    def __init__(self, sources: dict[str, str], device: str | None = "cpu") -> None:
        self._found: dict[str, NamedNetwork] = {}
        for name, source in sources.items():
            predictor, note = load_predictor(source, device)
            note = note.replace(source, name) if Path(source).is_dir() else note
            digest = ":".join(map(str, own_weights(predictor.tokenizer, predictor.model).values()))
            self._found[name] = NamedNetwork(name, source, predictor, note, digest)

    @property
    def names(self) -> list[str]:
        """The names, the default one first."""
        return list(self._found)

    def network(self, name: str | None) -> NamedNetwork:
        """Return a network by its name, or the first. Raises Problem for another name."""
        found = self._found.get(self.names[0] if name is None else name)
        if found is None:
            raise Problem(404, f"There is no model {name!r} here; there are {', '.join(self._found)}.")
        return found
