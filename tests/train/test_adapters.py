"""Adapters change nothing at first, learn alone and merge into plain weights; frozen blocks stay as they are."""

import sys

import pytest
import torch

from kronos_qlib import Kronos, KronosTokenizer
from kronos_qlib.nn import zoo
from kronos_qlib.settings import read_settings
from kronos_qlib.train.adapters import (
    LoraSettings,
    add_lora,
    check_freeze,
    freeze_blocks,
    has_lora,
    merge_lora,
    merged_copy,
    require_peft,
)

SIZES = {"d_model": 16, "ff_dim": 32, "n_heads": 2, "s1_bits": 4, "s2_bits": 4}
DROPOUTS = {"ffn_dropout_p": 0.1, "attn_dropout_p": 0.1, "resid_dropout_p": 0.1}


def tokenizer():
    torch.manual_seed(0)
    sizes = {**SIZES, **DROPOUTS, "n_enc_layers": 3, "n_dec_layers": 2}
    return KronosTokenizer(**(zoo.TOKENIZERS["nano"].config | sizes))


def model(**sizes):
    torch.manual_seed(0)
    return Kronos(**(zoo.MODELS["nano"].config | SIZES | DROPOUTS | {"n_layers": 2, **sizes}))


NETWORKS = pytest.mark.parametrize("make", [tokenizer, model])


def bars():
    return torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))


def codes():
    """Ids s1 and s2, and stamps."""
    s1, s2 = torch.randint(16, (2, 4, 12), generator=torch.Generator().manual_seed(1))
    return s1, s2, torch.tensor([30, 9, 2, 15, 6]).expand(4, 12, 5)


def run(network):
    """What a network computes: reconstructions of stage 1, logits of stage 2."""
    if isinstance(network, KronosTokenizer):
        return list(network(bars())[0])
    s1, s2, stamp = codes()
    return list(network(s1, s2, stamp, use_teacher_forcing=True, s1_targets=s1.roll(-1, 1)))


@torch.no_grad()
def outputs(network):
    return run(network.eval())


def loss(network):
    if isinstance(network, KronosTokenizer):
        (recon_s1, recon), bsq_loss, _, _ = network(bars())
        return (recon_s1 - bars()).square().mean() + (recon - bars()).square().mean() + bsq_loss
    s1, s2, _ = codes()
    return network.head.compute_loss(*run(network), s1.roll(-1, 1), s2.roll(-1, 1))[0]


def train(network, after_step=lambda network: None):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        network.train()
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()
        after_step(network)


def adapted(network, **settings):
    add_lora(network, LoraSettings(**settings))
    return network


