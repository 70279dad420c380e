"""Text to tokens and back: the `tokenizer.json` of a Hugging Face folder, and its chat template."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recsys_moe.errors import UserError
from recsys_moe.llm.checkpoints import read_json

Message = dict[str, str]


class Tokenizer:
    """Encodes and decodes as `tokenizer.json` says.

    `eos_ids` are the tokens that end a text, of `generation_config.json` or `config.json`.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, eos_ids: tuple[int, ...] = (), template: str | None = None, names: Any = None
    ) -> None:
        self._inner, self.eos_ids, self._names = inner, eos_ids, dict(names or {})
        # A template is somebody else's program: it runs where it can neither reach Python nor change what it is given.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # What transformers gives templates.
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            self._template = None if template is None else environment.from_string(template)
        except TemplateError as error:
            raise UserError(f"the chat template can't be read: {error}") from None

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around it.

        Raises:
            UserError: half a character (a lone surrogate: what was no UTF-8 before it came here).
        """
        ids: list[int] = self._inner.encode(whole(text)).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        text: str = self._inner.decode(list(ids))
        return text

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation (`role` and `content` each) up to where the assistant answers.

        Raises:
            UserError: there is no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise UserError("this model has no chat template: send a prompt to completions instead")
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._names)
        except Exception as error:  # a template is a program, and raises what it likes
            raise UserError(f"the chat template refuses these messages: {error}") from None
        ids: list[int] = self._inner.encode(whole(text), add_special_tokens=False).ids
        return ids


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        UserError: there is no `tokenizer.json`, or a file that can't be read.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; give tokens by their numbers, or add it")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} can't be read ({error})") from None
    settings = _json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    if (file := folder / "chat_template.jinja").is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from None
    if not isinstance(template, str | None):
        raise UserError(f"{folder / 'tokenizer_config.json'}: 'chat_template' is no text but {str(template)[:40]}; correct it")
    names = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return Tokenizer(inner, eos_ids(folder), template, {key: text for key, text in names.items() if text is not None})


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text: `eos_token_id` of `generation_config.json`, else of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            ids = tuple(found) if isinstance(found, list) else (found,)
            if not all(type(i) is int for i in ids):
                raise UserError(
                    f"{folder / name}: 'eos_token_id' is {str(found)[:40]}; it must be a whole number, or a list of them"
                )
            return ids
    return ()


def whole(text: str) -> str:
    """A text, if it is one.

    Raises:
        UserError: half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid UTF-8 (at character {error.start + 1}); correct it") from None
    return text


def _text(token: Any) -> str | None:
    """A special token in `tokenizer_config.json` is its text or a description of it."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _refuse(message: str) -> None:
    """What templates call to say no."""
    raise TemplateError(message)
