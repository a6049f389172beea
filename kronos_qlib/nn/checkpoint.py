"""Hub-format checkpoints: config.json with the constructor's arguments, model.safetensors with the state dict."""

import hashlib
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from kronos_qlib.files import whole_file
from kronos_qlib.nn import zoo

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it stands; the message names the file and the tensor or key."""


class HubModule(nn.Module):
    """A module that remembers its constructor's arguments and loads and saves itself in hub format.

    Attributes:
        config: the constructor's keyword arguments.
        source: where the weights came from (hub id or folder), or None for a new network.
    """

    config: dict[str, Any]
    source: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature, construct = inspect.signature(cls.__init__), cls.__init__

        def __init__(self: Self, *args: Any, **arguments: Any) -> None:
            bound = signature.bind(self, *args, **arguments)
            construct(self, *args, **arguments)
            self.config = {key: value for key, value in bound.arguments.items() if key != "self"}

        __init__.__signature__, __init__.__doc__ = signature, construct.__doc__
        cls.__init__ = __init__

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Self:
        """A new network from constructor arguments; `where` says in an error where they came from.

        Raises:
            CheckpointError: an unknown or a missing key, or a value the constructor refuses.
        """
        parameters = inspect.signature(cls.__init__).parameters
        known = [name for name in parameters if name != "self"]
        unknown, missing = sorted(set(config) - set(known)), [key for key in known if key not in config]
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r} for {cls.__name__}; known keys: {known}")
        if missing:
            raise CheckpointError(f"{where}: {cls.__name__} needs the keys {missing}")
        for key, value in config.items():
            if problem := _problem(key, value, parameters[key].annotation):
                raise CheckpointError(f"{where}: {key} {problem}, not {value!r}")
        try:
            return cls(**config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{where}: {error}") from error

    @classmethod
    def from_pretrained(cls, dir_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Self:
        """Load a checkpoint from a folder or from the hub (its pinned revision where the zoo knows one), strictly.

        Args:
            dir_or_hub_id: a folder with config.json and model.safetensors, or a hub id such as NeoQuasar/Kronos-small.
            revision: a hub commit or tag instead of the zoo's.

        Returns:
            The network on the CPU in float32, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder or file, and the hub has or reaches none.
            CheckpointError: an unknown key, a truncated file, a missing, unexpected or mis-shaped tensor.
        """
        config_path, weights_path = (
            _locate(str(dir_or_hub_id), name, revision) for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
        try:
            config = json.loads(config_path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{config_path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_path}: expected a mapping of constructor arguments")
        module = cls.from_config(config, str(config_path))
        module.load_weights(weights_path)
        module.source = str(dir_or_hub_id)
        return module.eval()

    def load_weights(self, path: Path) -> None:
        """Replace every tensor by that of a safetensors file.

        Raises:
            CheckpointError: the file is no whole safetensors file, or a tensor is missing, unexpected or mis-shaped.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        _check_tensors(self.state_dict(), tensors, str(path))
        self.load_state_dict(tensors)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the checkpoint in hub format into a folder, each file aside first and then renamed."""
        folder = Path(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with whole_file(folder / WEIGHTS_FILE) as draft:
            save_file(tensors, draft, metadata={"format": "pt"})
        with whole_file(folder / CONFIG_FILE) as draft:
            draft.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    @property
    def n_parameters(self) -> int:
        """The number of trainable and fixed parameters, buffers not counted."""
        return sum(parameter.numel() for parameter in self.parameters())


def _problem(key: str, value: Any, kind: type) -> str | None:
    """What is wrong with a constructor argument, or None: counts are 1 or more, dropouts in [0, 1)."""
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is int:
        return None if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else "must be 1 or more"
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return "must be a number"
    return "must be in [0, 1)" if key.endswith("dropout_p") and not 0 <= value < 1 else None


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]!r}")
    if unexpected:
        raise CheckpointError(f"{where}: {len(unexpected)} unexpected tensor(s), the first is {unexpected[0]!r}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"{list(found[name].shape)} instead of {list(tensor.shape)}"
            raise CheckpointError(f"{where}: tensor {name!r} has shape {shapes}")
        if tensor.is_floating_point() and not torch.isfinite(found[name]).all():
            raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinite values")


def _locate(dir_or_hub_id: str, name: str, revision: str | None) -> Path:
    folder = Path(dir_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name} there; a checkpoint folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        return folder / name
    entry = zoo.published(dir_or_hub_id)
    revision = revision or (entry.revision if entry else None)
    try:
        return Path(hf_hub_download(dir_or_hub_id, name, revision=revision))
    except HFValidationError as error:
        raise FileNotFoundError(f"{dir_or_hub_id}: neither a folder nor a hub id of the form owner/name") from error
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{dir_or_hub_id}: no such folder, and the hub has no such open repository") from error
    except Exception as error:  # what a proxy or a broken connection raises depends on the hub library's transport
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(f"{dir_or_hub_id}: the hub's repository has no {name}") from error
        raise FileNotFoundError(
            f"{dir_or_hub_id}: not in the local cache and the hub cannot be reached: give a folder or fetch it once "
            "on a machine that reaches the hub (hf download) and copy its cache"
        ) from error


def digest_of_weights(network: HubModule) -> str:
    """A digest of all tensors of a network and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
