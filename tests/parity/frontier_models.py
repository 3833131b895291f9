"""The later records' models in our terms: their configuration as a section, their banks as our layers' matrices."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.model.gpt import GPT
from paramgolf.model.lanes import Lanes
from paramgolf.recipe.sections import ModelSection

# Reference name -> ours, for what is not split into layers.
RENAMED = {
    "parallel_post_lambdas": "lanes.post",
    "parallel_resid_lambdas": "lanes.resid",
    "smear_lambda": "smear2.strength",
    "smear_gate.weight": "smear2.gate",
    "ve_shared.scale": "value_embed.scale",
    "ve_shared.embed.weight": "value_embed.embed.weight",
    "ve_shared.proj.weight": "value_embed.proj.weight",
}
BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
GATES = (".attn.attn_gate_w", ".attn.attn_gate_proj.weight")


def config_of(z: Any) -> dict[str, Any]:
    return {"system": "pr1855"} | json.loads(str(z["config_json"]))  # the test-time training file does not say


def value_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    if not config.get("ve_enabled"):
        return ()
    return tuple(int(i) for i in str(config["ve_layers"]).split(",") if i.strip())


def gate_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the attention gate, {} without one."""
    window = config.get("gate_window", 12)
    if config.get("attn_out_gate_enabled"):
        source = "query" if config["attn_out_gate_src"] == "q" else "input"
        return {"factor": 2.0, "window": window, "source": source}
    if config.get("gated_attn_enabled"):
        return {"factor": 1.0, "window": 0}
    if config.get("sparse_attn_gate_enabled"):
        return {"factor": 1.0, "window": window, "scale": config["sparse_attn_gate_scale"]}
    return {}


def parts_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    layers, parts = config["num_layers"], {}
    if config.get("bigram_vocab_size"):
        parts["bigram_hash"] = {"buckets": config["bigram_vocab_size"], "dim": config["bigram_dim"]}
    if "bigram_vocab_size" in config:
        parts["smear_gate"] = {}  # the script that knows bigrams always smears
    if config.get("smear_gate_enabled"):
        parts["smear_gate2"] = {"window": config.get("gate_window", 12)}
    if value_layers(config):
        parts["value_embed"] = {"dim": config["ve_dim"], "layers": list(value_layers(config))}
    if config.get("xsa_last_n"):
        parts["xsa"] = {"last_layers": min(config["xsa_last_n"], layers)}
    if gate_of(config):
        parts["attn_gate"] = gate_of(config)
    return parts


def section_of(config: Mapping[str, Any], *, packed: bool = False) -> ModelSection:
    """The model section of a fixture's configuration."""
    dim, width = config["model_dim"], config.get("embedding_dim", config["model_dim"])
    always_stretched = config["system"] != "pr1855"  # that script has a flag for it
    reference = config.get("rope_train_seq_len") or config.get("train_seq_len", 0)
    lanes, loops = config.get("parallel_start_layer", -1), config.get("num_loops", 0)
    return ModelSection(
        dim=dim,
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        num_kv_heads=config["num_kv_heads"],
        mlp_hidden=int(config["mlp_mult"] * dim),
        activation="relu2" if config["system"] == "pr374" else "leaky_relu2",
        rope_base=config["rope_base"],
        rope_dims=config.get("rope_dims", 0),
        rope_ref_len=reference if always_stretched or config.get("rope_yarn") else 0,
        logit_softcap=config["logit_softcap"],
        tie_embeddings=config["tie_embeddings"],
        skip_gates=bool(config.get("skip_gates_enabled", config.get("gated_skips", False))),
        lanes_from=lanes if 0 < lanes < config["num_layers"] else -1,
        lane_merge=config.get("parallel_final_lane", "mean"),
        ln_scale=config["ln_scale"],
        embed_dim=0 if width == dim else width,
        loop_layers=(config["loop_start"], config["loop_end"]) if loops else (),
        loop_extra=loops,
        document_mask=packed,
        parts=parts_of(config),
    )


def our_arrays(arrays: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays under the reference's names as ours: banks cut into layers, names changed, shapes still theirs."""
    layers, out = config["num_layers"], {}
    for name, value in arrays.items():
        if name in BANKS:
            for kind, part in enumerate(BANKS[name]):
                for i in range(layers):
                    out[f"blocks.{i}.{part}.weight"] = value[kind * layers + i]
        elif name.startswith("ve_layer_scales."):
            layer = value_layers(config)[int(name.rsplit(".", 1)[1])]
            out[f"blocks.{layer}.attn.value_embed.scale"] = value
        else:
            gate = next((end for end in GATES if name.endswith(end)), "")
            ours = f"{name.removesuffix(gate)}.attn.attn_gate.weight" if gate else RENAMED.get(name, name)
            out[ours] = value
    return out


def their_arrays(ours: Mapping[str, Tensor], names: list[str], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our tensors under the reference's `names`, banks put together again; shapes of banks only are theirs."""
    layers, out = config["num_layers"], {}
    for name in names:
        if name in BANKS:
            parts = [ours[f"blocks.{i}.{part}.weight"] for part in BANKS[name] for i in range(layers)]
            out[name] = torch.stack(parts).detach().numpy()
        else:
            (key,) = our_arrays({name: None}, config)
            out[name] = ours[key].detach().numpy()
    return out


def add_lanes(model: GPT, names: Collection[str]) -> None:
    """The lane weights that a script's state has even where lanes are off: they are not used."""
    if model.lanes is None and "parallel_post_lambdas" in names:
        model.lanes = Lanes(dataclasses.replace(model.section, lanes_from=model.section.num_layers))


def build(z: Any, *, packed: bool = False, **changes: Any) -> GPT:
    """The fixture's model with its weights; with `packed` its documents are masked as the scripts' packed rows.
    `changes`: of its configuration."""
    config = config_of(z) | changes
    model = GPT(section_of(config, packed=packed), config["vocab_size"])
    weights = {key.removeprefix("w/"): z[key] for key in z.files if key.startswith("w/")}
    add_lanes(model, weights)
    own = model.state_dict()
    state = {
        name: torch.from_numpy(np.array(value)).view(own[name].shape)
        for name, value in our_arrays(weights, config).items()
    }
    model.load_state_dict(state, strict=True)
    if packed:
        model.segment_len = config["train_seq_len"]
        model.context_len = len(z["stream"]) - 1 if config.get("rope_yarn") and "stream" in z.files else 0
    return model
