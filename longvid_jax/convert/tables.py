"""Which Hugging Face tensor is which parameter: one table a model, read in both directions.

`{n}` stands for a layer's number. Source keys are those that the models' hub checkpoints have and that every version of
transformers loads; other generations of prefixes are brought to them first.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from longvid_jax.convert.ops import Keep, Leading, Op, PatchKernel, Transpose
from longvid_jax.errors import CheckpointError
from longvid_jax.models.eva_vit import EvaConfig
from longvid_jax.models.instructblip import DECODERS, language_model


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
    endings: (other spelling, ours) of the ends of source keys.
    tied: (a, b): the tensor a may be there although the model has no leaf for it, since it shares b's; it must equal b.
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
    endings: tuple[tuple[str, str], ...] = ()

    def spelling(self, key: str) -> str:
        """A source key with the prefix and the ending that the rules are written in."""
        for other, ours in self.endings:
            if key.endswith(other):
                key = key[: -len(other)] + ours
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


def _decoder(root: str = "", there: str = "") -> list[Rule]:
    """Llama and Qwen2, which differ by the biases that a checkpoint has; `there`: what their keys begin with."""
    source, target = f"{there}model.layers.{{n}}", f"{root}layers/{{n}}"
    return [
        Rule(f"{there}model.embed_tokens.weight", f"{root}embed/embedding"),
        Rule(f"{source}.input_layernorm.weight", f"{target}/attention_norm/scale"),
        *(rule for p in "qkvo" for rule in _linear(f"{source}.self_attn.{p}_proj", f"{target}/attention/{p}")),
        Rule(f"{source}.post_attention_layernorm.weight", f"{target}/mlp_norm/scale"),
        *(rule for p in ("gate", "up", "down") for rule in _linear(f"{source}.mlp.{p}_proj", f"{target}/mlp/{p}")),
        Rule(f"{there}model.norm.weight", f"{root}norm/scale"),
        Rule(f"{there}lm_head.weight", f"{root}lm_head/kernel", Transpose()),
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


def _eva(config: dict, root: str, there: str) -> list[Rule]:
    """The vision tower of BLIP-2 and InstructBLIP."""
    source, target = f"{there}encoder.layers.{{n}}", f"{root}blocks/{{n}}"
    patch = PatchKernel(3, None, config.get("patch_size", 14))
    return [
        Rule(f"{there}embeddings.class_embedding", f"{root}class_embedding", Leading()),
        Rule(f"{there}embeddings.position_embedding", f"{root}position_embedding", Leading()),
        Rule(f"{there}embeddings.patch_embedding.weight", f"{root}patch_embed/kernel", patch),
        Rule(f"{there}embeddings.patch_embedding.bias", f"{root}patch_embed/bias"),
        *_layer_norm(f"{source}.layer_norm1", f"{target}/norm1"),
        *_linear(f"{source}.self_attn.qkv", f"{target}/attention/qkv"),
        *_linear(f"{source}.self_attn.projection", f"{target}/attention/proj"),
        *_layer_norm(f"{source}.layer_norm2", f"{target}/norm2"),
        *_linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *_linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
        *_layer_norm(f"{there}post_layernorm", f"{root}norm"),
    ]


def _attention(source: str, inner: str, target: str) -> list[Rule]:
    """BERT's attention, and its norm: query, key and value are below `inner`."""
    maps = {"query": "q", "key": "k", "value": "v"}
    return [
        *(rule for theirs, ours in maps.items() for rule in _linear(f"{source}.{inner}.{theirs}", f"{target}/{ours}")),
        *_linear(f"{source}.output.dense", f"{target}/o"),
        *_layer_norm(f"{source}.output.LayerNorm", f"{target}_norm"),
    ]


