"""Which Hugging Face tensor is which parameter: one table a model, read in both directions.

`{n}` stands for a layer's number. Source keys are those that the models' hub checkpoints have and that every version of
transformers loads; other generations of prefixes are brought to them first.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from longvid_jax.convert.ops import Keep, Op, PatchKernel, Transpose
from longvid_jax.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """The tensor `source` is the parameter `target`, after `op`."""

    source: str
    target: str
    op: Op = Keep()


@dataclass(frozen=True)
class Table:
    """All rules of a model.

    prefixes: (other spelling, ours) of the beginnings of source keys; the first that fits is used.
    ignored: regular expressions of source keys that hold no parameter (buffers of old versions of transformers).
    tied: (a, b): the tensor a may be there although the model has no leaf for it, since it shares b's; it must equal b.
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None

    def spelling(self, key: str) -> str:
        """A source key with the prefix that the rules are written in."""
        for other, ours in self.prefixes:
            if key.startswith(other):
                return ours + key[len(other) :]
        return key

    def is_ignored(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def target(self, key: str) -> tuple[str, Op] | None:
        """The canonical path and the operation for a source key; None for a key that no rule knows."""
        key = self.spelling(key)
        for rule in self.rules:
            if found := _pattern(rule.source).fullmatch(key):
                return rule.target.format(n=f"{int(n):02d}" if (n := found.groupdict().get("n")) else ""), rule.op
        return None

    def source(self, path: str) -> tuple[str, Op] | None:
        """The source key and the operation for a canonical path; None for a path that no rule knows."""
        for rule in self.rules:
            if found := _pattern(rule.target).fullmatch(path):
                return rule.source.format(n=int(n) if (n := found.groupdict().get("n")) else ""), rule.op
        return None

    def spelled_like(self, key: str, keys: Iterable[str]) -> str:
        """The source key of a rule as the checkpoint with these `keys` would spell it."""
        for other, ours in self.prefixes:
            if key.startswith(ours) and any(present.startswith(other) for present in keys):
                return other + key[len(ours) :]
        return key


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)"))  # re keeps the compiled ones


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", Transpose()), Rule(f"{source}.bias", f"{target}/bias")]


def _layer_norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def _decoder(root: str = "") -> list[Rule]:
    """Llama and Qwen2: they differ by the biases that a checkpoint has."""
    source, target = "model.layers.{n}", f"{root}layers/{{n}}"
    return [
        Rule("model.embed_tokens.weight", f"{root}embed/embedding"),
        Rule(f"{source}.input_layernorm.weight", f"{target}/attention_norm/scale"),
        *(rule for p in "qkvo" for rule in _linear(f"{source}.self_attn.{p}_proj", f"{target}/attention/{p}")),
        Rule(f"{source}.post_attention_layernorm.weight", f"{target}/mlp_norm/scale"),
        *(rule for p in ("gate", "up", "down") for rule in _linear(f"{source}.mlp.{p}_proj", f"{target}/mlp/{p}")),
        Rule("model.norm.weight", f"{root}norm/scale"),
        Rule("lm_head.weight", f"{root}lm_head/kernel", Transpose()),
    ]


def _qwen2_vision(patch: PatchKernel) -> list[Rule]:
    source, target = "visual.blocks.{n}", "vision/blocks/{n}"
    return [
        Rule("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", patch),
        *_layer_norm(f"{source}.norm1", f"{target}/norm1"),
        *_linear(f"{source}.attn.qkv", f"{target}/attention/qkv"),
        *_linear(f"{source}.attn.proj", f"{target}/attention/proj"),
        *_layer_norm(f"{source}.norm2", f"{target}/norm2"),
        *_linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *_linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
        *_layer_norm("visual.merger.ln_q", "vision/merger/norm"),
        *_linear("visual.merger.mlp.0", "vision/merger/fc1"),
        *_linear("visual.merger.mlp.2", "vision/merger/fc2"),
    ]


TIED = ("lm_head.weight", "model.embed_tokens.weight")
ROTARY_BUFFERS = (r".*rotary(_pos)?_emb\.inv_freq",)


def _text_table(config: dict) -> Table:
    return Table(tuple(_decoder()), ignored=ROTARY_BUFFERS, tied=TIED)


def _qwen2_vl_table(config: dict) -> Table:
    vision = config.get("vision_config", {})
    patch = PatchKernel(
        vision.get("in_channels", vision.get("in_chans", 3)),
        vision.get("temporal_patch_size", 2),
        vision.get("patch_size", 14),
    )  # the defaults are transformers'; configs of published checkpoints leave fields out
    prefixes = (("model.language_model.", "model."), ("model.visual.", "visual."))
    return Table((*_decoder("text/"), *_qwen2_vision(patch)), prefixes, ROTARY_BUFFERS, TIED)


MODELS = {
    "llama": ("LlamaForCausalLM", _text_table),
    "qwen2": ("Qwen2ForCausalLM", _text_table),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl_table),
}


def architecture(config: dict) -> str:
    """The model of a config.json: "llama" (Vicuna too), "qwen2" or "qwen2_vl"; CheckpointError for any other."""
    by_class = {name: model for model, (name, _) in MODELS.items()}
    classes = config.get("architectures") or []
    model = config.get("model_type") or next((by_class[name] for name in classes if name in by_class), None)
    if not isinstance(model, str) or model not in MODELS:
        said = f"model_type {model!r}" if model else f"architectures {classes!r} and no model_type"
        raise CheckpointError(f"the config has {said}, which is not supported; what is: {', '.join(MODELS)}.")
    return model


def table_for(config: dict) -> Table:
    """The table of the model that a config.json describes; CheckpointError if it is not supported."""
    return MODELS[architecture(config)][1](config)


def class_name(config: dict) -> str:
    """transformers' class for the model that a config.json describes."""
    return MODELS[architecture(config)][0]
