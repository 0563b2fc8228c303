"""The config of the smallest run: six steps on worlds of two seconds, saved at every second, judged at every third."""

from longvid_jax.train.config import base, stage


def get_config():
    config = base()
    config.model = {
        "model_type": "qwen2_vl",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    }
    source = {"kind": "world", "count": 1000, "seconds": (2.0,), "size": (28, 28), "questions": 4}
    config.stages = (stage(steps=6, batch_size=4, sources=(source,), frames=(4,), text=(256,)),)
    source = source | {"split": "validation"}
    config.eval = {"every": 3, "batches": 1, "batch_size": 4, "sources": (source,), "frames": (4,), "text": (256,)}
    config.save.every = 2
    config.log_every = 1
    config.optim.warmup = 1
    return config
