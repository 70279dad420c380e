"""The engine on a small real model: what a request gets is the same bits whatever else is served, and however it is cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_moe.errors import UserError
from recsys_moe.llm.checkpoints import build
from recsys_moe.llm.engine.engine import Completion, Engine, Request, Ticket, Update, blocks_that_fit, complete
from recsys_moe.llm.engine.sampling import Sampling
from recsys_moe.llm.engine.scheduler import Limits, QueueFull
from tests.tiny_lm import ByteTokenizer, TinyLM

TOKENIZER = ByteTokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. "


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other most of the time, on tensors as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine(model: Any = None, *, blocks: int = 200, running: int = 16, step_tokens: int = 64) -> Engine:
    limits = Limits(max_running=running, max_waiting=40, step_tokens=step_tokens)
    return Engine(model or TinyLM(), TOKENIZER.decode, TOKENIZER.eos_ids, blocks, limits)


def request(text: str, max_tokens: int = 20, **more: Any) -> Request:
    return Request(tuple(TOKENIZER.encode(text)), max_tokens, **{"logprobs": 3, "ignore_eos": True} | more)


GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.3, top_k=50, top_p=0.95, min_p=0.01, seed=7)
VICTIMS = {
    "sampled": request(TEXT[:45], sampling=WARM),
    "scored": request(TEXT[:45], sampling=WARM, score_prompt=True),
    "long": request(TEXT * 2, sampling=Sampling(seed=3)),
    "short": request("T", 30, sampling=GREEDY),
}
CROWD = [request(TEXT[n : 20 + 9 * n], 5 + 3 * n, sampling=Sampling(seed=n)) for n in range(5)]


def check_all_ways(model: Any, victim: Request) -> None:
    """Alone and whole; in chunks; in batches; joining in mid-flight; from a cached prefix; put back and computed again."""
    (alone,) = complete(engine(model, step_tokens=400), [victim])
    assert len(alone.tokens) == victim.max_tokens
    for step_tokens in (17, 30):  # neither of them a number of blocks
        (chunked,) = complete(engine(model, step_tokens=step_tokens), [victim])
        assert chunked == alone, "chunked"
    for at in (0, 3):
        batched = complete(engine(model), [*CROWD[:at], victim, *CROWD[at:]])[at]
        assert batched == alone, "batched"
    copies = complete(engine(model), [victim] * 3)
    assert copies == [alone] * 3, "beside itself"
    warm = engine(model)
    complete(warm, [victim, *CROWD])
    cached = warm.counts.cached_tokens
    assert complete(warm, [*CROWD[:2], victim])[2] == alone, "from a cached prefix"
    assert warm.counts.cached_tokens > cached
    busy = engine(model)
    for n, other in enumerate(CROWD):
        busy.submit(other, lambda update: None)
        busy.step()
        if n == 2:
            joined = Completion()
            busy.submit(victim, joined.add)
    while busy.step():
        pass
    assert joined == alone, "joined in mid-flight"
    older = request("x" * 18, 60)
    preempted = 0
    least = max(busy.scheduler.peak(len(r.prompt) + r.max_tokens) for r in (older, victim))
    for blocks in range(least, least + 3):
        tight = engine(model, blocks=blocks, step_tokens=17)
        tight.submit(older, lambda update: None)
        for _ in range(12):
            tight.step()
        assert complete(tight, [victim]) == [alone], "put back"
        preempted += tight.scheduler.preemptions
    assert preempted > 0


@pytest.mark.parametrize("name", VICTIMS)
def test_a_request_is_the_same_bits_alone_and_in_every_company(name: str) -> None:
    check_all_ways(TinyLM(), VICTIMS[name])


def test_so_it_is_with_a_sliding_window() -> None:
    check_all_ways(TinyLM(window=20), VICTIMS["scored"])


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    "deepseek_v2": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
}


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.float32), ("deepseek_v2", torch.bfloat16)], ids=str)
def test_so_it_is_with_real_families(family: str, dtype: torch.dtype) -> None:
    shape = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if family == "deepseek_v2" else 2}
    model = build({"model_type": family} | shape | heads | FAMILIES[family], dtype, Path("config.json"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    check_all_ways(model, VICTIMS["scored"])


def test_negative_control_a_product_that_depends_on_the_rows() -> None:
    with pytest.raises(AssertionError, match=r"chunked|batched|beside"):
        check_all_ways(TinyLM(plain_linear=True), VICTIMS["scored"])


def test_negative_control_draws_from_a_stream_that_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_next(logits_v: Any, sampling: Sampling, number: int) -> int:
        return int(torch.multinomial(torch.softmax(torch.from_numpy(logits_v), 0), 1, generator=generator))

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr("recsys_moe.llm.engine.sampling.draw", draw_next)
    with pytest.raises(AssertionError, match=r"chunked|batched|beside"):
        check_all_ways(TinyLM(), VICTIMS["sampled"])


def test_negative_control_a_cache_that_is_not_read() -> None:
    """The model does look at what came before: else all of the above would prove nothing of the cache."""
    model, other = TinyLM(), engine()
    one, two = complete(other, [request("a" + TEXT[:40], sampling=GREEDY), request("b" + TEXT[:40], sampling=GREEDY)])
    assert one.logprobs[-1] != two.logprobs[-1]
    broken = engine(model)
    found = Completion()
    broken.submit(request(TEXT[:45], sampling=GREEDY), found.add)
    while broken.step():
        for layer in broken.cache.layers:
            layer[broken.scheduler.running[0].blocks[0] if broken.scheduler.running else 0].zero_()
    assert found != complete(engine(model), [request(TEXT[:45], sampling=GREEDY)])[0]


def test_a_router_that_looks_at_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"ExpertChoiceRouter.* serving needs a router with batch_invariant"):
        engine(TinyLM(expert_choice=True))


# -- what a request gets


def test_tokens_are_those_of_the_model_run_plainly() -> None:
    """Greedy generation by hand: the whole sequence through the model, the largest logit, again."""
    model = TinyLM()
    (found,) = complete(engine(model), [request(TEXT[:20], 6, sampling=GREEDY)])
    tokens = TOKENIZER.encode(TEXT[:20])
    for token, told in zip(found.tokens, found.logprobs, strict=True):
        (scored,) = complete(engine(model), [Request((*tokens, token), 0, logprobs=2, score_prompt=True)])
        assert (scored.tokens, scored.finish, len(scored.prompt_logprobs)) == ([], "length", len(tokens))
        assert scored.prompt_logprobs[-1] == (told.token, told.logprob, told.top[:2])
        assert told.top[0] == (token, told.logprob)
        tokens.append(token)


def test_a_text_ends_at_its_end_token_or_not() -> None:
    class Ends(TinyLM):
        def forward(self, batch: Any, cache: Any) -> torch.Tensor:
            logits = super().forward(batch, cache)
            logits[batch.positions[batch.outputs] == 24, 256] = 1e3
            return logits

    model = Ends()
    ended, on = complete(engine(model), [request(TEXT[:20], ignore_eos=e, sampling=GREEDY) for e in (False, True)])
    assert (len(ended.tokens), ended.tokens[-1], ended.finish) == (6, 256, "stop")
    assert (len(on.tokens), on.tokens[:6], on.finish) == (20, ended.tokens, "length")


def test_stop_strings_end_the_text_and_are_not_shown() -> None:
    (plain,) = complete(engine(), [request(TEXT[:20], 60, sampling=Sampling(seed=1))])
    assert len(plain.text) > 30
    stop = plain.text[20:24]
    at = plain.text.find(stop)
    (found,) = complete(engine(), [request(TEXT[:20], 60, sampling=Sampling(seed=1), stop=("never so", stop))])
    assert (found.text, found.finish) == (plain.text[:at], "stop")
    assert found.tokens == plain.tokens[: len(found.tokens)]


def test_logprobs_are_there_only_where_they_are_asked_for() -> None:
    plain, scored = complete(engine(), [request("ab", 2, logprobs=None), request("ab", 2, logprobs=None, score_prompt=True)])
    assert (plain.logprobs, plain.prompt_logprobs) == ([], [])
    assert ([(t.token, t.top) for t in scored.prompt_logprobs], scored.logprobs) == ([(98, ())], [])


# -- who comes and goes


def test_a_request_that_is_cancelled_frees_its_blocks_at_once() -> None:
    for salt, step_tokens in ((b"", 64), (b"", 17), (b"x", 64)):
        one = engine(step_tokens=step_tokens)
        tickets = [one.submit(request(TEXT[n:], salt=salt), lambda update: None) for n in range(3)]
        for _ in range(3):
            one.step()
        assert one.scheduler.pool.free < 200
        for ticket in tickets:
            one.cancel(ticket)
        one.cancel(tickets[0])  # again, which does nothing
        assert one.scheduler.pool.free == 200
        assert not one.step()


def test_a_request_is_cancelled_while_the_model_runs() -> None:
    """Nothing more is told of it, and its company does not notice."""

    class Leaves(TinyLM):
        def forward(self, batch: Any, cache: Any) -> torch.Tensor:
            logits = super().forward(batch, cache)
            if one.counts.steps == 6:
                one.cancel(ticket)
                told.clear()
            return logits

    told: list[Update] = []
    one = engine(Leaves())
    ticket = one.submit(request(TEXT), told.append)
    assert complete(one, [VICTIMS["sampled"]]) == complete(engine(), [VICTIMS["sampled"]])
    assert (told, one.scheduler.pool.free) == ([], 200)


def test_a_listener_may_cancel() -> None:
    one = engine()
    told: list[Update] = []

    def enough(update: Update) -> None:
        told.append(update)
        if len(told) == 3:
            one.cancel(ticket)

    ticket: Ticket = one.submit(request(TEXT), enough)
    while one.step():
        pass
    assert (len(told), one.scheduler.pool.free) == (3, 200)


def test_tenants_share_no_prefix() -> None:
    one = engine()
    answers = []
    cached = []
    for salt in (b"a", b"a", b"b"):
        answers += complete(one, [request(TEXT, salt=salt, sampling=GREEDY)])
        cached.append(one.counts.cached_tokens)
    assert cached == [0, 80, 80]
    assert answers[0] == answers[1] == answers[2]


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(TinyLM):
        def forward(self, batch: Any, cache: Any) -> torch.Tensor:
            if 1 in batch.tokens[batch.positions == 0]:
                raise RuntimeError("out of order")
            logits = super().forward(batch, cache)
            logits[((batch.tokens == 2) & (batch.positions == 0))[batch.outputs]] = torch.nan
            return logits

    one = engine(Fails())
    found = complete(one, [request("\x01"), request("fine")])
    assert [c.finish for c in found] == ["error", "error"]
    assert "out of order" in caplog.text
    found = complete(one, [request("\x02"), request("fine", sampling=GREEDY)])
    assert [c.finish for c in found] == ["error", "length"]
    assert found[1] == complete(engine(), [request("fine", sampling=GREEDY)])[0]
    assert one.scheduler.pool.free == 200


def test_what_cannot_be_served_is_refused() -> None:
    one = engine(running=1)
    for bad, sentence in [
        (Request((), 1), "the prompt has no tokens"),
        (Request((3, 257), 1), "the prompt has token 257, but the model knows 0 … 256"),
        (Request((3,) * 399, 2), "the model's context is 400 tokens, but the prompt has 399 and max_tokens is 2"),
    ]:
        with pytest.raises(UserError, match=sentence):
            one.submit(bad, print)
    with pytest.raises(UserError, match="blocks of the KV cache, which has 3; ask for fewer"):
        engine(blocks=3).submit(request(TEXT), print)
    for _ in range(40):
        one.submit(request("a"), lambda update: None)
    with pytest.raises(QueueFull):
        one.submit(request("a"), print)


def test_memory_becomes_blocks() -> None:
    assert blocks_that_fit(TinyLM(), 1) == 2**20 // (4 * 128 * 16)
    with pytest.raises(UserError, match=r"a KV cache of 0.001 MiB holds not one block of 0.00781 MiB"):
        blocks_that_fit(TinyLM(), 0.001)


def test_expert_load_is_told_of_many_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_moe.llm.engine.load.RELEASE", 120)
    one = engine()
    complete(one, [request(TEXT[:60], 20)])
    assert one.load.counts == {}
    complete(one, [request(TEXT[:60], 60, salt=b"other")])
    told = one.load.counts
    assert sorted(told) == ["routers.0", "routers.1"]
    for counts in told.values():
        assert counts.shape == (4,)
        assert 240 <= int(counts.sum()) <= 2 * (60 + 60 + 20 + 60)  # two experts a token
