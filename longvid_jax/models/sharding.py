"""How parameters lie on a mesh: one table of path patterns, read from the top."""

import re

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longvid_jax.ops.sharding import divisible

# Kernels are [in, out]: maps into heads or hidden units split their output over `tensor`, maps back split their input.
ATTENTIONS = "(attention|cross|condition|temporal|reading|writing)"
TABLE = (
    (
        rf"({ATTENTIONS}/(q|k|v|qkv)|mlp/(gate|up|fc1)|(merger|query_mlp|facts)/fc1|lm_head)/kernel",
        PartitionSpec("fsdp", "tensor"),
    ),
    (
        rf"({ATTENTIONS}/(o|proj)|mlp/(down|fc2)|(merger|query_mlp|facts)/fc2)/kernel",
        PartitionSpec("tensor", "fsdp"),
    ),
    (rf"{ATTENTIONS}/(q|k|v)/bias|(attention/qkv|(mlp|merger|query_mlp|facts)/fc1)/bias", PartitionSpec("tensor")),
    (r"(embed|words)/embedding", PartitionSpec("tensor", "fsdp")),
    (r"(patch_embed|(\w+_)?projection|pooler|instruction|beside)/kernel", PartitionSpec(None, "fsdp")),
    (r"contrast/(video|caption)/kernel|(positions|types|frames)/embedding", PartitionSpec(None, "fsdp")),
    (r"class_embedding|position_embedding|query_tokens|write_tokens|separator", PartitionSpec(None, "fsdp")),
    (r"(\w+_)?norm\d?/(scale|bias)|bias|gate|contrast/(temperature|offset)", PartitionSpec()),
)


def parameter_spec(path: str, rank: int) -> PartitionSpec:
    """The axes of the parameter at a path such as text/layers/mlp/up/kernel; a stack's layer axis stays whole.

    Low-rank adapters lie as their kernel does, A [in, rank] on `in` and B [rank, out] on `out`; the rank stays whole.
    """
    if path.endswith(("/lora_a", "/lora_b")):
        *layer, width_in, width_out = parameter_spec(path[: -len("lora_a")] + "kernel", rank)
        return PartitionSpec(*layer, width_in, None) if path.endswith("a") else PartitionSpec(*layer, None, width_out)
    for pattern, spec in TABLE:
        if re.search(rf"(^|/)({pattern})$", path):
            width = 1 if path.endswith(("scale", "bias")) else 2
            return PartitionSpec(*[None] * (rank - width), *spec)
    raise KeyError(f"no sharding is given for the parameter {path}")


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter lies on the mesh; axes that do not divide it are left out."""
    return NamedSharding(mesh, divisible(mesh, parameter_spec(path, len(shape)), shape))
