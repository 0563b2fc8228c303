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
