"""Hugging Face folders, read in place: `config.json` and safetensors, shard by shard, every tensor accounted for."""

import json
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from recsys_moe.errors import UserError, nearest
from recsys_moe.experts import MLPExperts
from recsys_moe.llm import deepseek, llama, mixtral, olmoe, qwen_moe, routed, switch
from recsys_moe.llm.layers import Decoder, Joined, Tensors
from recsys_moe.tensorfiles import TensorFiles, save_tensors
from recsys_moe.typed import parse

# model_type in config.json → the configuration's class, and what builds the model from it.
FAMILIES: dict[str, tuple[type, Callable[[Any, torch.dtype], Decoder]]] = {
    "llama": (llama.LlamaConfig, llama.build),
    "mistral": (llama.LlamaConfig, llama.build),
    "mixtral": (mixtral.MixtralConfig, mixtral.build),
    "qwen2_moe": (qwen_moe.Qwen2MoeConfig, qwen_moe.build),
    "olmoe": (olmoe.OlmoeConfig, olmoe.build),
    "deepseek": (deepseek.DeepseekMoeConfig, deepseek.build_v1),
    "deepseek_v2": (deepseek.DeepseekV2Config, deepseek.build),
    "deepseek_v3": (deepseek.DeepseekV3Config, deepseek.build),
    "switch_decoder": (switch.SwitchConfig, switch.build),
    "routed_decoder": (routed.RoutedConfig, routed.build),
}

# The kernels know no fp16, and bf16 would drop three of its bits.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}
_READABLE = ("F32", "BF16", "F16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load(folder: str | Path, dtype: torch.dtype | None = None, int8_experts: bool = False) -> Decoder:
    """The model in a Hugging Face folder, ready for inference.

    Each weight is copied once from the mapped file to where it belongs: at most the weights and a piece of a shard are in
    memory.

    Args:
        dtype: fp32 or bf16; None: the checkpoint's own (fp32 for an fp16 one).
        int8_experts: round the experts of sparse layers to int8 (`MLPExperts.quantise`), a layer when it has been read.

    Raises:
        UserError: no such folder, a family that isn't known, weights in a pickle, a broken shard, a tensor that is missing,
            left over, of another shape or quantised; it names the file and the tensor. `int8_experts` of a dense model.
    """
    folder = Path(folder)
    values = read_config(folder)
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if dtype is None and name not in _DTYPES:
        raise UserError(f"{folder / 'config.json'}: 'dtype' is {name!r}; {nearest(str(name), _DTYPES)}")
    model = build(values, dtype or _DTYPES[name], folder / "config.json")
    if int8_experts and not any(_sparse_experts(block) for block in model.blocks):
        raise UserError(f"{folder}: a {values['model_type']} model has no sparse experts to keep as int8; leave the option out")
    fill(model, shards(folder), int8_experts)
    for module in model.modules():
        if isinstance(module, MLPExperts) and module.weight_scales is None:
            module.freeze()
    return model


@torch.no_grad()
def copy(source: Decoder, target: Decoder) -> None:
    """Give a model another's weights, rounded to its own precision."""
    given = source.tensors()
    for name, place in target.tensors().items():
        tensor = given[name]
        place.copy_(tensor if isinstance(tensor, Tensor) else tensor.whole())


def save(model: Decoder, values: dict[str, Any], folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as a Hugging Face folder, its weights in the model's precision.

    Args:
        values: its `config.json`.
        shard_bytes: how large a file of weights may get, unless one tensor is larger.

    Raises:
        OSError: a file can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.tensors().items():
        whole = tensor if isinstance(tensor, Tensor) else tensor.whole()
        if groups[-1] and size + whole.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = whole
        size += whole.nbytes
    count = len(groups)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_tensors(folder / file, group)
        weight_map |= dict.fromkeys(group, file)
    if count > 1:
        total = {"total_size": sum(tensor.nbytes for group in groups for tensor in group.values())}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": total, "weight_map": weight_map}, indent=1)
        )
    values = {**values, "dtype": str(model.config.dtype).removeprefix("torch.")}
    values.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """What the folder's `config.json` says."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one with config.json and *.safetensors")
    return read_json(folder / name)


def family(values: dict[str, Any], where: Path) -> str:
    """The model's family, as `config.json` names it.

    Raises:
        UserError: one that isn't known.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{where}: 'model_type' is {name!r}; {nearest(str(name), FAMILIES)}")
    return str(name)


def parse_config(values: dict[str, Any], where: Path) -> Any:
    """The family's own configuration from `config.json`, as old and new versions of transformers write it.

    Raises:
        UserError: an unknown family, a key that is missing, of the wrong type, or asks for what isn't built.
    """
    kind, _ = FAMILIES[family(values, where)]
    known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}  # type: ignore[attr-defined]
    known["rope_parameters"] = _rope(values, 1e6 if values["model_type"] == "mixtral" else 1e4)
    return parse(kind, known, str(where))


