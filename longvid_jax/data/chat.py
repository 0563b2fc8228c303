"""A question in the words that a chat model was trained on, cut where the video goes."""

from longvid_jax.errors import PromptError

# Qwen2-VL's conversation format, for checkpoints that come without a template of their own.
QWEN2_VL_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Where queries stand before all words, as in InstructBLIP; for tokenizers that have Qwen's special tokens.
QUERIES_FIRST_TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<|video_pad|>{% endfor %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def video_prompt(tokenizer, instruction: str, video_token: int) -> tuple[list[int], list[int]]:
    """Token ids before and behind the video of a conversation that shows one video and asks `instruction` about it."""
    if tokenizer is None:
        raise PromptError(
            "The checkpoint has no tokenizer, so a question in words cannot be read; put tokenizer.json and "
            "tokenizer_config.json beside config.json, or call generate() with token ids."
        )
    if not instruction.strip():
        raise PromptError("The question is empty; ask something about the video.")
    content = [{"type": "video"}, {"type": "text", "text": instruction}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=tokenizer.chat_template or QWEN2_VL_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids.count(video_token) != 1:
        raise PromptError(
            f"The prompt holds the video token {video_token} {ids.count(video_token)} times instead of once; "
            "take special tokens out of the question, or mend the checkpoint's chat template."
        )
    at = ids.index(video_token)
    return ids[:at], ids[at + 1 :]


def queries_prompt(tokenizer, instruction: str, video_token: int | None, count: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt in which `count` queries stand for what was seen; and which query stands where (-1: none).

    With a chat template they stand where it puts the video; without one, as in InstructBLIP, before all words. Ids of
    queries are 0.
    """
    if tokenizer is not None and tokenizer.chat_template and video_token is not None:
        before, behind = video_prompt(tokenizer, instruction, video_token)
    elif tokenizer is None or not instruction.strip():
        before, behind = video_prompt(tokenizer, instruction, -1)  # raises
    else:
        before, behind = [], tokenizer(instruction)["input_ids"]
    words = [-1] * len(before), [-1] * len(behind)
    return [*before, *[0] * count, *behind], [*words[0], *range(count), *words[1]]
