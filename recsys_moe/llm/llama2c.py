"""llama2.c's binary files (karpathy/llama2.c, version 0): a small dense Llama in fp32, and its tokenizer.

A model file is seven int32 (width, hidden width, layers, heads, key/value heads, vocabulary, positions; a negative vocabulary
means that the output layer has weights of its own) and the weights, each kind for all layers at once. Its rotary embedding
turns neighbours, Hugging Face's turns halves: the rows of the query and key weights are put in another order.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, processors
from torch import Tensor

from recsys_moe.errors import UserError
from recsys_moe.llm.layers import Decoder, Rope
from recsys_moe.llm.llama import LlamaConfig

_HEADER = struct.Struct("<7i")
_EPS = 1e-5


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model in a file: a `config.json` for it, and its tensors by their Hugging Face names (mapped, not read).

    Raises:
        UserError: it isn't such a file, or has another length than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    numbers = _HEADER.unpack(header) if len(header) == _HEADER.size else (0,) * 7
    width, hidden, layers, heads, kv_heads, vocab, positions = numbers
    tied, vocab = vocab > 0, abs(vocab)
    sane = min(width, hidden, layers, heads, kv_heads, vocab, positions) > 0 and max(numbers) < 2**24
    if not sane or width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(f"{path} is no llama2.c model: its header says {numbers}")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": _EPS,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    places = list(_places(values))
    expected = _HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in places)
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, but its header asks for {expected:,}: it is cut short or no llama2.c model"
        )
    data = torch.from_numpy(np.memmap(path, np.float32, "c", _HEADER.size))
    tensors, at = {}, 0
    for name, shape in places:
        count = int(np.prod(shape))
        part = data[at : at + count].view(shape)
        at += count
        if name is None:
            continue
        for layer, tensor in enumerate(part) if "{}" in name else [(0, part)]:
            tensors[name.format(layer)] = _halves(tensor, width // heads) if _turned(name) else tensor
    return values, tensors


def write(model: Decoder, path: str | Path) -> None:
    """Write a dense Llama as a llama2.c file.

    Raises:
        UserError: a model that the format can't say: another family, biases, heads of another width, a stretched rotary
            embedding, another epsilon.
    """
    config: Any = model.checkpoint
    fits = (
        isinstance(config, LlamaConfig)
        and config.rope_parameters == Rope()
        and not (config.attention_bias or config.mlp_bias or config.sliding_window)
        and config.head_dim in (None, config.hidden_size // config.num_attention_heads)
    )
    if not fits:
        raise UserError(f"llama2.c's format has no room for this {type(config).__name__}: only a plain dense Llama fits it")
    if config.rms_norm_eps != _EPS:
        raise UserError(f"rms_norm_eps is {config.rms_norm_eps}; llama2.c always takes {_EPS}")
    vocab = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    numbers = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, kv_heads)
    values = {name: getattr(config, name) for name in type(config).__dataclass_fields__} | {"num_key_value_heads": kv_heads}
    tensors, dim = model.tensors(), config.hidden_size // config.num_attention_heads
    with Path(path).open("wb") as file:
        file.write(_HEADER.pack(*numbers, vocab, config.max_position_embeddings))
        for name, shape in _places(values):
            if name is None:
                file.write(bytes(4 * int(np.prod(shape))))
                continue
            for layer in range(config.num_hidden_layers if "{}" in name else 1):
                tensor = tensors[name.format(layer)]
                assert isinstance(tensor, Tensor)
                wide = tensor.detach().float()
                file.write((_neighbours(wide, dim) if _turned(name) else wide).contiguous().numpy().tobytes())


def tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """llama2.c's tokenizer file (pieces and scores, as SentencePiece trained them) as one of `tokenizers`.

    Merging the pair whose piece has the best score is byte-pair encoding with the merges in the order of the scores.

    Raises:
        UserError: it isn't such a file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            if not 0 <= length <= len(data) - at - 8:
                raise ValueError(f"a piece of {length} bytes")
            pieces.append(data[at + 8 : at + 8 + length].decode())
            scores.append(score)
            at += 8 + length
    except (struct.error, ValueError) as error:
        raise UserError(f"{path} is no llama2.c tokenizer ({error} at byte {at})") from None
    if len(pieces) < 259:
        raise UserError(f"{path} is no llama2.c tokenizer: it has {len(pieces)} pieces, fewer than bytes and control tokens")
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranked = sorted(range(259, len(pieces)), key=lambda i: -scores[i])
    halves = [(pieces[i][:cut], pieces[i][cut:]) for i in ranked for cut in range(1, len(pieces[i]))]
    merges = [(left, right) for left, right in halves if left in ids and right in ids]
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    return made


def _places(values: dict[str, Any]) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """The file's tensors in order: Hugging Face's name ({} a layer's number; None: what is computed anew), and shape."""
    width, hidden, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    vocab, positions, dim = values["vocab_size"], values["max_position_embeddings"], width // values["num_attention_heads"]
    kv = values["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (vocab, width)
    yield "model.layers.{}.input_layernorm.weight", (layers, width)
    yield "model.layers.{}.self_attn.q_proj.weight", (layers, width, width)
    yield "model.layers.{}.self_attn.k_proj.weight", (layers, kv, width)
    yield "model.layers.{}.self_attn.v_proj.weight", (layers, kv, width)
    yield "model.layers.{}.self_attn.o_proj.weight", (layers, width, width)
    yield "model.layers.{}.post_attention_layernorm.weight", (layers, width)
    yield "model.layers.{}.mlp.gate_proj.weight", (layers, hidden, width)
    yield "model.layers.{}.mlp.down_proj.weight", (layers, width, hidden)
    yield "model.layers.{}.mlp.up_proj.weight", (layers, hidden, width)
    yield "model.norm.weight", (width,)
    yield None, (positions, dim)  # cosines and sines
    if not values["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def _turned(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def _halves(weight: Tensor, dim: int) -> Tensor:
    """Rows of neighbours (0, 1), (2, 3) … of each head as Hugging Face has them: first all first ones."""
    return weight.view(-1, dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _neighbours(weight: Tensor, dim: int) -> Tensor:
    return weight.reshape(-1, 2, dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
