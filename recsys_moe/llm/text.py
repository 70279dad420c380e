"""Text for training: files → documents → a tokenizer (bytes, or byte-pair encoding trained on them) → token numbers on disk.

tokens/train.npy, tokens/validation.npy   uint16 or uint32
tokens/tokenizer.json, …                  what the trained model's folder gets
tokens/text.json                          `TextManifest`
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from recsys_moe.errors import UserError
from recsys_moe.llm.convert import copy_beside
from recsys_moe.llm.tokenizer import eos_ids, load
from recsys_moe.shards import write_json
from recsys_moe.typed import dump, parse, typed

END = "<|endoftext|>"
"""The token between documents, and the line that parts them within a file."""

Progress = Callable[[str, int, int], None]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@typed
class TextConfig:
    """Text to train on.

    `source` is a UTF-8 text file or a folder of `*.txt`; a line `<|endoftext|>` parts documents within a file. `tokenizer` is
    `byte` (256 bytes and the end of a text), `bpe` (byte-pair encoding over bytes, trained on the training part until it has
    `vocab_size` tokens) or `start` (that of the checkpoint which training starts from). The last share `validation` of the
    characters is the validation part.
    """

    source: str
    name: str = "text"
    tokenizer: Literal["byte", "bpe", "start"] = "byte"
    vocab_size: Annotated[int, Field(ge=257)] = 1024
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.05


@typed
class TextManifest:
    """What was made of a text: counts by part (`train`, `validation`), and the tokenizer's sizes."""

    name: str
    source: str
    digest: str
    tokens: dict[str, int]
    bytes: dict[str, int]
    vocab_size: int
    eos_id: int | None


def read_documents(source: str) -> list[str]:
    """The documents of a text file, or of all `*.txt` of a folder in the order of their names.

    Raises:
        UserError: nothing there, a file that is not UTF-8 or can't be read, or no text at all.
    """
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.source {source!r} is a folder without *.txt files; name one with text, or a file")
    documents: list[str] = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 (byte {error.start}); convert it first, by `iconv -t UTF-8` say") from None
        except OSError as error:
            raise UserError(f"data.source {str(file)!r} can't be read ({error.strerror}); name a text file") from None
        documents += [part.strip("\n") for part in text.split(f"{END}\n")]
    documents = [document.removesuffix(END).strip("\n") for document in documents]
    documents = [document for document in documents if document]
    if not documents:
        raise UserError(f"data.source {source!r} has no text in it; name a file that has some")
    return documents


def split_documents(documents: list[str], validation: float) -> tuple[list[str], list[str]]:
    """Training and validation documents; the one on the border is cut.

    >>> split_documents(["abcd", "efgh"], 0.25)
    (['abcd', 'ef'], ['gh'])
    """
    left = round(sum(map(len, documents)) * (1 - validation))
    train: list[str] = []
    for number, document in enumerate(documents):
        if left <= len(document):
            train.append(document[:left])
            rest = [document[left:], *documents[number + 1 :]]
            return [text for text in train if text], [text for text in rest if text]
        train.append(document)
        left -= len(document)
    return train, []


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte, its number that byte's, and `<|endoftext|>` (256) in front of each text.

    >>> byte_tokenizer().encode("né").ids
    [256, 110, 195, 169]
    """
    return _tokenizer({letter: byte for byte, letter in enumerate(_alphabet())})


def bpe_tokenizer(documents: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) over bytes, words and spaces apart as GPT-2 has them, trained on documents.

    >>> bpe_tokenizer(["low lower lowest"], 260).encode("low").tokens[1:]
    ['low']
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    inner = json.loads(trained.to_str())["model"]
    return _tokenizer(inner["vocab"], [(left, right) for left, right in inner["merges"]])


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]] | None = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(vocab, merges or []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([END])
    made.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, made.token_to_id(END))])
    return made


def _alphabet() -> list[str]:
    """The letters by which byte-level tokenizers write the bytes 0 … 255: what prints is itself, the others follow from 256."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def prepare_text(
    config: TextConfig,
    folder: Path,
    start: Path | None,
    progress: Progress = lambda phase, done, total: None,
) -> tuple[Path, TextManifest]:
    """The tokens of a text below `folder`, as they were made before or made now.

    Args:
        start: the checkpoint whose tokenizer `config.tokenizer` asks for by `start`.

    Raises:
        UserError: see `read_documents`; a tokenizer of `start` without a start; a part without text.
    """
    if config.tokenizer == "start" and start is None:
        raise UserError("data.tokenizer is 'start', but training starts from nothing; give start=FOLDER, or use byte or bpe")
    if config.tokenizer != "start" and start is not None:
        raise UserError(
            f"data.tokenizer is {config.tokenizer!r}, but training starts from {str(start)!r}, whose tokens have meanings "
            "already; use data.tokenizer=start"
        )
    documents = read_documents(config.source)
    digest = _digest(config, documents, start)
    target = folder / digest
    if not (target / "text.json").exists():
        temporary = folder / f"{digest}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(config, documents, digest, temporary, start, progress)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    return target, open_text(target)


