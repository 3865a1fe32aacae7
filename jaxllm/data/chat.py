"""Chat templates: jinja2 source from a checkpoint, rendered in a sandbox as the reference implementation does."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.data.tokenizer import Tokenizer

Message = Mapping[str, Any]  # at least {"role": str, "content": str}


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt text of a conversation, to be encoded with `special=True`.

    Raises ValueError when the tokenizer has no template, or when the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "render_chat: this tokenizer has chat_template=None; use `generate` with a plain prompt instead"
        )
    texts = {f"{role}_token": tokenizer.text_of(getattr(tokenizer, role)) for role in ("bos", "eos", "pad")}
    return render(tokenizer.chat_template, messages, add_generation_prompt=add_generation_prompt, tools=tools, **texts)


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """Render `template` with `messages` and further variables (`add_generation_prompt`, `bos_token`, `tools` ...)."""
    try:
        return _compiled(template).render(messages=list(messages), **variables)
    except jinja2.TemplateError as error:
        roles = [message.get("role") for message in messages]
        raise ValueError(f"chat template: {error}; the roles were {roles}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as it is, where jinja2's own filter escapes <, >, & and quotes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; rendering shows it as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> list[Any]:
        """The body of the tag, unwrapped."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
