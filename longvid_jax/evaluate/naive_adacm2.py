"""AdaCM2's memory cycle (arXiv 2411.12593, algorithm 1) as one writes it first, in PyTorch: to measure against.

A loop over frames and layers, with caches that grow by torch.cat and shrink by torch.topk, around the Q-Former of an
InstructBLIP of transformers. Needs torch and transformers.
"""

from __future__ import annotations

import math

ENCODED = 16  # frames at a time


def encode(model, pixels):
    """Features [T, P, C] of frames [T, 3, H, W]."""
    import torch

    with torch.inference_mode():
        return torch.cat([model.vision_model(part).last_hidden_state for part in pixels.split(ENCODED)])


def watch(model, features, words, alpha: float, beta: float):
    """The queries' outputs [1, Q, width] after frames of features [T, P, C] for an instruction int [1, S].

    And for each cross-attention layer which tokens of the video it holds in the end.
    """
    import torch

    with torch.inference_mode():
        layers, queries = model.qformer.encoder.layer, model.query_tokens
        count, tokens = queries.shape[1], features.shape[1]
        caches = [None] * sum(layer.has_cross_attention for layer in layers)
        for number, frame in enumerate(features):
            hidden, n = model.qformer.embeddings(input_ids=words, query_embeds=queries), 0
            place = torch.arange(number * tokens, (number + 1) * tokens, device=frame.device)
            for layer in layers:
                hidden = layer.attention(hidden)
                seen = hidden[:, :count]
                if layer.has_cross_attention:
                    attention = layer.crossattention.attention
                    keys, values, source = attention.key(frame[None]), attention.value(frame[None]), place
                    if number:
                        keys, values = torch.cat([caches[n][0], keys], dim=1), torch.cat([caches[n][1], values], dim=1)
                        source = torch.cat([caches[n][2], source])
                    context, scores = _attend(attention, seen, keys, values)
                    seen = layer.crossattention.output(context, seen)
                    kept = _survivors(scores, alpha, beta)
                    caches[n] = keys[:, kept], values[:, kept], source[kept]
                    n += 1
                rest = layer.feed_forward_chunk(hidden[:, count:])
                hidden = torch.cat([layer.feed_forward_chunk_query(seen), rest], dim=1)
        return hidden[:, :count], [source for *_, source in caches]


def answer(model, outputs, ids, new_tokens: int):
    """New tokens behind the queries' outputs [1, Q, width] and a prompt int [1, N], greedily."""
    import torch

    with torch.inference_mode():
        seen = model.language_projection(outputs)
        prompt = torch.cat([seen, model.language_model.get_input_embeddings()(ids)], dim=1)
        return model.language_model.generate(
            inputs_embeds=prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )


def _attend(attention, queries, keys, values):
    """The context [1, Q, width], and the attention [S] that each key draws over all heads and queries."""
    q = attention.query(queries)
    q, k, v = (x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2) for x in (q, keys, values))
    weights = ((q @ k.transpose(-1, -2)).float() * attention.scaling).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2), weights.sum((0, 1, 2))


def _survivors(scores, alpha: float, beta: float):
    """Sorted indices of the tokens that stay."""
    import torch

    length = len(scores)
    recent = min(length, max(1, math.floor(alpha * length + 0.5)))
    older = length - recent
    kept = torch.arange(older, length, device=scores.device)
    if not older:
        return kept
    best = torch.topk(scores[:older], max(1, math.ceil(beta * older - 1e-9))).indices
    return torch.cat([best.sort().values, kept])
