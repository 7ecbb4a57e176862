"""Chat template for blocks of TinyStories-Instruct; it also marks a tokenizer whose model reads blocks."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tinystories_slm.data.instruct import story_start

_MARK = "{#- Blocks of TinyStories-Instruct #}"
CHAT_TEMPLATE = (
    _MARK
    + """
{%- for message in messages %}
    {%- set content = message['content'].replace('\\r\\n', '\\n').strip() %}
    {%- if message['role'] == 'user' and loop.index0 % 2 == 0 %}
        {%- if loop.first %}
            {{- bos_token }}
        {%- endif %}
        {%- if content.endswith('Story:') %}
            {%- set content = content[:-6].strip() %}
        {%- endif %}
        {%- if content and content.split(':')[0] not in ['Features', 'Words', 'Summary', 'Random sentence'] %}
            {%- set content = 'Summary: ' + content.replace('\\n', ' ') %}
        {%- endif %}
        {%- if content %}
            {{- content + '\\n' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 %}
        {{- 'Story:' }}
        {%- generation %}
            {{- '\\n\\n' + content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('messages must alternate between user and assistant, and start with user') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Story:' }}
{%- endif %}
"""
)
"""A user message holds the lines of a prompt; other text is the summary. An assistant message is the story.

The generation prompt ends with `Story:`, as `instruct.prompt_text`: the model generates the empty line before
the story. What follows `Story:`, with the end token, is the generated part of the message.
"""
_MIN_BLOCK_SHARE = 0.5


def set_chat_template(tokenizer: PreTrainedTokenizerBase, stories: Sequence[str]) -> None:
    """Set the chat template if at least half of `stories` are blocks; otherwise remove it.

    A chat template of another tokenizer stays on stories that are not blocks.
    """
    num_blocks = sum(story_start(story) is not None for story in stories)
    if num_blocks and num_blocks >= _MIN_BLOCK_SHARE * len(stories):
        tokenizer.chat_template = CHAT_TEMPLATE
    elif has_block_template(tokenizer):
        tokenizer.chat_template = None


def has_block_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the stories that the tokenizer was prepared for are blocks of TinyStories-Instruct."""
    return is_block_template(tokenizer.chat_template)


def is_block_template(template: object) -> bool:
    """Whether a chat template is `CHAT_TEMPLATE`, of this version or another."""
    return isinstance(template, str) and _MARK in template
