"""Text in and out: llama2.c's model and tokenizer, Hugging Face's, the plain loop, and the commands."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from recsys_moe.errors import UserError
from recsys_moe.llm import llama2c, tokenizer
from recsys_moe.llm.checkpoints import load
from recsys_moe.llm.convert import convert
from recsys_moe.llm.estimate import estimate
from recsys_moe.llm.generate import generate, logprobs, sampler

Cli = Callable[..., subprocess.CompletedProcess[str]]
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}


@pytest.fixture
def stories(real_llm: Path, tmp_path: Path) -> Path:
    """stories260K as a Hugging Face folder."""
    convert(real_llm / "stories260K.bin", tmp_path / "stories", real_llm / "tok512.bin")
    return tmp_path / "stories"


@pytest.fixture
def real_llm(real_data: Callable[[str], Path]) -> Path:
    return real_data("llm")


def test_stories260k_goes_on_word_for_word(real_llm: Path, stories: Path) -> None:
    said = json.loads((real_llm / "stories260K.greedy.json").read_text())
    words, model = tokenizer.load(stories), load(stories)
    prompt = words.encode(said["prompt"])
    # llama2.c counts positions: the first token, which begins the text, is none of its steps.
    made = list(generate(model, prompt, said["steps"] + 1 - len(prompt), words.eos_ids))
    assert words.decode(prompt + made) == said["text"]


def test_llama2c_files_survive_the_way_there_and_back(real_llm: Path, stories: Path, tmp_path: Path) -> None:
    convert(stories, tmp_path / "again.bin")
    first, second = (real_llm / "stories260K.bin").read_bytes(), (tmp_path / "again.bin").read_bytes()
    assert len(first) == len(second)
    (_, a), (_, b) = llama2c.read(real_llm / "stories260K.bin"), llama2c.read(tmp_path / "again.bin")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_no_llama2c_file_is_refused(real_llm: Path, tmp_path: Path) -> None:
    whole = (real_llm / "stories260K.bin").read_bytes()
    path = tmp_path / "model.bin"
    for broken, says in ((whole[:-4], "cut short"), (whole[:10], "no llama2.c model"), (b"\xff" * 400, "no llama2.c model")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=says):
            llama2c.read(path)
    path.write_bytes((real_llm / "tok512.bin").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"no llama2\.c tokenizer"):
        llama2c.tokenizer(path)


def test_the_tokenizer_says_any_text_again(real_llm: Path) -> None:
    words = tokenizer.Tokenizer(llama2c.tokenizer(real_llm / "tok512.bin"))
    for text in ("Once upon a time", "  two  spaces ", "naïve 東京 \U0001f600", ""):
        assert words.decode(words.encode(text)) == text
    # run.c's own tokens of its prompt
    assert words.encode("Once upon a time") == [1, 403, 407, 261, 378]


def byte_tokenizer(folder: Path, template: str | None) -> None:
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    settings = {"bos_token": {"content": "<b>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_chats_follow_the_template_in_a_sandbox(tmp_path: Path) -> None:
    byte_tokenizer(
        tmp_path,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    words = tokenizer.load(tmp_path)
    assert words.eos_ids == (7, 9)
    assert words.decode(words.chat([{"role": "user", "content": "hé"}])) == "<b>[user]hé[assistant]"
    with pytest.raises(UserError, match="no system"):
        words.chat([{"role": "system", "content": "x"}])
    byte_tokenizer(tmp_path, "{{ ().__class__.__bases__[0].__subclasses__() }}")
    with pytest.raises(UserError, match="refuses these messages"):
        tokenizer.load(tmp_path).chat([])
    for fails in ("{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[0].content.x.y }}"):
        byte_tokenizer(tmp_path, fails)
        with pytest.raises(UserError, match="refuses these messages"):
            tokenizer.load(tmp_path).chat([{"role": "user", "content": "x"}])
    # What transformers' templates may use beside plain Jinja.
    byte_tokenizer(tmp_path, "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ strftime_now('%Y')[:2] }}")
    words = tokenizer.load(tmp_path)
    assert words.decode(words.chat([{"role": "user", "content": "<é>"}] * 2)) == '{"role": "user", "content": "<é>"}20'
    byte_tokenizer(tmp_path, "{% for %}")
    with pytest.raises(UserError, match="can't be read"):
        tokenizer.load(tmp_path)
    byte_tokenizer(tmp_path, None)
    words = tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        words.chat([])
    with pytest.raises(UserError, match=r"not valid UTF-8 \(at character 3\)"):
        words.encode("ab\udcff")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for end in ('"</s>"', '["</s>"]', "true"):
        (tmp_path / "config.json").write_text(f'{{"eos_token_id": {end}}}')
        with pytest.raises(UserError, match="'eos_token_id' is"):
            tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        tokenizer.load(tmp_path)


def test_logprobs_are_those_of_a_whole_pass(stories: Path) -> None:
    model = load(stories)
    ids = [1, *range(30, 90)]
    found = logprobs(model, ids)
    greedy_token = next(generate(model, ids, 1))
    assert len(found) == 60
    assert max(found) < 0
    assert logprobs(model, [*ids, greedy_token])[:-1] == found  # the same bits, whatever comes later
    with pytest.raises(UserError, match="token 512 is not in 0 … 511"):
        logprobs(model, [1, 512])
    with pytest.raises(UserError, match="at least 2"):
        logprobs(model, [1])
    with pytest.raises(UserError, match="512 positions"):
        logprobs(model, [1] * 514)


def test_draws_follow_the_temperature_and_the_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    assert sampler(0, 1)(logits) == 2
    assert sampler(1e-320, 1)(logits) == 2  # a logit divided by it is no number
    pick = sampler(2.0, 5)
    drawn = torch.tensor([pick(logits) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(share, torch.softmax(logits / 2, -1), atol=0.03, rtol=0)
    first, second = sampler(2.0, 7), sampler(2.0, 7)
    assert [first(logits) for _ in range(20)] == [second(logits) for _ in range(20)]


def test_mixtral_8x7b_and_deepseek_v2_lite_are_as_large_as_published() -> None:
    mixtral = estimate(MIXTRAL_8X7B, Path("config.json"), 4096)
    assert (round(mixtral.parameters / 1e9, 1), round(mixtral.active / 1e9, 1)) == (46.7, 12.9)
    assert mixtral.weight_bytes["bfloat16"] == 2 * mixtral.parameters
    assert mixtral.kv_bytes_per_token["bfloat16"] == 2 * 2 * 32 * 8 * 128
    # All but the table of embeddings, once, and 4096 keys and values for each of 32 heads in 32 layers.
    assert mixtral.flops == 2 * (mixtral.active - 32000 * 4096) + 2 * 4096 * 2 * 32 * 128 * 32
    deepseek = estimate(DEEPSEEK_V2_LITE, Path("config.json"))
    assert (round(deepseek.parameters / 1e9, 1), round(deepseek.active / 1e9, 1)) == (15.7, 2.7)
    assert deepseek.kv_bytes_per_token["bfloat16"] == 2 * 27 * (512 + 64)


def test_the_commands(real_llm: Path, tmp_path: Path, cli: Cli) -> None:
    def ran(*arguments: str) -> Any:
        done = cli("llm", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    binary, words = str(real_llm / "stories260K.bin"), str(real_llm / "tok512.bin")
    assert json.loads(ran("convert", binary, "stories", "--tokenizer", words, "--json"))["parameters"] == 260032
    assert ran("generate", "stories", "Once upon a time", "--max-tokens", "11") == (
        "Once upon a time, there was a little girl named Lily.\n"
    )
    scores = json.loads(ran("logprobs", "stories", "--tokens", "1,403,407,261", "--json"))["logprobs"]
    assert len(scores) == 3
    (tmp_path / "story.txt").write_text("Once upon a time, there was a little girl named Lily.")
    told = json.loads(ran("logprobs", "stories", "--file", "story.txt", "--json"))
    assert told["perplexity"] < 2
    (tmp_path / "empty.txt").write_text("")
    refused = cli("llm", "logprobs", "stories", "--file", "empty.txt", cwd=tmp_path)
    assert (refused.returncode, "empty.txt is 1 token, and the first of a text isn't scored" in refused.stderr) == (2, True)
    made = json.loads(ran("generate", "stories", "--tokens", "1,403", "--max-tokens", "3", "--json"))
    assert len(made["tokens"]) == 3
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    assert "46.7 B parameters, 12.9 B active" in ran("estimate", "config.json")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "nowhere", "x"), "no tokenizer.json"),
        (("generate", "nowhere", "--tokens", "1,x"), "give whole numbers"),
        (("generate", "nowhere"), "one of them"),
        (("generate", "nowhere", "x", "--seed", "9" * 30), "'--seed'"),
        (("logprobs", "nowhere", "--tokens", "1,2"), "not a folder"),
        (("estimate", "nowhere/config.json"), "not a folder"),
        (("convert", "nowhere", "there"), "not a folder"),
    ],
)
def test_mistakes_are_one_sentence(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = cli("llm", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