def tensors(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(before, after):
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def learning(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def adapted_layers(network):
    return {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A." in name}


@pytest.mark.slow
@NETWORKS
def test_new_adapters_change_no_output(make):
    for expected, found in zip(outputs(make()), outputs(adapted(make())), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.slow
@NETWORKS
def test_only_adapters_learn(make):
    network = adapted(make())
    before = tensors(network)
    train(network)
    adapters = {name for name in before if ".lora_" in name}
    gradients = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert learning(network) == gradients == changed(before, tensors(network)) == adapters


@NETWORKS
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["w2"]])
def test_adapters_are_put_beside_the_targets_alone(make, targets):
    network = make()
    expected = {name for name, _ in network.named_modules() if name.rpartition(".")[2] in targets}
    assert adapted_layers(adapted(network, targets=targets)) == expected


def test_by_default_every_linear_layer_of_blocks_and_cross_attention_gets_an_adapter_of_the_rank():
    network = adapted(model(n_layers=4), rank=3)
    assert len(adapted_layers(network)) == 4 * 7 + 4
    assert tuple(network.transformer[3].ffn.w2.lora_A["default"].weight.shape) == (3, 32)


@NETWORKS
def test_adapters_depend_on_the_global_random_state_alone(make):
    draws = []
    for seed in (5, 5, 6):
        network = make()
        torch.manual_seed(seed)
        draws.append(tensors(adapted(network)))
    assert not changed(draws[0], draws[1])
    assert changed(draws[0], draws[2]) == {name for name in draws[0] if ".lora_A." in name}


@NETWORKS
def test_a_merged_copy_computes_the_same_and_loads_as_a_published_network(make, tmp_path):
    plain, network = make(), adapted(make(), rank=2, alpha=7)
    train(network)
    copy = merged_copy(network)
    assert type(copy) is type(network)
    assert list(copy.state_dict()) == list(plain.state_dict())
    copy.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert not changed(tensors(copy), tensors(loaded))
    for trained, found, untrained in zip(outputs(network), outputs(loaded), outputs(plain), strict=True):
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(trained, untrained, rtol=1e-2, atol=1e-2)


@NETWORKS
def test_merging_adds_alpha_over_rank_times_the_product_of_the_adapters(make):
    network = adapted(make(), rank=2, alpha=7)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    before, plain = tensors(network), merged_copy(network).state_dict()
    for name in adapted_layers(network):
        product = before[f"{name}.lora_B.default.weight"] @ before[f"{name}.lora_A.default.weight"]
        torch.testing.assert_close(plain[f"{name}.weight"], before[f"{name}.base_layer.weight"] + 3.5 * product)


@pytest.mark.slow
@NETWORKS
def test_training_goes_on_bitwise_after_a_merged_copy(make):
    undisturbed, copied = adapted(make(), dropout=0.2), adapted(make(), dropout=0.2)
    for network, after_step in ((undisturbed, lambda network: None), (copied, merged_copy)):
        torch.manual_seed(3)
        train(network, after_step)
    assert not changed(tensors(undisturbed), tensors(copied))


@NETWORKS
def test_without_adapters_there_is_nothing_to_merge(make):
    network = make()
    assert not has_lora(network)
    assert merged_copy(network) is network
    freeze_blocks(network, 1)
    before = learning(network)
    merge_lora(network)
    assert learning(network) == before


@NETWORKS
def test_merging_in_place_leaves_a_plain_network_that_learns_as_a_new_one(make):
    network, new = adapted(make()), make()
    train(network)
    trained, copy = outputs(network), merged_copy(network)
    assert has_lora(network)
    merge_lora(network)
    assert not has_lora(network)
    assert set(vars(network)) == set(vars(new))
    assert [type(part) for part in network.modules()] == [type(part) for part in new.modules()]
    assert not changed(tensors(copy), tensors(network))
    assert learning(network) == learning(copy) == learning(new)
    for expected, found in zip(trained, outputs(network), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fixed_time_tables_are_still_fixed_after_merging():
    network = adapted(model(learn_te=False))
    merge_lora(network)
    assert not any(table.requires_grad for table in network.time_emb.tables())
    assert network.transformer[0].norm1.weight.requires_grad


def test_adapters_learn_under_bfloat16_autocast_and_stay_float32():
    network = adapted(model())
    before = tensors(network)
    with torch.autocast("cpu", torch.bfloat16):
        train(network)
    assert changed(before, tensors(network)) == learning(network)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@torch.no_grad()
def test_the_one_query_of_generation_goes_through_the_adapters():
    network = adapted(model()).eval()
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    context, s1 = torch.randn(3, 9, 16), torch.zeros(3, 1, dtype=torch.long)
    found, expected = network.decode_s2(context, s1), merged_copy(network).decode_s2(context, s1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "count", "frozen"),
    [
        (tokenizer, 0, ()),
        (tokenizer, 1, ("embed.", "encoder.0.")),
        (tokenizer, 2, ("embed.", "encoder.0.", "encoder.1.")),
        (model, 0, ()),
        (model, 1, ("embedding.", "time_emb.", "transformer.0.")),
        (model, 2, ("embedding.", "time_emb.", "transformer.0.", "transformer.1.")),
    ],
)
def test_exactly_the_frozen_part_stays_as_it_is(make, count, frozen):
    network = make()
    freeze_blocks(network, count)
    before = tensors(network)
    train(network)
    expected = {name for name, _ in network.named_parameters() if not name.startswith(frozen)}
    assert learning(network) == changed(before, tensors(network)) == expected


@NETWORKS
def test_frozen_blocks_keep_their_dropout_in_training(make):
    network = make()
    freeze_blocks(network, 1)
    network.train()
    assert all(part.training for part in network.modules())


@NETWORKS
def test_frozen_blocks_get_no_adapters(make):
    network = make()
    freeze_blocks(network, 1)
    layers = adapted_layers(adapted(network))
    assert not any(name.startswith(("encoder.0.", "transformer.0.")) for name in layers)
    assert any(name.startswith(("encoder.1.", "transformer.1.")) for name in layers)


@NETWORKS
def test_more_blocks_than_there_are_cannot_be_frozen(make):
    network = make()
    before = learning(network)
    check_freeze(network, 2)
    for refuse in (check_freeze, freeze_blocks):
        with pytest.raises(ValueError, match=f"freeze_blocks: .* at most 2, .*{type(network).__name__}, not 3"):
            refuse(network, 3)
    assert learning(network) == before


def test_adapters_are_added_once_and_only_where_something_learns():
    with pytest.raises(ValueError, match="lora: the network has adapters already"):
        adapted(adapted(model()))
    network = model()
    freeze_blocks(network, 2)
    with pytest.raises(ValueError, match="lora: no layer that learns is among the targets"):
        adapted(network, targets=["w1"])
    assert not has_lora(network)


def test_missing_peft_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    network = model()
    for attempt in (require_peft, lambda: adapted(network)):
        with pytest.raises(ModuleNotFoundError, match=r"lora needs .*pip install -c constraints.txt -e '.\[lora\]'"):
            attempt()
    assert not has_lora(network)


def test_lora_settings_have_the_usual_defaults_and_take_whole_numbers():
    settings = read_settings(LoraSettings, "lora", {"alpha": 32})
    assert (settings.rank, settings.alpha, settings.dropout) == (8, 32, 0)
    assert settings.targets == ["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: .*greater than or equal to 1, not 0"),
        ({"rank": 8.0}, "rank: .*integer, not 8.0"),
        ({"alpha": 0}, "alpha: .*greater than 0, not 0"),
        ({"dropout": 1}, "dropout: .*less than 1, not 1"),
        ({"targets": []}, "targets: .*at least 1 item"),
        ({"targets": ["w1", "fc1"]}, r"targets\.1: .*'q_proj', .*'w3', not 'fc1'"),
        ({"r": 8}, "unknown key 'r'; known keys: rank, alpha, dropout, targets"),
    ],
)
def test_wrong_lora_settings_are_one_line_that_names_the_key(values, message):
    with pytest.raises(ValueError, match=f"^lora: {message}") as raised:
        read_settings(LoraSettings, "lora", values)
    assert "\n" not in str(raised.value)
