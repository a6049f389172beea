"""Parameter-efficient fine-tuning: the first blocks frozen, or low-rank adapters (LoRA) beside frozen weights."""

import copy
from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field
from torch import nn
from torch.nn import Parameter

from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import HubModule
from kronos_qlib.nn.dropout import Dropout
from kronos_qlib.nn.model import FixedEmbedding
from kronos_qlib.nn.ranker import KronosRankNetwork
from kronos_qlib.settings import Settings

Layer = Literal["q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3"]


class LoraSettings(Settings):
    """The `lora` mapping of a stage (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + alpha / rank · B A x."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B, the weights that learn."""
    alpha: float = Field(default=16.0, gt=0)
    """Scales the adapters' outputs; with the same alpha / rank, another rank needs no other learning rate."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' inputs, in training."""
    targets: list[Layer] = Field(default=list(get_args(Layer)), min_length=1)
    """The linear layers that get adapters, wherever their names occur. All by default: only adapters on every layer of
    a block come close to full fine-tuning (Dettmers et al. 2023, arXiv 2305.14314)."""


def freeze_blocks(network: HubModule, count: int) -> None:
    """Freeze the first `count` blocks of a network and the embeddings before them, in place; 0 freezes nothing.

    Kronos: embedding, time_emb and transformer[:count]; the s1 embedding is also the query of the dependency layer, and
    is frozen there too. KronosTokenizer: embed and encoder[:count]. Frozen blocks keep their dropout in training: it
    regularises the blocks above them as it does without freezing, and follows `network.train()` as everywhere.

    Raises:
        ValueError: the network has fewer blocks.
    """
    check_freeze(network, count)
    if count:
        embeddings, blocks = _embeddings_and_blocks(network)
        for module in [*embeddings, *blocks[:count]]:
            module.requires_grad_(False)


def check_freeze(network: HubModule, count: int) -> None:
    """Refuse to freeze more blocks than a network has, without changing it.

    Raises:
        ValueError: naming `freeze_blocks` and the number of blocks.
    """
    kind, available = type(network).__name__, len(_embeddings_and_blocks(network)[1])
    if count > available:
        raise ValueError(f"freeze_blocks: should be at most {available}, the blocks of this {kind}, not {count}")


def _embeddings_and_blocks(network: HubModule) -> tuple[list[nn.Module], nn.ModuleList]:
    """Return the embeddings of a network's input, and the blocks that they feed."""
    if isinstance(network, (Kronos, KronosRankNetwork)):
        return [network.embedding, network.time_emb], network.transformer
    assert isinstance(network, KronosTokenizer)
    return [network.embed], network.encoder


def learning_rates(network: HubModule, learning_rate: float, layer_decay: float) -> Iterator[tuple[float, Parameter]]:
    """Give the learning rate of each parameter that learns, in the network's order.

    The layers above the last block learn at `learning_rate`, each block at `layer_decay` of what is above it, and the
    embeddings at that of the first block times `layer_decay`.
    """
    embeddings, blocks = _embeddings_and_blocks(network)
    below = {id(p): len(blocks) + 1 for module in embeddings for p in module.parameters()}
    below |= {id(p): len(blocks) - index for index, block in enumerate(blocks) for p in block.parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad:
            yield learning_rate * layer_decay ** below.get(id(parameter), 0), parameter


def require_peft() -> None:
    """Import peft, which takes some seconds, so that a missing or broken one is an error before long work.

    Raises:
        ModuleNotFoundError: with the line that installs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"lora needs the package peft, which cannot be imported ({error}); install it with "
            "pip install -c constraints.txt -e '.[lora]'"
        ) from error


def add_lora(network: HubModule, settings: LoraSettings) -> None:
    """Add adapters to a network's linear layers, in place; from then on only they learn.

    The outputs are unchanged at first: A is drawn from torch's global random state, on the CPU for any device, and B is
    zero. Layers that do not learn, such as those of frozen blocks, get no adapter.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: the network has adapters already, or none of its layers that learn is among the targets.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(network):
        raise ValueError("lora: the network has adapters already; merge them first")
    adapted = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings.targets and module.weight.requires_grad
    ]
    if not adapted:
        raise ValueError(f"lora: no layer that learns is among the targets {settings.targets}; freeze fewer blocks")
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=adapted
    )
    inject_adapter_in_model(config, network)
    del network.peft_config  # peft's note for loading its own files
    if isinstance(network, KronosRankNetwork):
        network.rank_head.requires_grad_(True)  # a new layer, which has nothing to keep
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout  # masks from the same random numbers as the network's own


def has_lora(network: HubModule) -> bool:
    """Return whether a network has adapters that are not merged; only its `merged_copy` can be published or forecast.

    Generation reads the layers' weights, not their outputs, and would leave the adapters out.
    """
    return any(_is_adapted(module) for module in network.modules())


def merged_copy(network: HubModule) -> HubModule:
    """Copy a network with its adapters merged into the weights; one without adapters is returned itself.

    The copy's state dict has the published names, and saves and loads as any other; the network and torch's random
    state do not change, so that its training goes on as if nothing had been copied.
    """
    if not has_lora(network):
        return network
    plain = copy.deepcopy(network)
    merge_lora(plain)
    return plain


def merge_lora(network: HubModule) -> None:
    """Merge a network's adapters into its weights, in place, so that it is plain again and learns as a new one does.

    A network without adapters does not change.
    """
    adapted = [name for name, module in network.named_modules() if _is_adapted(module)]
    for name in adapted:
        layer = network.get_submodule(name)
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    if adapted:
        network.requires_grad_(True)
        for module in network.modules():
            if isinstance(module, FixedEmbedding):
                module.requires_grad_(False)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")  # peft's own class would have to be imported, and that takes seconds