def _bert_mlp(source: str, target: str, kind: str = "") -> list[Rule]:
    return [
        *_linear(f"{source}.intermediate{kind}.dense", f"{target}/fc1"),
        *_linear(f"{source}.output{kind}.dense", f"{target}/fc2"),
        *_layer_norm(f"{source}.output{kind}.LayerNorm", f"{target}_norm"),
    ]


def _bert(root: str = "", there: str = "") -> list[Rule]:
    source, target = f"{there}encoder.layer.{{n}}", f"{root}layers/{{n}}"
    return [
        Rule(f"{there}embeddings.word_embeddings.weight", f"{root}words/embedding"),
        Rule(f"{there}embeddings.position_embeddings.weight", f"{root}positions/embedding"),
        Rule(f"{there}embeddings.token_type_embeddings.weight", f"{root}types/embedding"),
        *_layer_norm(f"{there}embeddings.LayerNorm", f"{root}embed_norm"),
        *_attention(f"{source}.attention", "self", f"{target}/attention"),
        *_bert_mlp(source, f"{target}/mlp"),
        *_linear(f"{there}pooler.dense", f"{root}pooler"),
    ]


def _qformer(root: str, there: str, *, blip2: bool) -> list[Rule]:
    """InstructBLIP's, and BLIP-2's, which in transformers has the words, if it takes any, outside of it."""
    source, target = f"{there}encoder.layer.{{n}}", f"{root}layers/{{n}}"
    words = "embeddings" if blip2 else f"{there}embeddings"
    return [
        Rule(f"{words}.word_embeddings.weight", f"{root}words/embedding"),
        Rule(f"{words}.position_embeddings.weight", f"{root}positions/embedding"),
        *_layer_norm(f"{there}layernorm" if blip2 else f"{words}.layernorm", f"{root}embed_norm"),
        *_attention(f"{source}.attention", "attention", f"{target}/attention"),
        *_attention(f"{source}.crossattention", "attention", f"{target}/cross"),
        *_bert_mlp(source, f"{target}/mlp"),
        *_bert_mlp(source, f"{target}/query_mlp", "_query"),
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


POSITION_BUFFERS = (r".*embeddings\.position_ids",)


GAMMA_BETA = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))  # before torch had them
PRETRAINING = (r"cls\..*",)  # BERT's heads, with which words and the next sentence were foretold


def _bert_table(config: dict) -> Table:
    return Table(tuple(_bert()), (("bert.", ""),), POSITION_BUFFERS + PRETRAINING, endings=GAMMA_BETA)


# transformers' InstructBlipModel and Blip2Model (since 4.5x) hold a decoder without its head, and call it so.
BARE_DECODER = tuple(
    (f"language_model.{part}", f"language_model.model.{part}") for part in ("embed_tokens.", "layers.", "norm.")
)
# Heads that match texts to images: transformers' Blip2ForImageTextRetrieval's, and LAVIS's.
MATCHING = (r"itm_head\..*", r"(vision|text)_(projection|proj)\..*", r"temp", r"Qformer\.cls\..*")


def _instructblip_table(config: dict) -> Table:
    """Also of BLIP-2. Of a language model that is not known only the other parts can be loaded."""
    vision = config.get("vision_config") or {}
    unused = vision.get("num_hidden_layers", EvaConfig.depth)  # the last block of EVA's own file, see convert.lavis
    eva = (rf"blocks\.{unused}\..*", r"((fc_)?norm|head)\..*")
    rules = (
        *_eva(vision, "vision/", "vision_model."),
        Rule("frame_positions.weight", "frames/embedding"),
        Rule("query_tokens", "query_tokens", Leading()),
        *_qformer("qformer/", "qformer.", blip2=config.get("model_type") == "blip-2"),
    )
    ignored = ROTARY_BUFFERS + POSITION_BUFFERS + MATCHING + eva
    if language_model(config) not in DECODERS:
        return Table(rules, ignored=(*ignored, r"language_(model|projection)\..*"))
    rules += (*_linear("language_projection", "projection"), *_decoder("text/", "language_model."))
    return Table(rules, BARE_DECODER, ignored, tuple(f"language_model.{key}" for key in TIED))


