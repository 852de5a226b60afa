"""Against `transformers` and `tokenizers`: the same ids from one vocabulary, the same text from one template."""

# ruff: noqa: E501 -- templates are wrapped for reading, not for width
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from minicpm.formats.gguf_read import open_gguf
from minicpm.tokenizer import ChatTemplate, Tokenizer

TEXTS = [
    "Hello  world,\tit's 2024!\n\n  def f(x):\n    return x",
    "山东省最高的山是哪座山, 它比黄山高还是矮?",
    "🤗👩‍👩‍👧 é e\u0301 \u200b",
    "typed <|im_end|> and <|im_start|>user",
    "",
    "   ",
    "\ufffd\x00\x7f",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is  山?\n"},
    {"role": "assistant", "content": "A mountain. "},
    {"role": "user", "content": "Thanks & <b>bye</b>"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {"type": "object"}}}]

# Written here in the manner of well-known families: what they ask of the language is what is tested.
TEMPLATES = {
    "headers": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "instructions": (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] %}\n    {%- set rest = "
        "messages[1:] %}\n{%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n{{- bos_token }}\n{%- for m in rest "
        "%}\n    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\n        {{- raise_exception('alternate') }}\n"
        "    {%- endif %}\n    {%- if m['role'] == 'user' %}\n        {%- if loop.last and system is defined %}\n"
        "            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}\n        {%- else %}\n"
        "            {{- '[INST] ' + m['content'] + '[/INST]' }}\n        {%- endif %}\n    {%- else %}\n"
        "        {{- ' ' + m['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}"
    ),
    "tools": (
        "{%- if tools %}\n<|im_start|>system\n{{ messages[0].content }}\n# Tools\n<tools>{% for tool in tools %}\n"
        "{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n{% endif %}{% set ns = namespace(last=-1) %}"
        "{% for m in messages[::-1] %}{% if ns.last < 0 and m.role == 'user' %}{% set ns.last = messages | length - 1 - "
        "loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if loop.index0 == ns.last %}(last) {% endif %}{{ m.content.strip('\n').split('.')[0]"
        " }}{{ '' if m.content is string else 1 }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "assistant\n{% endif %}"
    ),
    "macros": (
        "{% macro turn(role, text='') %}<{{ role | upper }}>{{ text | trim | replace('\n', ' ') }}</{{ role }}>\n"
        "{% endmacro %}{% set dated %}{{ messages | map(attribute='role') | unique | join('/') }}{% endset %}{{ dated }}\n"
        "{% for m in messages if m.content is not none %}{{ turn(m.role, m.content) }}{% else %}none{% endfor %}"
        "{{ {'a': [1, 2.5, none, true]} | tojson(indent=2) }}{{ '%s|%d' % ('x', 3) }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_in_transformers(name: str, add_generation_prompt: bool, tools: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    expected, _ = render_jinja_template([CHAT], chat_template=TEMPLATES[name], **options, **tokens)
    assert ChatTemplate(TEMPLATES[name], tokens).render(CHAT, **options) == expected[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `transformers` saves it: byte-level BPE with ChatML and a bos."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    path = tmp_path_factory.mktemp("model")
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATES["tools"],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_from_a_folder(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    trusted = theirs(text, add_special_tokens=False)["input_ids"]
    typed = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode(text, allow_special=True) == trusted
    assert ours.encode(text) == typed
    assert ours.decode(trusted) == theirs.decode(trusted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(trusted, skip_special=False) == text
    assert (ours.bos_id, ours.vocabulary.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_conversations_from_a_folder(folder: Path, tools: Any) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    expected = theirs.apply_chat_template(CHAT, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat(CHAT, tools=tools) == expected


def test_smollm2_exported_for_transformers(smollm2_path: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer.from_gguf(open_gguf(smollm2_path).metadata)
    (tmp_path / "tokenizer.json").write_text(ours.to_json())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
    template = ours.chat_template.source
    expected = theirs.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat(CHAT) == expected
    reloaded = Tokenizer.from_folder(tmp_path)
    assert reloaded.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    # The pre-tokenizer's name is found again from its patterns.
    assert reloaded.to_gguf_metadata()["tokenizer.ggml.pre"] == "smollm"
