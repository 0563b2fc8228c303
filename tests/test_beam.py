"""Beam search against transformers' own on tiny Llamas, token for token, and what it costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longvid_jax import convert
from longvid_jax.generate import beam_search, decode, decoder_beams
from longvid_jax.models.llama import Decoder, DecoderConfig
from longvid_jax.ops import kv_cache
from longvid_jax.ops.attention import Keys, attend
from longvid_jax.ops.rope import Rope

VOCAB, EOS, OTHER = 24, 2, 7
LENGTHS = np.array([9, 4, 13])
BATCH, WIDTH = len(LENGTHS), int(LENGTHS.max())
BIAS = 4.0  # of the tokens that end answers, so that most end, and not at once
FIRST = LENGTHS // 2  # how much of each prompt the first of two blocks holds
CAPACITY = 19  # of the prefix: 7 + 6 wide blocks, and room that stays empty


class Tiny:
    """A random Llama of transformers, ours with its weights (by whether its layers are stacked), and prompts."""

    def __init__(self, seed, folder):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
        )
        self.torch = LlamaForCausalLM(config).eval()
        self.ids = np.random.default_rng(seed).integers(3, VOCAB, (BATCH, WIDTH))
        with torch.no_grad():  # answers end now here, now there
            usual = self.torch.model(torch.tensor(self.ids)).last_hidden_state.mean((0, 1))
            self.torch.lm_head.weight[EOS] += BIAS * usual / usual.square().sum()
            self.torch.lm_head.weight[OTHER] += BIAS * usual / usual.square().sum()
        self.torch.save_pretrained(folder)
        source = convert.open_source(folder)
        self.ours = {}
        for stacked in (False, True):
            make = partial(Decoder, DecoderConfig.from_huggingface(source.config), stacked=stacked)
            abstract = jax.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
            self.ours[stacked] = convert.fill(source, abstract, convert.table_for(source.config))

    def expected(self, **options):
        """What transformers generates behind the prompts, padded on the left."""
        import torch

        valid = np.arange(WIDTH) >= WIDTH - LENGTHS[:, None]
        ids = np.zeros_like(self.ids)
        for row, length in enumerate(LENGTHS):
            ids[row, WIDTH - length :] = self.ids[row, :length]
        return self.torch.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(valid, dtype=torch.long),
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **{"eos_token_id": EOS, **options},
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("torch")
    return [Tiny(seed, tmp_path_factory.mktemp("llama")) for seed in range(3)]


@jax.jit
def prefilled(decoder, ids):
    """The cache that holds the prompts, read in two blocks with holes behind the shorter rows, and the next logits."""
    cache = decoder.empty_cache(BATCH, CAPACITY)
    for start, count in ((np.zeros(BATCH, int), FIRST), (FIRST, LENGTHS - FIRST)):
        width = int(count.max())
        where = start[:, None] + np.arange(width)
        block = jnp.take_along_axis(jnp.asarray(ids), np.minimum(where, WIDTH - 1), axis=1)
        valid = jnp.asarray(np.arange(width) < count[:, None])
        hidden, cache = decoder(decoder.embed(block), jnp.asarray(where)[..., None], valid, cache)
        cache = kv_cache.advance(cache, jnp.asarray(count), width)
    last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
    return cache, decoder.logits(last)


search = jax.jit(decoder_beams, static_argnames=("beams", "max_new_tokens", "follow"))


def searched(model, penalty=1.0, least=0, stops=(EOS,), *, stacked=False, follow=None, **sizes):
    decoder = model.ours[stacked]
    cache, logits = prefilled(decoder, model.ids)
    start = LENGTHS if follow is None else np.zeros_like(LENGTHS)
    options = {"length_penalty": penalty, "min_new_tokens": least, "stop_tokens": np.array(stops), **sizes}
    return search(decoder, cache, start, logits, follow=follow, **options)


def check(got, theirs, beams):
    """The same tokens, counts and scores in the same order, after as many steps; how many answers were shorter."""
    tokens = theirs.sequences[:, WIDTH:].numpy().reshape(BATCH, beams, -1)
    count = (theirs.beam_indices.numpy() >= 0).sum(-1).reshape(BATCH, beams)
    tokens = np.where(np.arange(tokens.shape[-1]) < count[..., None], tokens, 0)  # padded with the stop token
    np.testing.assert_array_equal(got.counts, count)
    np.testing.assert_array_equal(got.beams[..., : tokens.shape[-1]], tokens)
    assert not np.asarray(got.beams[..., tokens.shape[-1] :]).any()
    np.testing.assert_allclose(got.scores.ravel(), theirs.sequences_scores.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(got.tokens, got.beams[:, 0])
    np.testing.assert_array_equal(got.count, got.counts[:, 0])
    np.testing.assert_array_equal(got.state[1] - (got.state[1][0] - LENGTHS[0]), LENGTHS)
    assert int(got.state[1][0]) - LENGTHS[0] == len(theirs.scores) - 1
    return int((count < got.beams.shape[-1]).sum())


@pytest.mark.parity
@pytest.mark.parametrize(("beams", "max_new_tokens"), [(3, 12), (5, 10)])
def test_equals_transformers(tiny, beams, max_new_tokens):
    short, early, total = 0, 0, 0
    for seed, model in enumerate(tiny):
        for turn, penalty in enumerate((0.6, 1.0, 2.0)):
            least = 4 * ((seed + turn + beams // 2) % 2)  # with the other number of beams it is the other
            theirs = model.expected(
                num_beams=beams,
                num_return_sequences=beams,
                early_stopping=False,
                length_penalty=penalty,
                max_new_tokens=max_new_tokens,
                **({"min_new_tokens": least} if least else {}),
            )
            got = searched(model, penalty, least, beams=beams, max_new_tokens=max_new_tokens)
            short += check(got, theirs, beams)
            early += len(theirs.scores) < max_new_tokens
            total += BATCH * beams
            assert int(got.counts.min()) >= least
    assert total / 4 < short < total  # answers that end by themselves, and answers that are cut
    assert early > 0  # and searches that end before the last token


@pytest.mark.parity
def test_several_stop_tokens_and_stacked_layers(tiny):
    stops, ends = [EOS, OTHER], []
    for model in tiny[:2]:
        theirs = model.expected(num_beams=3, num_return_sequences=3, max_new_tokens=12, eos_token_id=stops)
        got = searched(model, stops=stops, stacked=True, beams=3, max_new_tokens=12)
        check(got, theirs, 3)
        ends.append(np.take_along_axis(np.asarray(got.beams), np.asarray(got.counts)[..., None] - 1, axis=-1))
    assert {EOS, OTHER} <= set(np.ravel(ends).tolist())


@pytest.mark.parity
def test_behind_the_last_token_of_each_layer(tiny):
    """Positions that follow what the layer stored last, wherever the tokens are said to stand."""
    plain, moved = (searched(tiny[0], 1.0, 4, beams=3, max_new_tokens=12, follow=follow) for follow in (None, "all"))
    np.testing.assert_array_equal(moved.beams, plain.beams)
    np.testing.assert_allclose(moved.scores, plain.scores, atol=1e-5)


@jax.jit
def greedy(decoder, cache, logits, stop_tokens):
    cache = kv_cache.grow(cache, CAPACITY + 10)

    def step(state, tokens):
        cache, at = state
        valid = jnp.ones((BATCH, 1), bool)
        hidden, cache = decoder(decoder.embed(tokens[:, None]), at[:, None, None], valid, cache)
        return (kv_cache.advance(cache, jnp.ones(BATCH, jnp.int32), 1), at + 1), decoder.logits(hidden[:, 0])

    state = (cache, jnp.asarray(LENGTHS))
    return decode(step, state, logits, max_new_tokens=10, stop_tokens=stop_tokens, key=jax.random.key(0))


@pytest.mark.parity
def test_one_beam_is_greedy(tiny):
    ended = 0
    for model in tiny:
        decoder = model.ours[False]
        expected = greedy(decoder, *prefilled(decoder, model.ids), np.array([EOS]))
        for penalty in (0.0, 2.0):
            got = searched(model, penalty, beams=1, max_new_tokens=10)
            np.testing.assert_array_equal(got.tokens, expected.tokens)
            np.testing.assert_array_equal(got.count, expected.count)
            np.testing.assert_array_equal(got.state[1], expected.state[1])
            ended += int((got.count < 10).sum())
        theirs = model.expected(num_beams=1, min_new_tokens=4, max_new_tokens=10).sequences[:, WIDTH:].numpy()
        got = searched(model, 1.0, 4, beams=1, max_new_tokens=10)
        np.testing.assert_array_equal(got.tokens[:, : theirs.shape[1]], theirs)
    assert ended > 0


RNG = np.random.default_rng(0)
TABLE, WORDS = RNG.normal(size=(5, 5)) * 2, RNG.normal(size=(2, 5)) * 2


@jax.jit
def chain_searched(first, penalty):
    def step(fed, tokens, origin):
        return fed + 1, jnp.asarray(TABLE, jnp.float32)[tokens]

    options = {"beams": 125, "max_new_tokens": 3, "length_penalty": penalty}
    return beam_search(step, jnp.int32(0), first, stop_tokens=jnp.array([3]), **options)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
def test_with_beams_for_all_it_finds_the_best_there_are(penalty):
    """A Markov chain of 5 words, all of whose answers of up to 3 words are written out, in float64."""
    expected = [ranked(row, TABLE, stop=3, length=3, penalty=penalty) for row in WORDS]
    got = chain_searched(jnp.asarray(WORDS, jnp.float32), penalty)
    assert int(got.state) == 2
    for row, answers in enumerate(expected):
        assert len(answers) == 1 + 4 + 4 * 4 * 5
        found = [
            tuple(tokens[:count].tolist())
            for tokens, count in zip(np.asarray(got.beams[row]), np.asarray(got.counts[row]), strict=True)
        ]
        assert found[: len(answers)] == [answer for answer, _ in answers]
        scores = [score for _, score in answers]
        np.testing.assert_allclose(got.scores[row, : len(answers)], scores, atol=1e-5, rtol=0)


def ranked(logits, table, *, stop, length, penalty):
    """All answers of up to `length` words with their scores, the best first."""

    def log_softmax(x):
        return x - np.log(np.exp(x - x.max()).sum()) - x.max()

    going, answers = [((), 0.0, logits)], []
    while going:
        words, score, logits = going.pop()
        for word, log_p in enumerate(log_softmax(logits)):
            longer = (*words, word)
            if word == stop or len(longer) == length:
                answers.append((longer, (score + log_p) / len(longer) ** penalty))
            else:
                going.append((longer, score + log_p, table[word]))
    return sorted(answers, key=lambda answer: -answer[1])


@pytest.mark.parametrize(("stacked", "depth"), [(False, 4), (True, 28)], ids=["tuple", "stacked"])
def test_the_prefix_is_not_copied(stacked, depth):
    """No array of the program has more of the prefix than the cache, and its temporaries are small beside it.

    A scan slices one layer out of a stack.
    """
    batch, beams, capacity = 2, 5, 4099
    config = DecoderConfig(
        vocab_size=50,
        width=64,
        depth=depth,
        heads=4,
        kv_heads=4,
        ff_width=64,
        norm_eps=1e-6,
        qkv_bias=False,
        o_bias=False,
        tied=False,
        rope=Rope(64),
    )
    decoder = jax.eval_shape(lambda: Decoder(config, stacked=stacked, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda decoder: decoder.empty_cache(batch, capacity), decoder)
    run = jax.jit(partial(decoder_beams, beams=beams, max_new_tokens=16))
    traced = run.trace(
        decoder,
        cache,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, 50), jnp.float32),
        stop_tokens=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    buffers = {x.shape for x in jax.tree.leaves((cache.keys, cache.values))}
    layer = next(iter(buffers))[-4:]
    wide = {shape for shape in shapes(traced.jaxpr.jaxpr) if capacity in shape}
    assert (batch, 4, 1, beams, capacity) in wide  # the attention's logits: so the walk sees the whole program
    assert {shape for shape in wide if np.prod(shape) >= np.prod(layer)} <= {*buffers, layer, (1, *layer)}
    memory = traced.lower().compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.keys, cache.values)))
    assert memory.temp_size_in_bytes < 0.05 * held
    returned = memory.output_size_in_bytes - held  # the cache, which is not donated here, is part of the state
    assert returned < 0.05 * held


def shapes(jaxpr):
    """The shapes of all that a program and those inside it compute."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("length", [5, 150])
def test_keys_that_each_query_sees_for_itself(length, monkeypatch):
    """attend with valid [B, N, S], in one block and in three, beside a run that all see."""
    monkeypatch.setattr("longvid_jax.ops.attention.BLOCK_BYTES", 1)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, heads, n, 8)).astype(np.float32) for heads, n in ((4, length), (2, 30), (2, 30)))
    valid = rng.random((2, length, 30)) < 0.4
    shared = rng.random((2, 1, 12)) < 0.6
    valid[:, :, :12] = shared
    runs = (
        Keys(k[:, :, :12], v[:, :, :12], jnp.asarray(shared[:, 0])),
        Keys(k[:, :, 12:], v[:, :, 12:], jnp.asarray(valid[:, :, 12:])),
    )
    k, v = (np.repeat(x, 2, axis=1).astype(np.float64) for x in (k, v))
    logits = np.where(valid[:, None], np.einsum("bhnd,bhsd->bhns", q, k) / np.sqrt(8), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhns,bhsd->bhnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attend(jnp.asarray(q), *runs), expected, atol=1e-5, rtol=0)
