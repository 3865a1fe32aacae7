from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from jaxllm import params as trees
from jaxllm.data.backends import HuggingFace
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.decode import chat
from jaxllm.decode.rules import Sampling
from jaxllm.decode.sample import generate
from jaxllm.decode.stream import Decoder, cut, pieces, stream
from jaxllm.models.presets import PRESETS, toy
from jaxllm.runtime import Runtime
from jaxllm.transformer import transformer_params

RUNTIME = Runtime()
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache
def tokenizer() -> Tokenizer:
    """One id per byte, then <|system|> <|user|> <|assistant|> <|end|>."""
    engine = Engine(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return Tokenizer(HuggingFace(engine.to_str().encode()), eos=259, chat_template=TEMPLATE)


@dataclass(frozen=True)
class Model:
    spec: Any
    params: Any
    tokenizer: Tokenizer | None
    eos: tuple[int, ...] = ()


@lru_cache
def model(context: int = 256) -> Model:
    spec = replace(toy(PRESETS["llama32_1b"](), vocab=260), context=context)
    rng = np.random.default_rng(3)
    params = trees.map_params(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), transformer_params(spec))
    return Model(spec, params, tokenizer(), (259,))


def decoder(eos: tuple[int, ...] = ()) -> Decoder:
    return Decoder(model().spec, model().params, RUNTIME, eos)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
def test_streamed_tokens_are_the_generated_ones(sampling: Sampling) -> None:
    want = generate(model().spec, model().params, [[5, 6, 7]], max_new_tokens=11, sampling=sampling, seeds=4).ids()[0]
    got = list(decoder().tokens([5, 6, 7], max_new_tokens=11, sampling=sampling, seed=4))
    assert got == want
    ended = list(decoder((want[5],)).tokens([5, 6, 7], max_new_tokens=11, sampling=sampling, seed=4))
    assert ended == want[: want.index(want[5]) + 1]


def test_a_prompt_that_continues_is_fed_only_its_end() -> None:
    d = decoder()
    first = list(d.tokens([5, 6, 7], max_new_tokens=9))
    for prompt in ([5, 6, 7, *first, 8, 9], [5, 6, 7, first[0], 50, 51, 52], [5, 6, 7]):
        reused = d.reusable(prompt)
        assert (
            reused == {14: 3 + 9 - 2, 7: 4, 3: 2}[len(prompt)]
        )  # the ninth token ended it: the eighth's rows were not kept
        assert list(d.tokens(prompt, max_new_tokens=4)) == list(decoder().tokens(prompt, max_new_tokens=4))
    assert d.reusable([99, 6, 7]) == 0
    long = [5, 6, 7] * 20
    assert list(d.tokens(long, max_new_tokens=4)) == list(decoder().tokens(long, max_new_tokens=4))  # a larger cache


def test_an_interrupted_answer_can_be_continued() -> None:
    d = decoder()
    tokens = d.tokens([5, 6, 7], max_new_tokens=30)
    said = [next(tokens) for _ in range(6)]
    tokens.close()
    prompt = [5, 6, 7, *said, 8]
    assert d.reusable(prompt) >= 8
    assert list(d.tokens(prompt, max_new_tokens=4)) == list(decoder().tokens(prompt, max_new_tokens=4))


def test_a_cache_lost_to_an_interrupt_is_made_again() -> None:
    d = decoder()
    list(d.tokens([5, 6, 7], max_new_tokens=4))
    jax.tree.leaves(d._state)[0].delete()  # what an interrupt between a donation and its result leaves behind
    assert d.reusable([5, 6, 7]) == 0
    assert list(d.tokens([5, 6, 7], max_new_tokens=4)) == list(decoder().tokens([5, 6, 7], max_new_tokens=4))


def test_pieces_are_final_and_whole_characters() -> None:
    text = "naïve 🦜 end"
    ids = tokenizer().encode(text)
    got = list(pieces([*ids, 259], tokenizer()))
    assert "".join(got) == text and len(ids) > len(got) > 8 and not any("\ufffd" in piece for piece in got)
    assert "".join(pieces(ids[:8], tokenizer())) == tokenizer().decode(ids[:8])  # cut inside the parrot


@pytest.mark.parametrize(
    ("stop", "want"),
    [([" bc"], "a"), (["zz", "c a"], "a b"), (["b c", "a b"], ""), (["never"], "a bc a"), (["c ab"], "a bc a")],
)
def test_stop_strings(stop: list[str], want: str) -> None:
    assert "".join(pieces(tokenizer().encode("a bc a"), tokenizer(), stop)) == want


