"""What a recipe can name in its `model` section. Adding a component is one file and one line here."""

from __future__ import annotations

from paramgolf.registry import Registry

PARTS = Registry(
    "model part",
    {
        "attn_gate": "paramgolf.model.parts.attn_gate:AttnGate",
        "bigram_hash": "paramgolf.model.parts.bigram_hash:BigramHash",
        "smear_gate": "paramgolf.model.parts.smear_gate:SmearGate",
        "smear_gate2": "paramgolf.model.parts.smear_gate2:SmearGate2",
        "value_embed": "paramgolf.model.parts.value_embed:ValueEmbed",
        "xsa": "paramgolf.model.parts.xsa:XSA",
    },
)

ACTIVATIONS = Registry(
    "activation",
    {
        "relu2": "paramgolf.model.mlp:relu2",
        "leaky_relu2": "paramgolf.model.mlp:leaky_relu2",
    },
)

ATTENTION_BACKENDS = Registry(
    "attention backend",
    {
        "fa3": "paramgolf.model.backends:FlashAttention3",
        "sdpa": "paramgolf.model.backends:ScaledDotProduct",
        "math": "paramgolf.model.backends:PlainMath",
        "varlen": "paramgolf.model.backends:VariableLength",
        "flex": "paramgolf.model.backends:FlexAttention",
    },
)
# Order of preference of attention = "auto", without and with document masks: the first that can run is taken.
DENSE_ATTENTION = ("fa3", "sdpa", "math")
MASKED_ATTENTION = {"cuda": ("fa3", "varlen", "flex", "sdpa", "math"), "cpu": ("sdpa", "math")}
