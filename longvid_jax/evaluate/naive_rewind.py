"""ReWind's cycle (arXiv 2411.15556, section 3.2) as one writes it first, in PyTorch: to measure against.

A loop over clips, and in each over layers, with a memory that grows by torch.cat. Needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from longvid_jax.models.perceiver import PerceiverConfig


class NaiveRewind:
    """A perceiver (text_conditioning "gated", sinusoidal positions) and its memory, from our parameters by path."""

    def __init__(self, parameters: Mapping[str, np.ndarray], config: PerceiverConfig, device: str, dtype):
        import torch

        def tensor(array):
            return torch.tensor(np.asarray(array, np.float32)).to(device, dtype)

        self.p, self.config = {path: tensor(array) for path, array in parameters.items()}, config
        self.device, self.dtype = device, dtype

    def watch(self, features, words):
        """Tokens [T, N, D] written of features [T, P, W], in clips [C, F, P, W], for BERT's outputs [S, text_width]."""
        import torch

        with torch.inference_mode():
            words = self._linear("perceiver/instruction", words)
            start = torch.cat([self.p["perceiver/query_tokens"], words.mean(0, keepdim=True)])
            keys = values = None
            written, number = [], 0
            for clip in features:
                queries = start
                if keys is not None:
                    q = self._linear("memory/reading/q", self._norm("memory/read_norm", queries))
                    queries = queries + self._linear("memory/reading/o", self._attend(q, keys, values))
                numbers = torch.arange(number, number + len(clip), device=self.device)
                tokens = self._write(self._perceive(queries, clip, numbers, words))
                normed = self._norm("memory/token_norm", tokens)
                placed = normed + self._sinusoids(numbers, self.config.width)[:, None]
                k, v = (
                    self._linear(f"memory/reading/{name}", x).flatten(0, 1)
                    for name, x in (("k", placed), ("v", normed))
                )
                keys, values = (k, v) if keys is None else (torch.cat([keys, k]), torch.cat([values, v]))
                written.append(tokens)
                number += len(clip)
            return torch.cat(written)

    def _perceive(self, queries, clip, numbers, words):
        """[F, Q, D] of queries [Q, D] and a clip [F, P, W]."""
        import torch

        x = clip + self._sinusoids(numbers, self.config.video_width)[:, None]
        q = queries.expand(len(clip), *queries.shape)
        for n in range(self.config.depth):
            at = f"perceiver/layers/{n:02d}"
            asked = self._linear(f"{at}/condition/q", self._norm(f"{at}/condition/norm", x).flatten(0, 1))
            told = [self._linear(f"{at}/condition/{name}", words) for name in "kv"]
            found = self._linear(f"{at}/condition/o", self._attend(asked, *told)).view_as(x)
            shown = self._norm(f"{at}/video_norm", x + torch.tanh(self.p[f"{at}/condition/gate"]) * found)
            q = q + self._attention(f"{at}/cross", self._norm(f"{at}/cross_norm", q), shown)
            normed = self._norm(f"{at}/temporal_norm", q).transpose(0, 1)
            q = q + self._attention(f"{at}/temporal", normed, normed).transpose(0, 1)
            hidden = torch.nn.functional.gelu(self._linear(f"{at}/mlp/fc1", self._norm(f"{at}/mlp_norm", q)))
            q = q + self._linear(f"{at}/mlp/fc2", hidden)
        return self._norm("perceiver/norm", q)

    def _write(self, perceived):
        """[F, N, D] of perceived [F, Q, D]."""
        tokens = self._norm("memory/write_norm", self.p["memory/write_tokens"])
        return self._attention("memory/writing", tokens.expand(len(perceived), *tokens.shape), perceived)

    def _attention(self, name, x, others):
        q, k, v = (self._linear(f"{name}/{part}", y) for part, y in (("q", x), ("k", others), ("v", others)))
        return self._linear(f"{name}/o", self._attend(q, k, v))

    def _attend(self, q, k, v):
        import torch

        q, k, v = (x.unflatten(-1, (self.config.heads, -1)).transpose(-2, -3) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)

    def _linear(self, name, x):
        return x @ self.p[f"{name}/kernel"] + self.p[f"{name}/bias"]

    def _norm(self, name, x):
        import torch

        scale, bias = self.p[f"{name}/scale"], self.p[f"{name}/bias"]
        return torch.nn.functional.layer_norm(x, scale.shape, scale, bias, self.config.norm_eps)

    def _sinusoids(self, numbers, width):
        import torch

        half = -(-width // 2)
        rates = torch.exp(torch.arange(half, device=self.device) * (-math.log(10000.0) / half))
        angles = numbers[:, None].float() * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(self.dtype)