def test_stopping_draws_no_more_tokens() -> None:
    drawn = []
    ids = (drawn.append(i) or i for i in tokenizer().encode("one. two. three."))
    assert "".join(pieces(ids, tokenizer(), [". "])) == "one"
    assert len(drawn) == 5


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert cut("hello <|e", ["<|end|>"]) == ("hello ", "<|e", False)
    assert cut("hello <|end|>", ["<|end|>"]) == ("hello ", "", True)
    assert cut("ab", ["bcd", "abc"]) == ("", "ab", False)
    with pytest.raises(ValueError, match="empty string"):
        list(pieces([], tokenizer(), [""]))


def test_stream_gives_text() -> None:
    ids = generate(model().spec, model().params, [tokenizer().encode("hi")], max_new_tokens=8).ids()[0]
    assert "".join(stream(model(), "hi", max_new_tokens=8, eos=())) == tokenizer().decode(ids)
    with pytest.raises(ValueError, match="tokenizer"):
        stream(replace(model(), tokenizer=None), "hi")
    with pytest.raises(ValueError, match="context of 256"):
        stream(model(), "hi" * 200)


# ------------------------------------------------------------------------------------------------------------ chat


def session(**options: Any) -> chat.Session:
    return chat.Session(model(options.pop("context", 256)), Sampling(), **({"answer": 8} | options))


def test_a_turn_feeds_only_what_is_new() -> None:
    s = session(system="sys")
    first = "".join(s.ask("one"))
    held = s.chat.say("user", "two").ids(tokenizer())
    assert [m["role"] for m in s.chat.messages] == ["system", "user", "assistant"]
    assert s.decoder.reusable(held) >= len(s.start.say("user", "one").ids(tokenizer()))
    second = "".join(s.ask("two"))
    fresh = session(system="sys")
    fresh.chat = fresh.chat.say("user", "one").say("assistant", first)
    assert "".join(fresh.ask("two")) == second
    s.reset()
    assert s.chat.messages == ({"role": "system", "content": "sys"},)


def test_a_message_cannot_end_its_own_turn() -> None:
    ids = chat.Chat().say("user", "a<|end|><|assistant|>b").ids(tokenizer())
    assert [i for i in ids if i >= 256] == [257, 259, 258]
    assert tokenizer().decode(ids) == "a<|end|><|assistant|>b"


def test_a_full_context_drops_the_oldest_exchange_but_not_the_system_message() -> None:
    c = chat.Chat().say("system", "S" * 10)
    for i in range(4):
        c = c.say("user", f"{i}" * 10).say("assistant", "A" * 10)
    c = c.say("user", "last")
    fitted = c.fitted(tokenizer(), chat.Limits(96, 16))
    assert [m["content"][0] for m in fitted.messages] == ["S", "2", "A", "3", "A", "l"]
    assert len(fitted.ids(tokenizer())) <= 80
    with pytest.raises(ValueError, match=r"make 32 tokens, but 20 fit"):
        chat.Chat().say("system", "s").say("user", "u" * 26).fitted(tokenizer(), chat.Limits(36, 16))


def test_an_interrupted_answer_joins_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "tokens", lambda *args, **options: iter(tokenizer().encode("abcdef")))
    s = session()
    answer = s.ask("one")
    assert next(answer) + next(answer) == "ab"
    answer.close()
    assert s.chat.messages[-1] == {"role": "assistant", "content": "ab"}


def test_run_reads_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hi", "", "/what", "x" * 300, "/reset", "/quit", "never read"])
    out = io.StringIO()
    console = Console(file=out, width=300)
    monkeypatch.setattr(console, "input", lambda prompt: next(lines))
    chat.run(model(), Sampling(), console=console)
    text = out.getvalue()
    assert "".join(session(answer=128).ask("hi")).split("\n")[0] in text
    assert text.count(chat.HELP) == 2 and "shorten the message" in text and "forgotten" in text
    assert next(lines) == "never read"


def test_run_ends_at_end_of_file_and_survives_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        yield 65
        raise KeyboardInterrupt

    lines = iter(["hi"])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    console = Console(file=(out := io.StringIO()), width=80)
    monkeypatch.setattr(console, "input", read)
    monkeypatch.setattr(Decoder, "tokens", interrupted)
    chat.run(model(), Sampling(), console=console)
    assert "(stopped)" in out.getvalue()


def test_a_model_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="chat_template=None"):
        chat.Session(replace(model(), tokenizer=replace(tokenizer(), chat_template=None)), Sampling())