def open_text(folder: Path) -> TextManifest:
    """The manifest of a folder that `prepare_text` made."""
    manifest: TextManifest = parse(TextManifest, json.loads((folder / "text.json").read_text()), str(folder / "text.json"))
    return manifest


def _write(config: TextConfig, documents: list[str], digest: str, folder: Path, start: Path | None, progress: Progress) -> None:
    train, validation = split_documents(documents, config.validation)
    if not train or not validation:
        part = "validation" if train else "training"
        raise UserError(f"data.validation is {config.validation}, which leaves the {part} part no text; give more text")
    if start is not None:
        copy_beside(start, folder)
        ends = eos_ids(start)
    else:
        made = byte_tokenizer() if config.tokenizer == "byte" else bpe_tokenizer(train, config.vocab_size)
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
        write_json(folder / "tokenizer_config.json", settings)
        end = made.token_to_id(END)
        assert end is not None
        ends = (end,)
    tokenizer = load(folder)
    counts: dict[str, int] = {}
    for part, texts in (("train", train), ("validation", validation)):
        tokens = np.fromiter(_tokens(tokenizer, texts, part, progress), np.uint32)
        counts[part] = len(tokens)
        np.save(folder / f"{part}.npy", tokens.astype(np.uint16) if tokenizer.vocab_size <= 2**16 else tokens)
    sizes = {"train": sum(len(text.encode()) for text in train), "validation": sum(len(text.encode()) for text in validation)}
    manifest = TextManifest(config.name, config.source, digest, counts, sizes, tokenizer.vocab_size, ends[0] if ends else None)
    write_json(folder / "text.json", dump(manifest))


def _tokens(tokenizer: Any, texts: list[str], part: str, progress: Progress) -> Iterator[int]:
    for number, text in enumerate(texts):
        if number % 100 == 0:
            progress(f"tokens {part}", number, len(texts))
        yield from tokenizer.encode(text)
    progress(f"tokens {part}", len(texts), len(texts))


def _digest(config: TextConfig, documents: list[str], start: Path | None) -> str:
    """What the tokens depend on, as a name."""
    settings = dump(config)
    settings.pop("source")
    if config.tokenizer != "bpe":
        settings.pop("vocab_size")
    if start is not None:
        tokenizer = start / "tokenizer.json"
        settings["start"] = tokenizer.read_text() if tokenizer.is_file() else ""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for document in documents:
        found.update(document.encode() + b"\0")
    return found.hexdigest()[:32]


class Windows:
    """Token numbers as windows of `length` tokens and the one after each: int64 `[B, length + 1]`.

    Raises:
        UserError: there is not even one.
    """

    def __init__(self, folder: Path, part: str, length: int) -> None:
        self._tokens: Tokens = np.load(folder / f"{part}.npy", mmap_mode="r")
        self._length = length
        if len(self._tokens) <= length:
            raise UserError(
                f"the {part} part has {len(self._tokens):,} tokens, fewer than train.context + 1 = {length + 1:,}; give more "
                "text, or a smaller train.context"
            )

    def random(self, seed: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
        """`count` windows, drawn anywhere with replacement, the same ones for the same seed."""
        starts = np.random.default_rng(seed).integers(0, len(self._tokens) - self._length, count)
        return self._at(starts)

    def __len__(self) -> int:
        """How many windows lie one after the other."""
        return (len(self._tokens) - 1) // self._length

    def ordered(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Those of the numbers `first` … `last` − 1."""
        return self._at(np.arange(first, last) * self._length)

    def _at(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._tokens[starts[:, None] + np.arange(self._length + 1)].astype(np.int64)
