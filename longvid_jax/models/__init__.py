"""Networks, each held to its PyTorch original.

Modules hold parameters and static settings; calling one changes nothing.
"""