def build(values: dict[str, Any], dtype: torch.dtype, where: Path, weights: torch.dtype | None = None) -> Decoder:
    """The model that a `config.json` describes, in inference mode, its weights not filled yet.

    Args:
        dtype: of the products; of the weights too, unless `weights` says otherwise (training keeps them in fp32).
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"dtype is {dtype}; models run in float32 or bfloat16")
    config = parse_config(values, where)
    _, make = FAMILIES[values["model_type"]]
    try:
        with torch.device("meta"):
            model = make(config, dtype)
        _allocate(model, weights or dtype)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except (RuntimeError, MemoryError, OSError, OverflowError):  # what a size that is no size raises, or want of memory
        raise UserError(
            f"{where}: there is no memory for a model of these sizes; correct them or take a larger machine"
        ) from None
    if config.tie_word_embeddings:
        model.head.weight = model.embedding
    return model.requires_grad_(False).eval()


def shards(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of the index if there is one.

    Raises:
        UserError: there are none; pickled weights are refused, because reading a pickle can run any code.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise UserError(f"{index}: 'weight_map' is no table of tensors and files; download it again")
        if strange := [name for name in placed.values() if not isinstance(name, str) or Path(name).name != name]:
            raise UserError(f"{index}: {strange[0]!r} is not the plain name of a file in this folder")
        paths = [folder / name for name in sorted(set(placed.values()))]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise UserError(f"{folder}: the index names {lost[0]}, which is not there; complete the download")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        why = f"{pickles[0]} is a pickle, which can run any code and is never read" if pickles else "there are none"
        raise UserError(f"{folder}: weights must be in *.safetensors files; {why}")
    return paths


def fill(model: Decoder, paths: list[Path], int8_experts: bool = False) -> None:
    """Read every tensor of the model from the files; with `int8_experts`, round those of a block when it has been read.

    Raises:
        UserError: a name that is missing, in two files or not the model's; a shape or type that doesn't fit; a broken file.
    """
    _check_all(model, paths)
    files = TensorFiles(paths)
    _read(files, model.tensors_around())
    for i, block in enumerate(model.blocks):
        _read(files, model.tensors_of_block(i))
        if int8_experts and (experts := _sparse_experts(block)):
            experts.quantise()


def _sparse_experts(block: Any) -> MLPExperts | None:
    return getattr(block.ffn, "experts", None)


def _read(files: TensorFiles, tensors: Tensors) -> None:
    for name, target in tensors.items():
        if isinstance(target, Tensor):
            files.read_into(name, target)
        else:
            target.copy_(files[name])


def _check_all(model: Decoder, paths: list[Path]) -> None:
    wanted = model.tensors()
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                    if name in found:
                        raise UserError(f"{name!r} is in {found[name].name} and in {path.name}; keep one")
                    found[name] = path
                    if name in wanted:
                        _check(name, wanted[name], file.get_slice(name), path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); download or convert it again") from None
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{len(missing)} tensors are missing in {paths[0].parent}: {missing[0]!r} …; complete the checkpoint")
    files = TensorFiles(paths)
    if left := [name for name in found if name not in wanted and not _redundant(model, name, files)]:
        hint = nearest(left[0], wanted)
        raise UserError(f"{found[left[0]]}: {len(left)} tensors are not the model's: {left[0]!r} …; {hint}")


def _check(name: str, target: Tensor | Joined, stored: Any, path: Path) -> None:
    shape = list(target.shape)
    if stored.get_shape() != shape:
        raise UserError(f"{path}: {name!r} is {stored.get_shape()}, not {shape} as config.json asks")
    if stored.get_dtype() not in _READABLE:
        raise UserError(f"{path}: {name!r} is {stored.get_dtype()}; weights must be {', '.join(_READABLE)}: dequantise them")


def _redundant(model: Decoder, name: str, files: TensorFiles) -> bool:
    """Whether a tensor says again what the model knows: tied output weights, rotary frequencies; or is a part that config.json
    declares and that only speculative decoding uses (DeepSeek-V3's layers behind the last)."""
    if name == "lm_head.weight" and model.checkpoint.tie_word_embeddings:
        return torch.equal(files[name], files["model.embed_tokens.weight"])
    if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = getattr(model.checkpoint, "num_nextn_predict_layers", 0)
    last = model.checkpoint.num_hidden_layers
    return layer is not None and last <= int(layer[1]) < last + extra


_LARGE = 2**22


def _allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter memory that nothing has been written to yet; buffers keep their type (a bias for choice is fp32).

    It is in huge pages (2 MiB) where the system has them: a step reads all weights, and a core that looks up the address of
    every 4 KiB reads a third less. Small parameters lie side by side in one piece; a large one can be freed alone.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    places = [(m, name, p.shape) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    sizes = [shape.numel() * dtype.itemsize for _, _, shape in places]
    room = [-(-size // 64) * 64 for size in sizes]  # whole cache lines
    together = iter(_memory(sum(small := [size for size in room if size < _LARGE])).split(small))
    for (module, name, shape), size, taken in zip(places, sizes, room, strict=True):
        memory = next(together) if taken < _LARGE else _memory(taken)
        setattr(module, name, nn.Parameter(memory[:size].view(dtype).view(shape), requires_grad=False))


def _memory(size: int) -> Tensor:
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _rope(values: dict[str, Any], theta: float) -> dict[str, Any]:
    """The rotary part of `config.json`: `rope_parameters`, or before transformers 5 `rope_theta` and `rope_scaling`."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_theta", values.get("rope_theta") or theta)
    return rope


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values
