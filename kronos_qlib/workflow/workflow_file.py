"""A workflow file for `qrun`: read, and checked in its structure, before anything of it runs."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from qlib.cli.run import render_template, sys_config
from qlib.utils.data import update_config
from ruamel.yaml import YAML, YAMLError

from kronos_qlib.files import whole_file
from kronos_qlib.settings import Settings, check_configuration, read_settings


def _provider_uri(value: Any) -> Any:
    folders = value.values() if isinstance(value, dict) and value else [value]
    if all(isinstance(folder, (str, Path)) and str(folder).strip() for folder in folders):
        return value
    raise ValueError("should be the folder of a Qlib store, or a mapping from frequency to folder")


def _exp_manager(value: Any) -> Any:
    name = check_configuration(value).get("kwargs", {}).get("default_exp_name", "Experiment")
    if not isinstance(name, str) or not name:
        raise ValueError("should have the name of an experiment as its default_exp_name")
    return value


def _records(value: Any) -> list[Any]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [check_configuration(record) for record in values]


class QlibInit(Settings):
    """The `qlib_init` of a workflow: what Qlib's `init` is called with."""

    model_config = ConfigDict(extra="allow")

    provider_uri: Annotated[Any, BeforeValidator(_provider_uri)]
    region: str = "cn"
    kernels: Annotated[int, Field(ge=1)] | None = None
    exp_manager: Annotated[Any, BeforeValidator(_exp_manager)]


class Task(Settings):
    """The `task` of a workflow."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[Any, BeforeValidator(check_configuration)]
    dataset: Annotated[Any, BeforeValidator(check_configuration)]
    record: Annotated[list[Any], BeforeValidator(_records)] = []
    reweighter: Any = None


class Workflow(Settings):
    """A workflow file: where the data are, and what is trained, scored and recorded."""

    model_config = ConfigDict(extra="allow")

    qlib_init: Annotated[QlibInit, Field(strict=False)]
    task: Annotated[Task, Field(strict=False)]
    experiment_name: Annotated[str, Field(min_length=1)] = "workflow"


def read_workflow(path: Path) -> dict[str, Any]:
    """Read a workflow file as `qrun` does: templates filled from the environment, laid over its BASE_CONFIG_PATH.

    Raises:
        FileNotFoundError: there is no such file, or not the base that it names.
        ValueError: it is no workflow; one line that names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such workflow file")
    config = _load(path, _render(path))
    base = config.get("BASE_CONFIG_PATH") if isinstance(config, dict) else None
    if base is not None:
        if not isinstance(base, str):
            raise ValueError(f"{path}: BASE_CONFIG_PATH should be the path of a workflow, not {base!r}")
        places = [Path(base), path.absolute().parent / base]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: BASE_CONFIG_PATH {base} is neither here nor beside the workflow")
        below = _load(found, found.read_text())
        if not isinstance(below, dict):
            raise ValueError(f"{path}: BASE_CONFIG_PATH {base} holds no mapping")
        config = update_config(below, config)
    if not isinstance(config, dict) or not {"qlib_init", "task"} <= config.keys():
        raise ValueError(f"{path}: no workflow: it needs qlib_init, task.model and task.dataset")
    read_settings(Workflow, str(path), config)
    sys_config(config, str(path))
    return config


def write_flat_workflow(path: Path, out: Path) -> Path:
    """Write a workflow with its base laid under it and its templates filled in, as one file of plain YAML.

    Qlib's `Rolling` and other readers of a workflow file know neither a base nor templates.
    """
    config = read_workflow(path)
    config.pop("BASE_CONFIG_PATH", None)
    folders = (config.get("sys") or {}).get("rel_path")
    if folders:
        folders = [folders] if isinstance(folders, str) else folders
        config["sys"]["rel_path"] = [str(path.absolute().parent / each) for each in folders]
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 120
    with whole_file(out) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(
            f"# {path.name} with its base and its templates filled in; written by kronos-qlib workflow --flat.\n"
        )
        yaml.dump(config, file)
    return out


def _render(path: Path) -> str:
    try:
        return render_template(str(path))
    except Exception as error:  # a template is a program
        raise ValueError(f"{path}: the template cannot be filled ({type(error).__name__}: {error})") from error


def _load(path: Path, text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
