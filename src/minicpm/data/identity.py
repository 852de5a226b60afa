"""A small set of rows that teaches a model its own name: questions in two languages, answered from a template.

What this leaves out: anything else that a model should know of itself; write rows for that.
"""

from __future__ import annotations

from minicpm.data.row_formats import Example
from minicpm.errors import ConfigError

_QUESTIONS = {
    "en": ("Who are you?", "What is your name?", "Which model are you?", "Who made you?", "Introduce yourself.",
           "Are you ChatGPT?", "Who developed you?", "What should I call you?"),
    "zh": ("你是谁?", "你叫什么名字?", "你是哪个模型?", "谁开发了你?", "介绍一下你自己。", "你是ChatGPT吗?",
           "你的作者是谁?", "我该怎么称呼你?"),
}  # fmt: skip
_ANSWERS = {
    "en": ("I am {name}, a language model made by {author}.", "My name is {name}; {author} made me."),
    "zh": ("我是{name},由{author}开发的语言模型。", "我叫{name},是{author}开发的。"),
}


def identity_examples(text: str) -> list[Example]:
    """Return the rows of an identity such as "name=Ada,author=the Ada project"; an empty text has none.

    Raises:
        ConfigError: the text does not give exactly a name and an author.
    """
    if not text:
        return []
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    if set(facts) != {"name", "author"} or not all(facts.values()):
        raise ConfigError(f"identity {text!r} is not of the form name=NAME,author=AUTHOR")
    return [
        Example(
            "conversation",
            "identity",
            (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answers[number % len(answers)].format(**facts)},
            ),
            f"identity:{number + 1}",
        )
        for language, answers in _ANSWERS.items()
        for number, question in enumerate(_QUESTIONS[language])
    ]
