"""ReWind's read, perceive and write as they are defined: one row, one frame, one head, one query at a time, float64.

Only what is real comes in: the frames that there are, the words of the instruction, what has been written.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from longvid_jax.models.paths import leaves
from longvid_jax.models.perceiver import PerceiverConfig

SMALL = PerceiverConfig(
    width=12, depth=2, heads=3, ff_width=20, num_queries=3, num_write=2, video_width=10, text_width=6
)


def randomised(make, seed: int = 0):
    """The module that make() gives, with no parameter at its usual initial value."""
    rng = np.random.default_rng(seed)
    flat, structure = jax.tree.flatten(jax.eval_shape(make))
    around = ((0.6, 0.3), (0.0, 0.3))  # scales, biases and open gates; kernels
    values = [jnp.asarray(rng.normal(*around[len(x.shape) > 1], x.shape), jnp.float32) for x in flat]
    return jax.tree.unflatten(structure, values)


def parameters(module) -> dict[str, np.ndarray]:
    """float64, by path; the layers are a tuple."""
    return {leaf.path: np.asarray(leaf.value, np.float64) for leaf in leaves(module)}


class Oracle:
    """Of a Perceiver and a ReadWrite."""

    def __init__(self, perceiver, memory, config: PerceiverConfig):
        self.config = config
        self.perceiver, self.memory = parameters(perceiver), parameters(memory)

    # --- what they are made of

    def linear(self, p, name, x):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(self, p, name, x):
        deviation = x - x.mean()
        return (
            deviation / np.sqrt((deviation**2).mean() + self.config.norm_eps) * p[f"{name}/scale"] + p[f"{name}/bias"]
        )

    def attend(self, q, keys, values):
        """[D] of a query [D], lists of keys and values [D]: a softmax a head."""
        size = len(q) // self.config.heads
        out = np.zeros(len(q))
        for head in range(self.config.heads):
            part = slice(head * size, (head + 1) * size)
            logits = [q[part] @ k[part] / math.sqrt(size) for k in keys]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for weight, v in zip(weights, values, strict=True):
                out[part] += weight / sum(weights) * v[part]
        return out

    def attention(self, p, name, x, others):
        """What x [·] finds in other vectors."""
        keys = [self.linear(p, f"{name}/k", other) for other in others]
        values = [self.linear(p, f"{name}/v", other) for other in others]
        return self.linear(p, f"{name}/o", self.attend(self.linear(p, f"{name}/q", x), keys, values))

    def position(self, p, number, width):
        if "positions/frames/embedding" in p:
            table = p["positions/frames/embedding"]
            return table[min(number, len(table) - 1)]
        half = math.ceil(width / 2)
        angles = [number / 10000 ** (i / half) for i in range(half)]
        return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])[:width]

    # --- the instruction

    def words(self, outputs):
        """BERT's outputs, those of real words -> what the networks take."""
        return [self.linear(self.perceiver, "instruction", x) for x in np.float64(outputs)]

    def queries(self, words):
        return [*self.perceiver["query_tokens"], *([sum(words) / len(words)] if words else [])]

    # --- the cycle

    def read(self, queries, keys, values):
        if not len(keys):
            return list(queries)
        p, out = self.memory, []
        for query in queries:
            q = self.linear(p, "reading/q", self.norm(p, "read_norm", query))
            out.append(query + self.linear(p, "reading/o", self.attend(q, keys, values)))
        return out

    def condition(self, name, x, words):
        p = self.perceiver
        if not words:
            return x
        return x + np.tanh(p[f"{name}/gate"]) * self.attention(p, name, self.norm(p, f"{name}/norm", x), words)

    def perceive(self, queries, features, numbers, words):
        """Of the frames of a clip, those that there are: what the queries become in each."""
        p, how = self.perceiver, self.config.text_conditioning
        frames = [
            [x + self.position(p, n, len(x)) for x in frame]
            for frame, n in zip(np.float64(features), numbers, strict=True)
        ]
        if how == "shared":
            frames = [[self.condition("condition", x, words) for x in frame] for frame in frames]
        if how == "concat":
            frames = [frame + [self.linear(p, "beside", word) for word in words] for frame in frames]
        state = [list(queries) for _ in frames]
        for n in range(self.config.depth):
            at = f"layers/{n:02d}"
            for f, frame in enumerate(frames):
                if how == "gated":
                    frame = [self.condition(f"{at}/condition", x, words) for x in frame]
                shown = [self.norm(p, f"{at}/video_norm", x) for x in frame]
                state[f] = [
                    q + self.attention(p, f"{at}/cross", self.norm(p, f"{at}/cross_norm", q), shown) for q in state[f]
                ]
            normed = [[self.norm(p, f"{at}/temporal_norm", q) for q in row] for row in state]
            state = [
                [
                    q + self.attention(p, f"{at}/temporal", normed[f][i], [row[i] for row in normed])
                    for i, q in enumerate(row)
                ]
                for f, row in enumerate(state)
            ]
            for row in state:
                for i, q in enumerate(row):
                    hidden = self.linear(p, f"{at}/mlp/fc1", self.norm(p, f"{at}/mlp_norm", q))
                    hidden = np.array([x / 2 * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
                    row[i] = q + self.linear(p, f"{at}/mlp/fc2", hidden)
        return [[self.norm(p, "norm", q) for q in row] for row in state]

    def write(self, perceived, number):
        """Of a frame's queries: its tokens, their keys and their values."""
        p = self.memory
        tokens = [
            self.attention(p, "writing", self.norm(p, "write_norm", token), perceived) for token in p["write_tokens"]
        ]
        normed = [self.norm(p, "token_norm", token) for token in tokens]
        place = self.position(p, number, self.config.width)
        keys = [self.linear(p, "reading/k", x + place) for x in normed]
        return tokens, keys, [self.linear(p, "reading/v", x) for x in normed]

    def watch(self, features, words, clip: int):
        """Tokens, keys and values, each [T, N, D], of a video of features [T, P, W]."""
        tokens, keys, values = [], [], []
        for start in range(0, len(features), clip):
            numbers = range(start, min(start + clip, len(features)))
            flat = [[x for frame in kept for x in frame] for kept in (keys, values)]
            queries = self.read(self.queries(words), *flat)
            perceived = self.perceive(queries, features[start : start + clip], numbers, words)
            for frame, number in zip(perceived, numbers, strict=True):
                for kept, new in zip((tokens, keys, values), self.write(frame, number), strict=True):
                    kept.append(new)
        shape = (len(features), self.config.num_write, self.config.width)
        return tuple(np.array(kept).reshape(shape) for kept in (tokens, keys, values))
