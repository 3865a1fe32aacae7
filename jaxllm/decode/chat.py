"""Chat in a terminal: a conversation rendered by the model's own template, and a cache kept over its turns.

Every turn renders the whole conversation again and feeds only what the cache lacks, so a template may do as it likes
with earlier turns. When the context is full the oldest exchange is dropped, the system message never.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from jaxllm.data.chat import Message, render_chat
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.decode.rules import Sampling
from jaxllm.decode.stream import Decoder, TextModel, pieces, require_tokenizer
from jaxllm.decode.weights import prepare
from jaxllm.runtime import Runtime

HELP = "/reset starts over · /quit or Ctrl-D leaves · Ctrl-C stops an answer"


@dataclass(frozen=True)
class Limits:
    """context: tokens that the prompt and the answer may take together.  answer: tokens that an answer may take."""

    context: int
    answer: int

    @property
    def prompt(self) -> int:
        """Tokens left for the conversation."""
        return self.context - self.answer


@dataclass(frozen=True)
class Chat:
    """A conversation: messages of roles "system" (first, if at all), "user", "assistant"."""

    messages: tuple[Message, ...] = ()

    def say(self, role: str, content: str) -> Chat:
        """The conversation with one more message."""
        return replace(self, messages=(*self.messages, {"role": role, "content": content}))

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt for the next answer. Control tokens that a message spells out stay ordinary text."""
        return encode_chat(tokenizer, self.messages)

    def fitted(self, tokenizer: Tokenizer, limits: Limits) -> Chat:
        """The conversation without its oldest exchanges, as many as must go for an answer to fit.

        Raises ValueError when the system message and the last question alone are too long.
        """
        chat = self
        while (length := len(chat.ids(tokenizer))) > limits.prompt:
            head = 1 if chat.messages[0]["role"] == "system" else 0
            later = [i for i, m in enumerate(chat.messages) if m["role"] == "user" and i > head]
            if not later:
                raise ValueError(
                    f"chat: this message and the system message make {length} tokens, but {limits.prompt} fit beside "
                    f"an answer of {limits.answer} in the context of {limits.context}; shorten the message"
                )
            chat = Chat(chat.messages[:head] + chat.messages[later[0] :])
        return chat


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a rendered conversation in which only the template's own control tokens are control tokens.

    Messages that spell one out are rendered behind a placeholder and encoded as plain text in its place.
    """
    controls = [text for text in tokenizer.special if text]
    hidden = {
        f"\ue000{i}\ue001": str(m["content"])
        for i, m in enumerate(messages)
        if any(c in str(m["content"]) for c in controls)
    }
    marks = {text: mark for mark, text in hidden.items()}
    shown = [{**m, "content": marks.get(str(m["content"]), m["content"])} for m in messages]
    text, ids = render_chat(tokenizer, shown), []
    for mark, content in hidden.items():
        before, found, after = text.partition(mark)
        if found:
            ids += tokenizer.encode(before, special=True) + tokenizer.encode(content)
            text = after
    return ids + tokenizer.encode(text, special=True)


class Session:
    """A chat with a model whose cache lasts over the turns. Interrupting an answer keeps what was said so far."""

    def __init__(
        self,
        model: TextModel,
        sampling: Sampling,
        *,
        system: str | None = None,
        answer: int = 1024,
        runtime: Runtime = Runtime(),
    ) -> None:
        self.tokenizer = require_tokenizer(model)
        self.sampling, self.start = sampling, Chat() if system is None else Chat().say("system", system)
        self.chat = self.start
        self.limits = Limits(model.spec.context, min(answer, model.spec.context // 2))
        self.start.say("user", "?").ids(self.tokenizer)  # a model without a template is refused before it is laid out
        self.decoder = Decoder(model.spec, prepare(model.params, model.spec, runtime), runtime, model.eos)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.chat = self.start

    def ask(self, question: str, seed: int = 0) -> Generator[str, None, None]:
        """The answer in pieces. It joins the conversation when it ends, or as far as it came when it is closed.

        Raises ValueError, and leaves the conversation as it was, when the question does not fit the context.
        """
        self.chat = self.chat.say("user", question).fitted(self.tokenizer, self.limits)
        return self._answer(self.chat.ids(self.tokenizer), seed)

    def _answer(self, prompt: list[int], seed: int) -> Generator[str, None, None]:
        said: list[str] = []
        ids = self.decoder.tokens(prompt, max_new_tokens=self.limits.answer, sampling=self.sampling, seed=seed)
        try:
            for piece in pieces(ids, self.tokenizer):
                said.append(piece)
                yield piece
        finally:
            self.chat = self.chat.say("assistant", "".join(said))


def run(
    model: TextModel,
    sampling: Sampling,
    *,
    system: str | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    console: Console | None = None,
) -> None:
    """Read questions from the terminal and stream answers until /quit, Ctrl-D, or Ctrl-C at the prompt."""
    console = Console() if console is None else console
    session = Session(model, sampling, system=system, runtime=runtime)
    console.print(f"{model.spec.name} · {HELP}", style="dim", highlight=False)
    for turn in range(10**9):
        try:
            question = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        match question:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                session.reset()
                console.print("forgotten", style="dim")
            case _ if question.startswith("/"):
                console.print(HELP, style="dim", highlight=False)
            case _:
                show_answer(session, question, seed + turn, console)


def show_answer(session: Session, question: str, seed: int, console: Console) -> None:
    """Print one answer as it comes; Ctrl-C stops it, a question that does not fit is explained."""
    held = len(session.chat.messages)
    try:
        answer = session.ask(question, seed)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return
    if len(session.chat.messages) <= held:
        console.print("(the oldest exchange was dropped: the context is full)", style="dim")
    try:
        for piece in answer:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim")
    finally:
        answer.close()
