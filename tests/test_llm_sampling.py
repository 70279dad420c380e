"""Sampling, detokenisation and stop strings, each by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from recsys_moe.errors import UserError
from recsys_moe.llm.engine.sampling import Sampling, describe, distribution, draw, logprobs, sample
from recsys_moe.llm.engine.stopping import Detokenizer, StopStrings, TextStream
from recsys_moe.typed import parse

# -- sampling


def row(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.6, "min_p": 0.2},
        {"top_k": 500},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, float]) -> None:
    sampling = parse(Sampling, settings, "sampling")
    for seed in range(20):
        logits = row(100, seed)
        theirs = TemperatureLogitsWarper(sampling.temperature)(None, logits[None].double())
        if sampling.top_k:
            theirs = TopKLogitsWarper(sampling.top_k)(None, theirs)
        theirs = TopPLogitsWarper(sampling.top_p)(None, theirs)
        if sampling.min_p:
            theirs = MinPLogitsWarper(sampling.min_p)(None, theirs)
        ids, p = distribution(logits.numpy(), sampling)
        mine = np.zeros(100)
        mine[ids] = p / p.sum()
        np.testing.assert_allclose(mine, torch.softmax(theirs, -1)[0].numpy(), atol=1e-12)


def test_draws_follow_the_distribution() -> None:
    logits = row(12)
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=5)
    ids, p = distribution(logits.numpy(), sampling)
    drawn = np.bincount([draw(logits.numpy(), sampling, n) for n in range(20000)], minlength=12)
    expected = np.zeros(12)
    expected[ids] = 20000 * p / p.sum()
    assert ((drawn - expected) ** 2 / np.maximum(expected, 1)).sum() < 30  # χ², at most 11 degrees of freedom: 1 in 600
    assert drawn[expected == 0].sum() == 0
    one, other = ([draw(logits.numpy(), Sampling(seed=s), n) for n in range(50)] for s in (1, 2))
    assert one != other


def test_ties_go_to_the_lowest_id() -> None:
    level = np.zeros(9, np.float32)
    assert sample(torch.zeros(2, 9), [Sampling(temperature=0.0)] * 2, [0, 0]) == [0, 0]
    # The smallest number that there is: a logit divided by it has none.
    assert sample(row(50)[None], [Sampling(temperature=5e-324, top_p=0.9)], [0]) == [int(row(50).argmax())]
    assert distribution(level, Sampling(top_k=3))[0].tolist() == [0, 1, 2]
    assert distribution(level, Sampling(top_p=0.3))[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nobody_elses_trouble(strange: float) -> None:
    logits = torch.stack([row(9), row(9, 1), row(9, 2)])
    logits[1, 4] = strange
    found = sample(logits, [Sampling(temperature=0.0)] * 3, [0] * 3)
    assert found == [int(logits[0].argmax()), None, int(logits[2].argmax())]


def test_logprobs_of_a_row_are_the_same_bits_in_any_batch() -> None:
    logits = torch.stack([row(5000, n) for n in range(40)])
    whole = logprobs(logits)
    for n in (0, 17, 39):
        assert torch.equal(logprobs(logits[n : n + 1])[0], whole[n])
        assert torch.equal(logprobs(logits[n // 2 : n + 1])[-1], whole[n])
    told = describe(whole[0], 3, 2)
    assert (told.token, told.logprob) == (3, float(torch.log_softmax(logits[0], 0)[3]))
    assert [token for token, _ in told.top] == logits[0].argsort(descending=True)[:2].tolist()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "'temperature' is -1.0; input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "'temperature' is 'hot'"),
        ({"top_p": 0.0}, "'top_p' is 0.0; input should be greater than 0"),
        ({"top_k": -1}, "'top_k' is -1"),
        ({"seed": 2**64}, "'seed' is 18446744073709551616"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(Sampling, settings, "sampling")


# -- text


def bytes_to_text(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.text(st.sampled_from("aé中🙂\N{REPLACEMENT CHARACTER}"), max_size=12))
def test_characters_come_whole(text: str) -> None:
    stream = Detokenizer(bytes_to_text)
    pieces = [stream.add(token) for token in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    # No later than they are known: all but what a character's first bytes, or three unknown ones, may still be.
    for n, token in enumerate(text.encode()):
        if token < 128:
            assert pieces[n].endswith(chr(token))


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_are_shown_as_such(ids: list[int]) -> None:
    stream = Detokenizer(bytes_to_text)
    assert "".join(stream.add(token) for token in ids) + stream.finish() == bytes_to_text(ids)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox, übergröße 中文字 🙂🙃 naïve"] * 3, trainer)
    return tokenizer


@given(text=st.text(st.sampled_from("the quick fox ü中文🙂🙃é\n"), max_size=40), prompt=st.sampled_from(["", "the ", "中"]))
def test_the_pieces_are_the_text_of_a_real_tokenizer(bpe: Tokenizer, text: str, prompt: str) -> None:
    ids, before = bpe.encode(text).ids, bpe.encode(prompt).ids
    stream = Detokenizer(bpe.decode, before)
    assert "".join(stream.add(token) for token in ids) + stream.finish() == text


def test_a_tokenizer_that_drops_a_leading_blank() -> None:
    words = ["", " the", " fox", " ", "<end>"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids if i != 4).removeprefix(" ")

    stream = Detokenizer(decode, [1])
    ids = [2, 4, 1, 3, 2, 3, 3, 1]
    assert [stream.add(token) for token in ids] == [" fox", "", " the", " ", " fox", " ", " ", " the"]


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_a_text_stops_at_the_same_place_whatever_pieces_it_comes_in(text: str, stops: list[str], sizes: list[int]) -> None:
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    stream, shown, rest = StopStrings(tuple(stops)), "", text
    for size in [*sizes, *[1] * len(text)]:
        piece, stopped = stream.add(rest[:size])
        shown, rest = shown + piece, rest[size:]
        assert expected.startswith(shown), "shown, and then taken back"
        if stopped:
            break
    else:
        shown += stream.finish()
    assert shown == expected
    assert stopped == bool(ends) if text else True


def test_a_stop_string_across_tokens_and_characters() -> None:
    stream = TextStream(bytes_to_text, [], ("中!",))
    said = [stream.add(token) for token in "a中b中!".encode()]
    assert ("".join(text for text, _ in said), said[-1]) == ("a中b", ("", True))
    stream = TextStream(bytes_to_text, [], ("中!",))
    assert "".join(stream.add(token)[0] for token in "a中".encode()) == "a"
    assert stream.finish() == "中"
