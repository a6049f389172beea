"""Checkpoints load strictly: what is wrong with one is said, with the file and the tensor or key."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from kronos_qlib import Kronos, KronosTokenizer, addresses
from kronos_qlib.nn import checkpoint, zoo
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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


KINDS = pytest.mark.parametrize("kind", [Kronos, KronosTokenizer])


@KINDS
def test_nano_comes_with_the_package_and_asks_no_hub(kind, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(checkpoint, "hf_hub_download", refuse)
    network = kind.from_pretrained("nano")
    assert network.source == "nano" and network.n_parameters == kind.entries["nano"].parameters
    assert network.config == kind.entries["nano"].config and not network.training


@KINDS
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_the_package_is_named(kind, name, tmp_path, monkeypatch):
    entry = kind.entries["nano"]
    folder = shutil.copytree(entry.folder, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[-9] ^= 1
    (folder / name).write_bytes(content)
    monkeypatch.setitem(kind.entries, "nano", replace(entry, folder=folder))
    with pytest.raises(CheckpointError, match=rf"{name}: damaged, its checksum is not the release's"):
        kind.from_pretrained("nano")


@KINDS
def test_a_new_network_has_no_weights_to_load(kind):
    with pytest.raises(CheckpointError, match="nano-new is a new network: it has no weights"):
        kind.from_pretrained("nano-new")


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


def test_a_hub_that_does_not_answer_is_said_without_a_second_try(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(addresses, "getproxies", dict)
    asked = []
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda *given, **options: asked.append(options) or fail())

    def fail():
        raise LocalEntryNotFoundError("nothing in the cache")

    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        Kronos.from_pretrained("NeoQuasar/Kronos-small", cache_dir=tmp_path)
    assert [options["local_files_only"] for options in asked] == [True], "the cache was asked, the hub was not"


@pytest.mark.parametrize(("key", "value"), [("n_layers", 10**9), ("d_model", 10**9), ("s1_bits", 10**30)])
def test_sizes_that_are_not_those_of_the_weights_are_refused_by_arithmetic(folder, key, value):
    edit_config(folder, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        Kronos.from_pretrained(folder)


def test_a_new_network_that_cannot_fit_is_refused_before_its_memory_is_taken():
    config = zoo.MODELS["nano"].config | {"d_model": 65_536, "ff_dim": 65_536, "n_layers": 30}
    with pytest.raises(CheckpointError, match=r"a Kronos of this size needs [\d,]+ GiB of memory"):
        Kronos.from_config(config, "here")


@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.int64])
def test_tensors_of_another_type_are_named(folder, kind):
    edit_tensors(folder, lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].to(kind)}))
    with pytest.raises(CheckpointError, match=f"tensor 'norm.weight' holds {kind}"):
        Kronos.from_pretrained(folder)


@pytest.fixture
def hub_cache(small, tmp_path):
    """A cache of the hub as huggingface_hub lays it out: a repository's pinned commit, and another as its `main`."""
    pinned, newest = zoo.MODELS["small"].revision, "f" * 40
    repository = tmp_path / "cache" / "models--NeoQuasar--Kronos-small"
    for commit in (pinned, newest):
        shutil.copytree(small.folder / "model", repository / "snapshots" / commit)
    edit_config(repository / "snapshots" / newest, lambda config: config.update({"token_dropout_p": 0.5}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(newest)
    return tmp_path / "cache"


def test_the_usual_arguments_of_from_pretrained(small, hub_cache):
    name, where = "NeoQuasar/Kronos-small", {"cache_dir": hub_cache, "local_files_only": True}
    pinned = Kronos.from_pretrained(name, **where)
    assert (pinned.source, pinned.config, pinned.training) == (name, small.model.config, False)
    assert Kronos.from_pretrained(name, revision="main", **where).config["token_dropout_p"] == 0.5
    assert Kronos.from_pretrained(name, map_location="meta", **where).norm.weight.device.type == "meta"
    with pytest.raises(FileNotFoundError, match="not in the local cache and local_files_only is set: give a folder"):
        Kronos.from_pretrained(name, revision="other", **where)
    with pytest.raises(TypeError, match="cash_dir"):
        Kronos.from_pretrained(name, cash_dir=hub_cache)


def test_a_folder_needs_none_of_them(folder, tmp_path):
    Kronos.from_pretrained(
        folder, cache_dir=tmp_path / "cache", force_download=True, local_files_only=True, token=False, revision="x"
    )
    assert not (tmp_path / "cache").exists()


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no model.safetensors there"):
        Kronos.from_pretrained(folder)


def test_push_to_hub_uploads_a_whole_checkpoint_with_a_model_card(small, tmp_path, monkeypatch):
    uploaded = {}

    def upload(api, *, repo_id, folder_path, **options):
        uploaded.update({repo_id: contents(Path(folder_path))})
        return "the commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert small.model.push_to_hub("me/mine", private=True) == "the commit"
    card = uploaded["me/mine"].pop("README.md").decode()
    assert "library_name: kronos-qlib" in card and "arxiv.org/abs/2508.02739" in card
    small.model.save_pretrained(tmp_path)
    assert uploaded["me/mine"] == contents(tmp_path), "and no card in a folder"


def test_a_folder_is_pushed_when_it_is_saved_under_its_name_or_another(small, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Kronos, "push_to_hub", lambda self, repo_id, **options: pushed.append(repo_id))
    for options in ({}, {"push_to_hub": True}, {"push_to_hub": True, "repo_id": "me/mine"}):
        small.model.save_pretrained(tmp_path / "mine", **options)
    assert pushed == ["mine", "me/mine"]


def test_a_network_pickled_before_it_had_the_hubs_methods_is_read(small):
    """The parameters of a recorder hold networks whose only own attributes are `config` and `source`."""
    state = {key: value for key, value in vars(small.model).items() if key != "_hub_mixin_config"}
    old = Kronos.__new__(Kronos)
    old.__setstate__(pickle.loads(pickle.dumps(state)))
    assert (old.config, old.source) == (small.model.config, str(small.folder / "model"))
    s1, s2, stamp = torch.zeros(1, 3, dtype=int), torch.zeros(1, 3, dtype=int), torch.ones(1, 3, 5, dtype=int)
    assert torch.equal(old.decode_s1(s1, s2, stamp)[0], small.model.decode_s1(s1, s2, stamp)[0])


def test_a_path_that_is_no_folder_and_no_hub_id_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        Kronos.from_pretrained(tmp_path / "nowhere")


def test_an_interrupted_save_leaves_the_old_checkpoint(small, folder, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    before = contents(folder)
    monkeypatch.setattr("kronos_qlib.nn.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        small.model.save_pretrained(folder)
    assert contents(folder) == before and sorted(before) == ["config.json", "model.safetensors"]


def test_parameter_counts_are_those_of_the_zoo(monkeypatch):
    # On the meta device these two would import torch's compiler, which takes longer than all of this file.
    monkeypatch.setattr("torch.nn.init._no_grad_normal_", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr("kronos_qlib.nn.layers.Rotary", lambda head_dim: torch.nn.Identity())
    with torch.device("meta"):
        for name, entry in zoo.MODELS.items():
            assert Kronos(**entry.config).n_parameters == entry.parameters, name
    for name, entry in zoo.TOKENIZERS.items():
        assert KronosTokenizer(**entry.config).n_parameters == entry.parameters, name


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
        ("n_layers", 0, "n_layers: .* greater than or equal to 1, not 0"),
        ("n_heads", 2.0, "n_heads: .* valid integer, not 2.0"),
        ("ff_dim", True, "ff_dim: .* valid integer, not True"),
        ("ffn_dropout_p", 1.0, "ffn_dropout_p: .* less than 1, not 1.0"),
        ("attn_dropout_p", -0.1, "attn_dropout_p: .* greater than or equal to 0, not -0.1"),
        ("token_dropout_p", float("nan"), "token_dropout_p: .*, not nan"),
        ("resid_dropout_p", "0.1", "resid_dropout_p: .* valid number, not '0.1'"),
        ("learn_te", "no", "learn_te: .* valid boolean, not 'no'"),
        ("n_heads", 5, r"d_model \(48\) must be a positive multiple of 2 × n_heads"),
    ],
)
def test_an_impossible_constructor_argument_is_named(folder, small, key, value, message):
    edit_config(folder, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=f"config.json: Kronos: .*{message}|config.json: {message}") as error:
        Kronos.from_pretrained(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        Kronos(**small.model.config | {key: value})


def test_a_number_of_the_loss_that_is_not_finite_is_named(small):
    with pytest.raises(ValueError, match="KronosTokenizer: gamma: .* finite number, not inf"):
        KronosTokenizer(**small.tokenizer.config | {"gamma": float("inf")})


def test_a_checkpoint_can_be_read_by_whoever_may_read_its_folder(small, tmp_path):
    small.model.save_pretrained(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
