"""A tokenizer in Qwen2-VL's layout, made of a few sentences: bytes, their words, and Qwen's special tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from longvid_jax.data.chat import QWEN2_VL_TEMPLATE
from longvid_jax.errors import CheckpointError
from longvid_jax.video.synthetic import sentences, vocabulary

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
MOST_WORDS = 4096
TEMPLATE_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\n"  # of QWEN2_VL_TEMPLATE


def byte_tokenizer(sentences: Iterable[str] = ()) -> Tokenizer:
    """Byte-level BPE whose merges make each word of the sentences a token; so is a digit, and any text can be said."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=MOST_WORDS, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def world_tokenizer():
    """The tokenizer of models trained on the made-up world: each of its words is a token, and so is the template's."""
    from transformers import PreTrainedTokenizerFast

    words = byte_tokenizer([*sentences(), TEMPLATE_WORDS])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")


INSTRUCTION = "qformer_tokenizer"  # a checkpoint's sub-folder with the tokenizer of a Q-Former or a BERT
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_tokenizer():
    """A tokenizer of BERT's kind for questions about the made-up world: its words, and letters for all others."""
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys([*BERT_SPECIAL, *map(str.lower, vocabulary()), *letters, *(f"##{x}" for x in letters)])
    words = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT_SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **{f"{name}_token": token for name, token in names.items()}, model_max_length=512
    )


def load_tokenizer(folder: str | Path):
    """The tokenizer of a checkpoint's folder; None where it has none."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import, which token ids do not need

    try:
        about = folder / "tokenizer_config.json"
        told = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        # AutoTokenizer would ask config.json, too, and warn of types of models that are not transformers'.
        plain = told.get("tokenizer_class") in ("PreTrainedTokenizerFast", PreTrainedTokenizerFast.__name__)
        kind = PreTrainedTokenizerFast if plain else AutoTokenizer
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read ({error}); fetch tokenizer.json again."
        ) from error


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, *, max_length: int, template: str = QWEN2_VL_TEMPLATE
) -> None:
    """Writes what transformers.AutoTokenizer loads, with a chat template in it."""
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": max_length,
        "chat_template": template,
    }
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