def _towers_table(config: dict) -> Table:
    rules = (
        *_eva(config.get("vision_config", {}), "vision/", "vision_model."),
        *_bert("bert/", "bert."),
        *_decoder("text/", "language_model."),
        *_linear("facts.fc1", "facts/fc1"),
        *_linear("facts.fc2", "facts/fc2"),
    )
    return Table(rules, tied=tuple(f"language_model.{key}" for key in TIED))


def _attended(there: str, root: str) -> list[Rule]:
    """An attention of the library's own layout, whose maps have the names that they have here."""
    return [rule for p in "qkvo" for rule in _linear(f"{there}.{p}", f"{root}/{p}")]


def _conditioning(there: str, root: str) -> list[Rule]:
    return [
        *_attended(there, root),
        *_layer_norm(f"{there}.norm", f"{root}/norm"),
        Rule(f"{there}.gate", f"{root}/gate"),
    ]


def _perceiver() -> list[Rule]:
    """What is ReWind's own, under the names that it has here."""
    source, target = "perceiver.layers.{n}", "perceiver/layers/{n}"
    return [
        Rule("perceiver.query_tokens", "perceiver/query_tokens"),
        *_linear("perceiver.instruction", "perceiver/instruction"),
        Rule("perceiver.positions.weight", "perceiver/positions/frames/embedding"),
        *_conditioning("perceiver.condition", "perceiver/condition"),
        *_linear("perceiver.beside", "perceiver/beside"),
        *_conditioning(f"{source}.condition", f"{target}/condition"),
        *(
            rule
            for norm in ("video_norm", "cross_norm", "temporal_norm", "mlp_norm")
            for rule in _layer_norm(f"{source}.{norm}", f"{target}/{norm}")
        ),
        *_attended(f"{source}.cross", f"{target}/cross"),
        *_attended(f"{source}.temporal", f"{target}/temporal"),
        *_linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
        *_linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
        *_layer_norm("perceiver.norm", "perceiver/norm"),
        Rule("memory.write_tokens", "memory/write_tokens"),
        Rule("memory.positions.weight", "memory/positions/frames/embedding"),
        *_attended("memory.reading", "memory/reading"),
        *_attended("memory.writing", "memory/writing"),
        *(
            rule
            for norm in ("read_norm", "write_norm", "token_norm")
            for rule in _layer_norm(f"memory.{norm}", f"memory/{norm}")
        ),
        *_linear("contrast.video", "contrast/video"),
        *_linear("contrast.caption", "contrast/caption"),
        Rule("contrast.temperature", "contrast/temperature"),
        Rule("contrast.offset", "contrast/offset"),
    ]


def _rewind_table(config: dict) -> Table:
    rules = (
        *_eva(config.get("vision_config") or {}, "vision/", "vision_model."),
        *_bert("bert/", "bert."),
        *_perceiver(),
        *_linear("memory_projection", "memory_projection"),
        *_linear("detail_projection", "detail_projection"),
        Rule("separator", "separator"),
        *_decoder("text/", "language_model."),
    )
    return Table(rules, tied=tuple(f"language_model.{key}" for key in TIED))


MODELS = {
    "llama": ("LlamaForCausalLM", _text_table),
    "qwen2": ("Qwen2ForCausalLM", _text_table),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl_table),
    "bert": ("BertModel", _bert_table),
    "instructblip": ("InstructBlipForConditionalGeneration", _instructblip_table),
    "blip-2": ("Blip2ForConditionalGeneration", _instructblip_table),
    "world_towers": ("WorldTowers", _towers_table),  # the library's own: models.towers
    "rewind": ("RewindForConditionalGeneration", _rewind_table),  # likewise: models.rewind
}


def architecture(config: dict) -> str:
    """The model of a config.json, one of MODELS; CheckpointError for any other."""
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
