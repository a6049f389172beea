"""Checkpoints in the hub's format: config.json with the constructor's arguments, model.safetensors with the tensors."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from pydantic import Field, create_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from kronos_qlib.addresses import check_answers
from kronos_qlib.extensions import identify, identity_of
from kronos_qlib.files import digest_of_file, whole_file
from kronos_qlib.hardware.device import check_memory
from kronos_qlib.nn import zoo
from kronos_qlib.settings import Settings, check_configuration, read_settings

logger = logging.getLogger("qlib.Kronos")
SECONDS_TO_ANSWER = 4.0  # of the hub
CONFIG_FILE, WEIGHTS_FILE, MODEL_CARD_FILE = "config.json", "model.safetensors", "README.md"

Layers = Annotated[int, Field(ge=1, le=1_000)]
"""How many blocks stand one on the other."""
Width = Annotated[int, Field(ge=1, le=65_536)]
"""Of a layer, or how many of something it has beside each other."""
Bits = Annotated[int, Field(ge=1, le=24)]
"""Of one part of a code, of which there are 2^bits."""
DropoutRate = Annotated[float, Field(ge=0, lt=1)]
"""The probability with which an element is dropped."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it stands; the message names the file and the tensor or key."""


class HubModule(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="kronos-qlib",
    pipeline_tag="time-series-forecasting",
    paper_url="https://arxiv.org/abs/2508.02739",
):
    """A network that loads and saves itself in the hub's format, with the usual methods of huggingface_hub's mixin.

    Loading is strict and reads no pickled weights, and saving writes each file whole or not at all. The mixin promises
    neither, so the methods that load and save are overridden; `push_to_hub` is the mixin's.

    Attributes:
        config: the constructor's arguments by name.
        source: where the weights came from (hub id, folder, or `nano` of this package), or None for a new network.
        entries: the zoo's networks of this kind by name.
        code_arguments: those of the constructor's arguments that name code of the user's own. These, and others that
            have a default, may be left out of a config.json, as published ones do.
    """

    config: dict[str, Any]
    source: str | None = None
    entries: ClassVar[Mapping[str, zoo.ZooEntry]] = {}
    code_arguments: ClassVar[tuple[str, ...]] = ()
    _arguments: ClassVar[type[Settings]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Describe the constructor's arguments as settings that pydantic checks."""
        super().__init_subclass__(**kwargs)
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        fields: dict[str, Any] = {
            each.name: (each.annotation, ... if each.default is each.empty else each.default) for each in parameters
        }
        cls._arguments = create_model(cls.__name__, __base__=Settings, **fields)

    def __init__(self) -> None:
        """Validate the arguments of the subclass's constructor, which the mixin has kept, by their annotations.

        Raises:
            ValueError: one line that names the argument.
        """
        super().__init__()
        arguments = cast(Mapping[str, Any], self._hub_mixin_config)
        # An attribute that networks pickled before the mixin have too; published ones have no code of their own.
        self.config = {key: value for key, value in arguments.items() if value is not None or self._is_required(key)}
        read_settings(self._arguments, type(self).__name__, self.config)

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Self:
        """Build a new network from exactly its constructor's arguments; `where` says in an error where they came from.

        Raises:
            CheckpointError: an unknown or a missing key, a value the constructor refuses, or weights that would not fit
                into this machine's memory.
        """
        known = list(cls._arguments.model_fields)
        unknown = sorted(set(config) - set(known))
        missing = [key for key in known if key not in config and cls._is_required(key)]
        if unknown:
            raise CheckpointError(f"{where}: unknown key {unknown[0]!r} for {cls.__name__}; known keys: {known}")
        if missing:
            raise CheckpointError(f"{where}: {cls.__name__} needs the keys {missing}")
        try:
            read_settings(cls._arguments, cls.__name__, config)
            check_memory(f"a {cls.__name__} of this size", 4 * cls._least_parameters(config), torch.device("cpu"))
            return cls(**config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{where}: {error}") from error

    @classmethod
    def _is_required(cls, argument: str) -> bool:
        return argument not in cls._arguments.model_fields or cls._arguments.model_fields[argument].is_required()

    @classmethod
    def _least_parameters(cls, config: dict[str, Any]) -> int:
        """Count the numbers in the blocks of a network with these arguments.

        By arithmetic: to build it on torch's meta device would import torch's compiler, which takes seconds.
        """
        layers, width = sum(value for key, value in config.items() if key.endswith("layers")), config["d_model"]
        return layers * width * (4 * width + 3 * config["ff_dim"])

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str | torch.device = "cpu",
        trusted: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a checkpoint from this package, a folder or the hub, strictly.

        Overridden because the mixin's own loads whatever it can: it drops unknown keys, takes a missing config.json for
        an empty one, checks no tensor unless asked to, and falls back on a pickled pytorch_model.bin.

        Args:
            pretrained_model_name_or_path: a name of the zoo (`small`; `nano` needs no network), which wins over a
                folder of that name; a folder with config.json and model.safetensors; or a hub id such as
                NeoQuasar/Kronos-small.
            revision: a commit, tag or branch of the hub; by default the commit that the zoo pins, if it knows one.
            cache_dir, force_download, local_files_only, token: as everywhere in huggingface_hub; a folder needs none.
            map_location: the device that the network is moved to.
            trusted: configurations of the user's own code by argument, such as `quantizer`. A config.json says which
                code its network needs, but names no place of it, and is refused without the same code here: nobody
                runs what a download asks for.

        Returns:
            The network in float32, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder or file, and the hub has or reaches none.
            CheckpointError: an unknown or missing key, an impossible value, a truncated file, a tensor that is
                missing, unexpected, mis-shaped or not finite, or a file of this package with another checksum.
        """
        source = str(pretrained_model_name_or_path)
        entry = cls.entries.get(source)
        if entry is not None and entry.hub_id is None and entry.folder is None:
            raise CheckpointError(f"{source} is a new network: it has no weights to load")
        place = source if entry is None else entry.hub_id or str(entry.folder)
        source = entry.hub_id or source if entry else source
        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        config_path, weights_path = (_locate(place, name, download) for name in (CONFIG_FILE, WEIGHTS_FILE))
        for path in (config_path, weights_path):
            if entry and entry.folder and digest_of_file(path) != entry.digests[path.name]:
                raise CheckpointError(f"{path}: damaged, its checksum is not the release's; install kronos-qlib again")
        if entry and entry.folder and entry.tokenizer:
            logger.info(zoo.SHIPPED_NOTE)
        try:
            config = json.loads(config_path.read_text())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{config_path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_path}: expected a mapping of constructor arguments")
        cls._check_sizes(config, config_path, weights_path)
        config |= _own_code(cls.code_arguments, config, trusted or {}, config_path)
        network = cls.from_config(config, str(config_path))
        network.load_weights(weights_path)
        network.source = source
        return network.eval().to(map_location)

    @classmethod
    def _check_sizes(cls, config: dict[str, Any], config_path: Path, weights_path: Path) -> None:
        """Refuse sizes that are not those of the weights before memory is taken for them. Raises CheckpointError."""
        stored = _read_shapes(weights_path)
        sizes = {size for shape in stored.values() for size in shape}
        for key, value in config.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if key.endswith("layers") and value > len(stored):
                raise CheckpointError(f"{config_path}: {key} is {value}, but {weights_path} has {len(stored)} tensors")
            bits = key.endswith("bits")
            if bits and value <= 24 and 2**value in sizes:
                continue
            if (bits or key in ("d_in", "d_model", "ff_dim")) and value > 0 and value not in sizes:
                raise CheckpointError(f"{config_path}: {key} is {value}, but no tensor of {weights_path} has that size")

    def load_weights(self, path: Path) -> None:
        """Replace every tensor by that of a safetensors file.

        Raises:
            CheckpointError: the file is no whole safetensors file, or a tensor is missing, unexpected, mis-shaped or
                not finite.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        _check_tensors(self.state_dict(), tensors, str(path))
        self.load_state_dict(tensors)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write config.json and model.safetensors into a folder, each of them whole or not at all.

        Overridden because the mixin's own deletes config.json before it writes the weights, so that a save that fails
        spoils the checkpoint it should replace, and puts a model card into every folder.

        Args:
            save_directory: the folder, made if missing.
            config: written instead of the constructor's arguments.
            repo_id, push_to_hub, push_to_hub_kwargs: with push_to_hub the checkpoint is then uploaded, as by
                `push_to_hub`, to repo_id or to a repository of the folder's name.
            model_card_kwargs: unless None, a model card (README.md) filled with these is written too, if none is there.

        Returns:
            The address of the commit on the hub, or None.
        """
        folder = Path(save_directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with whole_file(folder / WEIGHTS_FILE) as draft:
            save_file(tensors, draft, metadata={"format": "pt"})
        with whole_file(folder / CONFIG_FILE) as draft:
            draft.write_text(json.dumps(dict(sorted((config or self.config).items())), indent=2) + "\n")
        if model_card_kwargs is not None and not (folder / MODEL_CARD_FILE).exists():
            with whole_file(folder / MODEL_CARD_FILE) as draft:
                self.generate_model_card(**model_card_kwargs).save(draft)
        if not push_to_hub:
            return None
        options = push_to_hub_kwargs | {"config": config, "model_card_kwargs": model_card_kwargs}
        return self.push_to_hub(repo_id or folder.name, **options)

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **push_to_hub_kwargs: Any
    ) -> str:
        """Upload the checkpoint and a model card to the hub; all arguments are the mixin's.

        Overridden only to ask `save_pretrained` for the model card.
        """
        return super().push_to_hub(repo_id, model_card_kwargs=model_card_kwargs or {}, **push_to_hub_kwargs)

    @property
    def n_parameters(self) -> int:
        """How many numbers all parameters hold, trained and fixed; buffers are not counted."""
        return sum(parameter.numel() for parameter in self.parameters())


def _own_code(
    names: Sequence[str], config: Mapping[str, Any], trusted: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return the configurations of a network's own code, which the user has given and not the download."""
    needed = {name: config[name] for name in names if config.get(name) is not None}
    needless = [name for name, given in trusted.items() if given is not None and name not in needed]
    if needless:
        raise CheckpointError(f"{path}: it was made without a {needless[0]} of one's own, and takes none now")
    for name, identity in needed.items():
        if trusted.get(name) is None:
            raise CheckpointError(
                f"{path}: its {name} is code, {identity!r:.120}, and a checkpoint cannot say where that is: give it, "
                f"as {{start_from: {path.parent}, {name}: {{class: …, module_path: …}}}}"
            )
        given = identity_of(identify(check_configuration(trusted[name])))
        if given != identity:
            raise CheckpointError(f"{path}: its {name} is {identity!r:.120}, and the one given {given!r:.120}")
    return {name: trusted[name] for name in needed}


def _read_shapes(path: Path) -> dict[str, torch.Size]:
    """Read the shapes of a safetensors file's tensors, and nothing else of it."""
    try:
        with safe_open(path, "pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _check_shapes(expected: dict[str, torch.Size], found: dict[str, torch.Size], where: str) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]!r}")
    if unexpected:
        raise CheckpointError(f"{where}: {len(unexpected)} unexpected tensor(s), the first is {unexpected[0]!r}")
    for name, shape in expected.items():
        if shape != found[name]:
            shapes = f"{list(found[name])} instead of {list(shape)}"
            raise CheckpointError(f"{where}: tensor {name!r} has shape {shapes}")


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    shapes, stored = ({name: tensor.shape for name, tensor in side.items()} for side in (expected, found))
    _check_shapes(shapes, stored, where)
    for name, tensor in expected.items():
        if tensor.is_floating_point() and not found[name].is_floating_point():
            raise CheckpointError(f"{where}: tensor {name!r} holds {found[name].dtype}, not numbers with a fraction")
        if tensor.is_floating_point() and not torch.isfinite(found[name]).all():
            raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinite values")


def _locate(dir_or_hub_id: str, name: str, download: dict[str, Any]) -> Path:
    """The path of a checkpoint's file in a folder, or in the hub's cache after its download with these options."""
    folder = Path(dir_or_hub_id).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name} there; a checkpoint folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        return folder / name
    entry = zoo.published(dir_or_hub_id)
    if entry and download["revision"] is None:
        download = download | {"revision": entry.revision}
    try:
        validate_repo_id(dir_or_hub_id)
        with contextlib.suppress(LocalEntryNotFoundError):  # a commit's file that is in the cache asks no hub
            if download["revision"] is not None and not download["force_download"]:
                cached = download | {"local_files_only": True}
                return Path(hf_hub_download(dir_or_hub_id, name, **cached))  # `download` has the revision  # nosec B615
        if not download["local_files_only"] and not constants.HF_HUB_OFFLINE:
            check_answers(constants.ENDPOINT, SECONDS_TO_ANSWER)
        return Path(hf_hub_download(dir_or_hub_id, name, **download))  # it has the revision  # nosec B615
    except HFValidationError as error:
        raise FileNotFoundError(f"{dir_or_hub_id}: neither a folder nor a hub id of the form owner/name") from error
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{dir_or_hub_id}: no such folder, and the hub has no such open repository") from error
    except Exception as error:  # what a proxy or a broken connection raises depends on the hub library's transport
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(f"{dir_or_hub_id}: the hub's repository has no {name}") from error
        reason = "local_files_only is set" if download["local_files_only"] else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{dir_or_hub_id}: not in the local cache and {reason}: give a folder or fetch it once "
            "on a machine that reaches the hub (hf download) and copy its cache"
        ) from error


def digest_of_weights(network: HubModule) -> str:
    """Return a digest of all tensors of a network and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
