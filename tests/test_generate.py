"""Decoding: against transformers' greedy search, a Markov chain written out by hand, and NumPy's nucleus."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longvid_jax.generate import decode, sample

VOCAB = 12
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2  # a language model: the next logits depend on the token


def step(state, tokens):
    """Feeds the table's row; the state counts the steps and keeps what was fed."""
    steps, fed = state
    return (steps + 1, fed.at[:, steps].set(tokens)), jnp.asarray(TABLE)[tokens]


@jax.jit
def decoded(first, stop, key, temperature, top_p):
    state = (jnp.int32(0), jnp.full((first.shape[0], 24), -1))
    return decode(
        step,
        state,
        first,
        max_new_tokens=24,
        stop_tokens=stop,
        key=key,
        temperature=temperature,
        top_p=top_p,
        keep_logits=True,
    )


def run(first, stop=(-1,), seed=0, temperature=None, top_p=1.0):
    return decoded(jnp.asarray(first), jnp.asarray(stop), jax.random.key(seed), temperature, top_p)


def greedy_chain(logits, stop, length=24):
    tokens = []
    while len(tokens) < length:
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop:
            break
        logits = TABLE[tokens[-1]]
    return tokens


FIRST = RNG.normal(size=(6, VOCAB)).astype(np.float32)


def stops_that_end_rows_at_different_times():
    for stop in range(VOCAB):
        lengths = {len(greedy_chain(row, [stop])) for row in FIRST}
        if len(lengths) > 1 and max(lengths) < 24:
            return [stop]
    raise AssertionError("no token of the table ends all rows")


def test_greedy_rows_stop_each_for_itself_and_are_padded():
    stop = stops_that_end_rows_at_different_times()
    got = run(FIRST, stop)
    chains = [greedy_chain(row, stop) for row in FIRST]
    np.testing.assert_array_equal(got.count, [len(chain) for chain in chains])
    for row, chain in enumerate(chains):
        np.testing.assert_array_equal(got.tokens[row], chain + [0] * (24 - len(chain)))
        logits = [FIRST[row], *TABLE[chain[:-1]]]
        np.testing.assert_array_equal(got.logits[row, : len(chain)], logits)


def test_the_loop_ends_when_the_last_row_has():
    """No step is taken for a token that nobody needs, and ended rows feed padding."""
    stop = stops_that_end_rows_at_different_times()
    chains = [greedy_chain(row, stop) for row in FIRST]
    longest = max(map(len, chains))
    steps, fed = run(FIRST, stop).state
    assert int(steps) == longest - 1 < 23
    for row, chain in enumerate(chains):
        expected = (chain + [0] * longest)[: longest - 1] + [-1] * (25 - longest)
        np.testing.assert_array_equal(fed[row], expected)


def test_several_stop_tokens_and_none():
    stop = [*stops_that_end_rows_at_different_times(), int(TABLE[int(FIRST[0].argmax())].argmax())]
    for stops in (stop, [-1]):
        got = run(FIRST, stops)
        for row, logits in enumerate(FIRST):
            chain = greedy_chain(logits, stops)
            np.testing.assert_array_equal(got.tokens[row, : got.count[row]], chain)
    assert int(got.state[0]) == 23  # without one the loop takes all its steps


def test_a_first_token_that_stops_takes_no_step():
    first = np.zeros((2, VOCAB), np.float32)
    first[:, 5] = 1
    got = run(first, [5])
    assert int(got.state[0]) == 0
    np.testing.assert_array_equal(got.count, [1, 1])
    np.testing.assert_array_equal(got.tokens[:, :2], [[5, 0], [5, 0]])


def test_logits_are_left_out_unless_asked_for():
    state = (jnp.int32(0), jnp.zeros((6, 3), int))
    run_short = jax.jit(partial(decode, step, max_new_tokens=3))
    out = run_short(state, FIRST, stop_tokens=jnp.array([-1]), key=jax.random.key(0))
    assert out.logits is None
    np.testing.assert_array_equal(out.tokens, run(FIRST).tokens[:, :3])


def test_rows_of_a_batch_equal_single_rows():
    stop = stops_that_end_rows_at_different_times()
    together = run(FIRST, stop)
    for row in range(2):
        alone = run(FIRST[row : row + 1], stop)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.logits[0, : alone.count[0]], together.logits[row, : alone.count[0]])


