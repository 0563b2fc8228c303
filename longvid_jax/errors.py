"""Every error that bad input can cause, as a type.

Each message is one sentence: what is wrong, what was expected, what to do.
"""


class LongvidError(Exception):
    """Base of all errors that the library raises on bad input; the command line prints it and exits with code 2."""


class VideoError(LongvidError):
    """A video cannot be opened, has no picture, or nothing in it decodes."""


class CheckpointError(LongvidError):
    """A checkpoint is missing, incomplete, of an unknown architecture, or does not fit its config."""


class OptionError(LongvidError):
    """An option has a value outside its range, or two options contradict each other."""


class PromptError(LongvidError):
    """A prompt cannot be answered: no tokenizer, too long for the cache, or not of the form that the model reads."""


class InstructionError(LongvidError):
    """A memory that depends on its instruction was asked another question."""


class DataError(LongvidError):
    """A data set is empty, is not there, or an entry of it is of no known layout."""


class TrainError(LongvidError):
    """A training run cannot go on: a loss that is not finite, too many examples without a video, no memory left."""


class VideoWarning(UserWarning):
    """A video is damaged: what decodes is used, and the message counts it."""
