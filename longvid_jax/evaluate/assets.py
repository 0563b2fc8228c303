"""The tiny trained models that come with the package; their README.md says what they are."""

from pathlib import Path

from longvid_jax.errors import OptionError

FOLDER = Path(__file__).parents[1] / "assets"


def path(name: str) -> Path:
    """The Hugging Face folder of a shipped model; OptionError if there is none of that name."""
    folder = FOLDER / name
    if not name or not folder.is_dir():
        shipped = sorted(entry.name for entry in FOLDER.glob("*") if entry.is_dir())
        raise OptionError(f"no model {name!r} comes with the package; there is {', '.join(shipped) or 'none'}.")
    return folder