def test_the_same_key_gives_the_same_and_another_key_another():
    first, again, other = (run(FIRST, seed=seed, temperature=1.5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()
    assert len({tuple(row) for row in np.asarray(first.tokens).tolist()}) == 6


@pytest.mark.parametrize("how", [{"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-3}])
def test_a_tiny_nucleus_or_temperature_is_greedy(how):
    np.testing.assert_array_equal(run(FIRST, **how).tokens, run(FIRST).tokens)


def nucleus(logits, temperature, top_p):
    """Probabilities of the smallest set of most likely tokens that reaches top_p, float64."""
    logits = logits.astype(np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept, total = np.zeros(len(p), bool), 0.0
    for token in np.argsort(-p, kind="stable"):
        kept[token] = True
        total += p[token]
        if total >= top_p:
            break
    return np.where(kept, p, 0) / p[kept].sum()


SETTINGS = [(1.0, 1.0), (0.7, 0.9), (1.6, 0.5), (2.5, 0.8), (1.0, 0.2)]


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_tokens_are_drawn_from_the_nucleus(temperature, top_p):
    draws = 20000
    expected = nucleus(FIRST[1], temperature, top_p)
    got = np.asarray(jax.jit(sample)(jax.random.key(1), np.tile(FIRST[1], (draws, 1)), temperature, top_p))
    counts = np.bincount(got, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    real = expected > 0
    chi_square = ((counts[real] - draws * expected[real]) ** 2 / (draws * expected[real])).sum()
    degrees = real.sum() - 1
    assert chi_square <= degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations, with a fixed key


def test_sampling_in_the_loop_uses_a_fresh_key_for_every_token():
    """A model whose logits are always the same: its tokens over time are the nucleus too."""
    logits = jnp.asarray(FIRST[1])

    def same(state, tokens):
        return state, jnp.broadcast_to(logits, (400, VOCAB))

    run = jax.jit(partial(decode, same), static_argnames="max_new_tokens")
    out = run(
        jnp.int32(0),
        jnp.broadcast_to(logits, (400, VOCAB)),
        max_new_tokens=50,
        stop_tokens=jnp.array([-1]),
        key=jax.random.key(2),
        temperature=jnp.float32(1.3),
        top_p=jnp.float32(0.9),
    )
    expected = nucleus(FIRST[1], 1.3, 0.9)
    counts = np.bincount(np.asarray(out.tokens).ravel(), minlength=VOCAB)
    real = expected > 0
    assert counts[~real].sum() == 0
    chi_square = ((counts[real] - 20000 * expected[real]) ** 2 / (20000 * expected[real])).sum()
    assert chi_square <= real.sum() - 1 + 4 * np.sqrt(2 * (real.sum() - 1))


@pytest.mark.parity
def test_the_nucleus_is_transformers_nucleus():
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    for temperature, top_p in SETTINGS:
        warped = TemperatureLogitsWarper(temperature)(None, torch.tensor(FIRST))
        if top_p < 1:
            warped = TopPLogitsWarper(top_p)(None, warped)
        expected = torch.softmax(warped, dim=-1).numpy()
        np.testing.assert_allclose([nucleus(row, temperature, top_p) for row in FIRST], expected, atol=1e-6)


@pytest.mark.parity
def test_greedy_equals_transformers_on_a_llama(tmp_path):
    torch = pytest.importorskip("torch")
    from flax import nnx
    from transformers import LlamaConfig, LlamaForCausalLM

    from longvid_jax import convert
    from longvid_jax.models.llama import Decoder, DecoderConfig
    from longvid_jax.ops import kv_cache

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=119,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    source = convert.open_source(tmp_path)
    abstract = jax.eval_shape(lambda: Decoder(DecoderConfig.from_huggingface(source.config), rngs=nnx.Rngs(0)))
    decoder = convert.fill(source, abstract, convert.table_for(source.config))
    prompt = np.random.default_rng(0).integers(3, 100, (3, 17))

    def generated(eos):
        return theirs.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=eos,
            output_logits=True,
            return_dict_in_generate=True,
        )

    @jax.jit
    def run(decoder, prompt, stop):
        cache = decoder.empty_cache(3, 64)
        index = jnp.broadcast_to(jnp.arange(17)[:, None], (3, 17, 1))
        hidden, cache = decoder(decoder.embed(prompt), index, jnp.ones((3, 17), bool), cache)
        cache = kv_cache.advance(cache, jnp.full(3, 17), 17)

        def step(cache, tokens):
            positions = jnp.broadcast_to(cache.offset, (3, 1, 1))
            hidden, cache = decoder(decoder.embed(tokens[:, None]), positions, jnp.ones((3, 1), bool), cache)
            return kv_cache.advance(cache, jnp.ones(3, jnp.int32), 1), decoder.logits(hidden[:, 0])

        logits = decoder.logits(hidden[:, -1])
        return decode(step, cache, logits, max_new_tokens=30, stop_tokens=stop, key=jax.random.key(0), keep_logits=True)

    free = generated([119, 119]).sequences[:, 17:].numpy()
    for eos in (
        [119, 119],
        [int(free[0, 7]), int(free[1, 12])],
    ):  # one that never comes; tokens that end rows in the middle
        expected, got = generated(eos), run(decoder, prompt, jnp.asarray(eos))
        tokens = expected.sequences[:, 17:].numpy()
        np.testing.assert_array_equal(got.tokens[:, : tokens.shape[1]], tokens)
        assert int(got.count.max()) == tokens.shape[1]
        assert int(got.state.offset) == 17 + tokens.shape[1] - 1
        logits, ours = torch.stack(expected.logits, dim=1).numpy(), np.asarray(got.logits)
        for row, count in enumerate(np.asarray(got.count)):
            np.testing.assert_allclose(ours[row, :count], logits[row, :count], atol=1e-4, rtol=0)
