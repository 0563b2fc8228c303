"""Questions about long videos, answered in JAX by ReTaKe, AdaCM2 and ReWind; importing this imports nothing heavy."""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load": "systems.loading",
    "ReTaKe": "systems.retake",
    "AdaCM2": "systems.adacm2",
    "ReWind": "systems.rewind",
    "Video": "video",
    "Frames": "video",
    "fork": "memory.state",
    "save": "systems.keeping",
    "restore": "systems.keeping",
    "make_mesh": "scale.mesh",
    "LongvidError": "errors",
    "VideoError": "errors",
    "CheckpointError": "errors",
    "OptionError": "errors",
    "PromptError": "errors",
    "InstructionError": "errors",
    "DataError": "errors",
    "VideoWarning": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
