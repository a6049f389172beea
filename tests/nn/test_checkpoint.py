"""Checkpoints load strictly: what is wrong with one is said, with the file and the tensor or key."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.nn import zoo
from kronos_qlib.nn.checkpoint import CheckpointError


@pytest.fixture
def folder(small, tmp_path):
    """A copy of a good model checkpoint, to be spoiled."""
    shutil.copytree(small.folder / "model", tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", [Kronos, KronosTokenizer])
def test_a_saved_network_loads_as_it_was(kind, tmp_path):
    entry = (zoo.MODELS if kind is Kronos else zoo.TOKENIZERS)["nano"]
    network = kind(**entry.config)
    network.save_pretrained(tmp_path / "saved")
    loaded = kind.from_pretrained(tmp_path / "saved")
    assert loaded.config == network.config == entry.config
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("head.proj_s1.bias"))
    with pytest.raises(CheckpointError, match=r"model.safetensors: 1 tensor\(s\) missing.*'head.proj_s1.bias'"):
        Kronos.from_pretrained(folder)


def test_an_unexpected_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"head.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="unexpected.*'head.extra'"):
        Kronos.from_pretrained(folder)


def test_a_mis_shaped_tensor_is_named_with_both_shapes(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"'norm.weight' has shape \[7\] instead of \[48\]"):
        Kronos.from_pretrained(folder)


def test_a_tensor_with_nan_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors["norm.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="'norm.weight' holds NaN"):
        Kronos.from_pretrained(folder)


def test_a_truncated_file_is_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        Kronos.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        Kronos.from_pretrained(folder)


def test_an_unknown_and_a_missing_key_of_the_configuration_are_named(folder):
    edit_config(folder, lambda config: config.update({"depth": 3}))
    with pytest.raises(CheckpointError, match=r"config.json: unknown key 'depth'.*n_layers"):
        Kronos.from_pretrained(folder)
    edit_config(folder, lambda config: [config.pop(key) for key in ("depth", "n_heads")])
    with pytest.raises(CheckpointError, match=r"needs the keys \['n_heads'\]"):
        Kronos.from_pretrained(folder)


def test_a_broken_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        Kronos.from_pretrained(folder)


def test_an_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="not in the local cache and the hub cannot be reached: give a folder or"
    ):
        Kronos.from_pretrained("NeoQuasar/Kronos-small")


def test_a_path_that_is_no_folder_and_no_hub_id_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        Kronos.from_pretrained(tmp_path / "nowhere")


def test_an_interrupted_save_leaves_the_old_checkpoint(small, folder, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("kronos_qlib.nn.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        small.model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "entry"),
    [(Kronos, entry) for entry in zoo.MODELS.values()]
    + [(KronosTokenizer, entry) for entry in zoo.TOKENIZERS.values()],
)
def test_parameter_counts_are_those_of_the_zoo(kind, entry):
    with torch.device("meta"):
        assert kind(**entry.config).n_parameters == entry.parameters


def test_published_entries_name_hub_context_and_cut_off():
    published = [entry for entry in zoo.MODELS.values() if entry.hub_id]
    assert len(published) == 3
    for entry in published:
        assert zoo.published(entry.hub_id) is entry
        assert entry.trained_until == "2024-06-30"
        assert zoo.TOKENIZERS[entry.tokenizer].hub_id.startswith("NeoQuasar/Kronos-Tokenizer")
    assert {entry.max_context for entry in published} == {512, 2048}


@pytest.mark.parametrize("problem", [ConnectionResetError("closed"), RuntimeError("a proxy said 403")])
def test_whatever_keeps_the_hub_away_is_told_as_such(monkeypatch, problem):
    def fail(*arguments, **options):
        raise problem

    monkeypatch.setattr("kronos_qlib.nn.checkpoint.hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        Kronos.from_pretrained("NeoQuasar/Kronos-small")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layers", 0, "n_layers must be 1 or more, not 0"),
        ("n_heads", 2.0, "n_heads must be 1 or more, not 2.0"),
        ("ffn_dropout_p", 1.0, r"ffn_dropout_p must be in \[0, 1\), not 1.0"),
        ("resid_dropout_p", True, "resid_dropout_p must be a number, not True"),
        ("learn_te", "no", "learn_te must be true or false, not 'no'"),
        ("d_model", 50, r"d_model \(50\) must be a positive multiple of 2 × n_heads"),
    ],
)
def test_an_impossible_constructor_argument_is_named(folder, key, value, message):
    edit_config(folder, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        Kronos.from_pretrained(folder)


def test_a_checkpoint_can_be_read_by_whoever_may_read_its_folder(small, tmp_path):
    small.model.save_pretrained(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
