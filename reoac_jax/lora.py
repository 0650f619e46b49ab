"""finetune_mode="lora": the backbone's parameters are {"base": frozen, "lora": adapter}.

Updates change the adapter alone; rollouts run on the merged kernels. A checkpoint holds the
adapter, and a finished run has it in the PEFT layout too.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from common import torch_bridge
from common.errors import UserError
from common.lm import lora
from common.lm.layers import Params
from common.lm.lora import LoraSettings
from common.torch_bridge import Rule
from reoac_jax.backbone import dit, dit_bridge, e2d2, e2d2_bridge
from reoac_jax.backbone.base import Finetuning
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.scratch import NetworkConfig

ATTENTION = {"e2d2": ("q_proj", "k_proj", "v_proj", "o_proj"), "dit": ("attn_qkv", "attn_out")}
MLP = {
    "e2d2": ("gate_proj", "up_proj", "down_proj"),
    "dit": ("blocks.{i}.mlp.0", "blocks.{i}.mlp.2"),
}


def network_names(network: NetworkConfig) -> tuple[list[Rule], dict[str, tuple[int, ...]]]:
    """Name table and parameter shapes of a network."""
    if isinstance(network, DiTConfig):
        # SEDD's code has the network itself as the module, MDLM's puts it into a wrapper.
        prefix = "" if network.parameterization == "sedd" else dit_bridge.PREFIX
        return dit_bridge.name_table(prefix), torch_bridge.flatten(dit.parameter_shapes(network))
    rules = e2d2_bridge.name_table(network)
    return rules, torch_bridge.flatten(e2d2.parameter_shapes(network))


def make_settings(config: ConfigDict, network: NetworkConfig) -> LoraSettings:
    """Settings of config.lora for a network.

    Raises:
      UserError: an unknown target.
    """
    section = config.lora
    kind = "dit" if isinstance(network, DiTConfig) else "e2d2"
    modules = tuple(section.target_modules) or ATTENTION[kind]
    if section.mlp:
        modules += tuple(name for name in MLP[kind] if name not in modules)
    targets = lora.select_targets(*network_names(network), modules)
    return LoraSettings(section.r, section.alpha, section.dropout, targets)


def make_adapter(config: ConfigDict, network: NetworkConfig) -> tuple[Params, LoraSettings]:
    """A fresh adapter of config.lora, or the PEFT adapter that config.lora.adapter names.

    Raises:
      UserError: the adapter cannot be read or contradicts the config.
    """
    section = config.lora
    if not section.adapter:
        settings = make_settings(config, network)
        key = jax.random.fold_in(jax.random.key(config.seed), 3)
        return jax.jit(lambda k: lora.init_adapter(k, settings))(key), settings
    adapter, stored = lora.load_peft(section.adapter, *network_names(network))
    if stored.rank != section.r or stored.scale != section.alpha / section.r:
        raise UserError(
            f"config keys lora.r={section.r}, lora.alpha={section.alpha}: the adapter in "
            f"'{section.adapter}' has r={stored.rank}, alpha={stored.alpha:g}"
        )
    return adapter, LoraSettings(stored.rank, stored.alpha, section.dropout, stored.targets)


def lora_finetuning(settings: LoraSettings) -> Finetuning:
    """How passes and updates treat parameters {"base", "lora"}."""

    def forward(params: Params, adapter: Params, key: jax.Array | None) -> Params:
        return lora.attach(params["base"], adapter, settings, key)

    def replace(params: Params, adapter: Params) -> Params:
        return {"base": params["base"], "lora": adapter}

    def inference(params: Params) -> Params:
        return lora.merge(params["base"], params["lora"], settings.scale)

    def frozen(params: Params) -> Any:
        return params["base"]

    return Finetuning(
        trainable=lambda params: params["lora"],
        replace=replace,
        forward=forward,
        inference=inference,
        frozen=frozen,
        head_trains=False,
    )
