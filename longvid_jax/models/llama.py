"""The LLaMA family decoder: Llama (and Vicuna, which is Llama), and Qwen2, which adds biases to q, k and v."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from longvid_jax.errors import CheckpointError
from longvid_jax.models.layers import Embed, Linear, RMSNorm, repeat
from longvid_jax.ops import kv_cache
from longvid_jax.ops.attention import Keys, Packed, attend, attend_packed
from longvid_jax.ops.layers import layers, rematerialised
from longvid_jax.ops.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What fixes the parameters' shapes and the arithmetic of a decoder."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    ff_width: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    tied: bool
    rope: Rope

    @classmethod
    def from_huggingface(cls, config: dict) -> "DecoderConfig":
        """Reads a config.json of model_type llama or qwen2, or the text half of a qwen2_vl one (nested or flat)."""
        config = {**config, **config.get("text_config", {})}
        heads = _field(config, "num_attention_heads")
        width = _field(config, "hidden_size")
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise CheckpointError(f"config.json: hidden_act is '{activation}', but this decoder has only 'silu'.")
        if config.get("use_sliding_window"):
            raise CheckpointError(
                "config.json: use_sliding_window is true, but this decoder attends to all of the past."
            )
        is_llama, has_bias = config.get("model_type") == "llama", config.get("attention_bias", False)
        return cls(
            vocab_size=_field(config, "vocab_size"),
            width=width,
            depth=_field(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            ff_width=_field(config, "intermediate_size"),
            norm_eps=_field(config, "rms_norm_eps"),
            qkv_bias=has_bias if is_llama else True,
            o_bias=has_bias if is_llama else False,
            tied=config.get("tie_word_embeddings", False),
            rope=_rope(config, config.get("head_dim") or width // heads),
        )


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        head = config.rope.head_dim
        self.q = Linear(config.width, config.heads * head, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(config.width, config.kv_heads * head, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(config.width, config.kv_heads * head, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(config.heads * head, config.width, bias=config.o_bias, dtype=dtype, rngs=rngs)
        self.head_dim = head

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, H, N, D], keys and values [B, K, N, D] of x [B, N, width], not rotated."""

        def split(y):
            return jnp.swapaxes(y.reshape(*y.shape[:2], -1, self.head_dim), 1, 2)

        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def output(self, context: jax.Array) -> jax.Array:
        """Joins the heads of context [B, H, N, D] -> [B, N, width]."""
        context = jnp.swapaxes(context, 1, 2)
        return self.o(context.reshape(*context.shape[:2], -1))


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        self.gate = Linear(config.width, config.ff_width, bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(config.width, config.ff_width, bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(config.ff_width, config.width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """A causal language model over embeddings.

    `stacked` layers share leaves with a leading layer axis; otherwise they are a tuple (see ops.layers).
    """

    def __init__(self, config: DecoderConfig, *, dtype=jnp.float32, stacked: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
        self.layers = repeat(lambda rngs: Layer(config, dtype=dtype, rngs=rngs), config.depth, rngs, stacked=stacked)
        self.norm = RMSNorm(config.width, config.norm_eps, dtype=dtype)
        self.lm_head = (
            None if config.tied else Linear(config.width, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        )

    @jax.named_scope("decoder")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: kv_cache.KVCache | None = None,
        *,
        groups: jax.Array | None = None,
        packed: Packed | None = None,
        remat: bool | str = False,
        follow: str | None = None,
        select: kv_cache.Select | None = None,
    ) -> tuple[jax.Array, kv_cache.KVCache | None]:
        """Hidden states [B, N, width] of embeddings x [B, N, width] at positions int32 [B, N, A], and the cache.

        valid bool [B, N]. Without a cache this is plain causal attention, within groups int32 [B, N] if they are given
        (and to group 0, which all see: several conversations about one video; packed: what is known of their sizes, for
        speed); remat as in ops.layers.rematerialised. With one, the tokens also attend to all that it holds and are
        stored in it (see ops.kv_cache.attention for `follow` and `select`); the caller then moves the cache on with
        ops.kv_cache.advance.
        """
        rope = self.config.rope

        def layer(layer: Layer, index, carry):
            x, cache = carry
            q, k, v = layer.attention.project(layer.attention_norm(x))
            if cache is None:
                keys = Keys(rope(k, positions), v, valid, causal=True, groups=groups)
                q = rope(q, positions)
                context = attend(q, keys, groups=groups) if packed is None else attend_packed(q, keys, packed)
            else:
                context, cache = kv_cache.attention(
                    cache, index, q, k, v, positions=positions, valid=valid, rope=rope, follow=follow, select=select
                )
            x = x + layer.attention.output(context)
            return x + layer.mlp(layer.mlp_norm(x)), cache

        x, cache = layers(rematerialised(layer, remat), self.layers, (x, cache))
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits float32 [..., V] of hidden states [..., width]."""
        if self.lm_head is None:
            return jnp.einsum("...d,vd->...v", hidden, self.embed.embedding[...], preferred_element_type=jnp.float32)
        head = self.lm_head
        logits = jnp.einsum("...d,dv->...v", hidden, head.kernel[...], preferred_element_type=jnp.float32)
        return head.adapted(hidden, logits)

    def empty_cache(self, batch: int, capacity: int) -> kv_cache.KVCache:
        """A cache for `batch` rows of `capacity` tokens, laid out as the layers are."""
        config = self.config
        stacked = not isinstance(self.layers, tuple)
        dtype = self.embed.embedding.dtype
        return kv_cache.empty(
            config.depth,
            batch,
            config.kv_heads,
            capacity,
            config.rope.head_dim,
            config.rope.axes,
            dtype,
            stacked=stacked,
        )


def forward(decoder: Decoder, ids: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Logits float32 [B, N, V] of token ids [B, N], every token at its own index."""
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    index = jnp.broadcast_to(jnp.arange(ids.shape[1])[:, None], (*ids.shape, decoder.config.rope.axes))
    return decoder.logits(decoder(decoder.embed(ids), index, valid)[0])


def _field(config: dict, name: str):
    if name not in config:
        raise CheckpointError(f"config.json has no '{name}', without which the network cannot be built; add it.")
    return config[name]


def _rope(config: dict, head_dim: int) -> Rope:
    """Both generations of fields: rope_theta with rope_scaling, and rope_parameters."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "mrope", "linear", "yarn"):
        raise CheckpointError(
            f"config.json: rope_scaling is of type '{kind}', but only default, mrope, linear and yarn are known."
        )
    for name, plain in (("truncate", True), ("mscale", None), ("mscale_all_dim", None), ("partial_rotary_factor", 1.0)):
        if scaling.get(name) not in (None, plain):
            raise CheckpointError(
                f"config.json: rope_scaling has {name} {scaling[name]}, which this decoder does not know."
            )
    sections = scaling.get("mrope_section")
    return Rope(
        head_dim=head_dim,
        theta=float(scaling.get("rope_theta", config.get("rope_theta", 10000.0))),
        sections=tuple(sections) if sections else None,
        scaling=kind if kind in ("linear", "yarn") else None,
        factor=float(scaling.get("factor", 1.0)),
        original_length=scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 32768),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=scaling.get("attention_factor"),
    )
