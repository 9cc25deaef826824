"""Loads and saves weights: safetensors files, and torch files with ``weights_only=True``, also of the Hugging Face hub.

Damage is detected by the checksums of torch's zip archives. Safetensors has none, so the files of :func:`save_weights`
contain one in their metadata.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd_fast.config import expand, reading
from dfkd_fast.files import atomic_write, zip_damage
from dfkd_fast.graph.tracing import first_line, require_finite, unwrap, weights_of

__all__ = [
    "WeightsDescription",
    "WeightsFormatError",
    "WeightsMismatch",
    "WeightsReport",
    "load_weights",
    "read_description",
    "read_metadata",
    "read_tensors",
    "resolve",
    "save_weights",
    "write_tensors",
]

# Keys under which checkpoints store weights, and prefixes that DataParallel and torch.compile add to names.
# Weights averaged during training (EMA) are used if a file has no others.
_NESTED = (
    *("state_dict", "model_state_dict", "model", "net", "network"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "module", "weights"),
)
_WRAPPERS = ("module", "_orig_mod")
_PREFIXES = ("model.", "net.", "network.", "backbone.", "ema_model.")
# Counters of BatchNorm, AveragedModel and FLOP counters, which a network may lack.
_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
_LISTED = 10
_HUB = re.compile(r"hf:(?P<repo>[^/@\s]+/[^/@\s]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")
_HUB_FILES = ("student.safetensors", "model.safetensors")  # if the name gives no file; the second one is timm's
# Name of the checksum in the metadata: the SHA-256 of the file in which the checksum is _NO_CHECKSUM.
_CHECKSUM = "dfkd_fast.checksum"
_SHA256 = "sha256 of this file with zeros here: "
_NO_CHECKSUM = _SHA256 + 64 * "0"


class WeightsFormatError(ValueError):
    """A file is truncated, has an unknown format, or contains pickled objects."""


class WeightsMismatch(ValueError):
    """Weights do not fit the network.

    Attributes:
        missing: names that are only in the network.
        unexpected: names that are only in the file.
        mismatched: name, shape in the file and shape in the network of each tensor whose shapes differ.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...],
        unexpected: tuple[str, ...],
        mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """The result of :func:`load_weights`.

    Attributes:
        path: the file.
        loaded: names of the tensors that were loaded.
        skipped: names of the tensors in the modules of ``skip``; they did not change.
        absent_counters: BatchNorm counters (``num_batches_tracked``) that the file does not contain and that did not
            change.
        ignored: other counters in the file that the network does not have.
        metadata: the file's metadata; empty for torch files.
    """

    path: Path
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    absent_counters: tuple[str, ...]
    ignored: tuple[str, ...]
    metadata: dict[str, str]


def _is_safetensors(path: Path) -> bool:
    """Checks the content: eight bytes of header length, then a JSON header."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def resolve(path: str | Path) -> Path:
    """Return the local path of a weights file. A file of the Hugging Face hub is downloaded unless it is in the cache.

    Args:
        path: a path, or ``hf:OWNER/NAME[/FILE][@REVISION]``. The default files are ``student.safetensors`` and
            ``model.safetensors``.

    Raises:
        FileNotFoundError: the hub has no such repository, revision or file, or it is private or gated.
        OSError: the hub cannot be reached, and the file is not in the cache.
        ValueError: the name is not of this form, or the path cannot be expanded.
    """
    return _download(str(path)) if str(path).startswith("hf:") else expand(path)


@functools.cache  # a process reads one revision of a file, and asks the hub once
def _download(name: str) -> Path:
    found = _HUB.fullmatch(name)
    if found is None:
        raise ValueError(f"a file of the Hugging Face hub is hf:OWNER/NAME[/FILE][@REVISION], got {name!r}")
    from huggingface_hub import errors, get_token, hf_hub_download

    repo, revision = found["repo"], found["revision"]
    login = "your token has no access" if get_token() else "log in with `hf auth login` or set HF_TOKEN"
    files = (found["file"],) if found["file"] else _HUB_FILES
    for file in files:
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except errors.GatedRepoError as error:
            raise FileNotFoundError(f"{name}: access to {repo} must be granted on its page, and {login}") from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{name}: the Hugging Face hub has no repository {repo}, or it is private and {login}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(f"{name}: {repo} has no revision {revision!r}") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            offline = OSError(f"{name}: the Hugging Face hub cannot be reached, and the file is not in the local cache")
            if file == files[-1]:
                raise offline from error
        except errors.EntryNotFoundError as error:
            if file == files[-1]:
                raise FileNotFoundError(f"{name}: {repo} has no file {' or '.join(files)}") from error
        except Exception as error:  # of the network and of the cache; they have no common type
            raise OSError(f"{name}: cannot download it: {first_line(error)}") from error
    raise AssertionError


def _require_file(path: str | Path) -> Path:
    path = resolve(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    return path


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    """Names the file in the errors of safetensors."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise WeightsFormatError(f"{path} is truncated or not a safetensors file: {error}") from error
    except (OSError, MemoryError) as error:
        raise type(error)(f"cannot read {path}: {error}") from error
    except RuntimeError as error:  # torch's errors of the operating system
        raise OSError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its checksum; a torch file has none.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsFormatError: the safetensors file is damaged.
    """
    path = _require_file(path)
    with reading(path):
        return _read_metadata(path)


def _read_metadata(path: Path) -> dict[str, str]:
    if not _is_safetensors(path):
        return {}
    with _safetensors_errors(path), safetensors.safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata() or {})
    # Damage may also be in the name or in the value.
    stored = {name: value for name, value in metadata.items() if name == _CHECKSUM or value.startswith(_SHA256)}
    if stored and list(stored.items()) != [(_CHECKSUM, _SHA256 + _sha256(path, stored.get(_CHECKSUM, "")))]:
        raise WeightsFormatError(
            f"{path} is damaged: its checksum does not match. If another program changed it on purpose, remove "
            f"{_CHECKSUM!r} from its metadata."
        )
    return {name: value for name, value in metadata.items() if name not in stored}


def _entry(checksum: str) -> bytes:
    return json.dumps({_CHECKSUM: checksum}, separators=(",", ":"))[1:-1].encode()


def _sha256(path: Path, checksum: str) -> str:
    """The SHA-256 of a safetensors file with ``_NO_CHECKSUM`` in place of its checksum."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(length + header.replace(_entry(checksum), _entry(_NO_CHECKSUM), 1))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """What a weights file says about its network. A field that the file does not contain is None.

    Attributes:
        num_classes: number of classes.
        classes: class names in the order of the logits.
        image_size: height and width of the training images, in pixels.
        mean: mean of the input normalization per channel, for pixels in [0, 1].
        std: standard deviation of the input normalization per channel.
        model: name of the network.
        options: keyword arguments of the network's factory.
    """

    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    model: str | None = None
    options: dict[str, Any] | None = None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a positive integer")
    return value


def _channels(value: Any) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    values *= 3 if len(values) == 1 else 1  # one value for all channels
    for each in values if len(values) == 3 else [None]:
        if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
            raise ValueError("one finite number per channel")
    return values


def _deviations(value: Any) -> tuple[float, ...]:
    values = _channels(value)
    if min(values) <= 0:
        raise ValueError("one positive number per channel")
    return values


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("a list of class names")
    return tuple(value)


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a mapping")
    return value


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "num_classes": _count,
    "classes": _names,
    "image_size": _count,
    "mean": _channels,
    "std": _deviations,
    "options": _options,
}


def read_description(path: str | Path) -> WeightsDescription:
    """Read what a weights file's metadata says about its network; a torch file says nothing.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsFormatError: the file is damaged, or its metadata is invalid or contradicts itself.
    """
    metadata = read_metadata(path)
    found: dict[str, Any] = {"model": metadata.get("model")}
    for name, check in _FIELDS.items():
        if name in metadata:
            try:
                found[name] = check(json.loads(metadata[name]))
            except (ValueError, OverflowError, RecursionError) as error:
                expected = "JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else error
                raise WeightsFormatError(
                    f"{path}: its metadata has {name} {metadata[name][:100]!r}, which is not {expected}"
                ) from error
    classes, count = found.get("classes"), found.get("num_classes")
    if classes is not None and count is not None and len(classes) != count:
        raise WeightsFormatError(f"{path}: its metadata has num_classes {count}, but {len(classes)} names in classes")
    if classes is not None:
        found["num_classes"] = len(classes)
    return WeightsDescription(**found)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a state dict or checkpoint written by ``torch.save``, on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
        WeightsFormatError: the file is damaged, contains no tensors, or contains pickled objects.
    """
    return _checked(path)[1]


def _checked(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file whose checksum is right."""
    path = _require_file(path)
    with reading(path):
        return _read_metadata(path), _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    if _is_safetensors(path):
        with _safetensors_errors(path):
            return safetensors.torch.load_file(path)
    with path.open("rb") as file:
        head = file.read(2)
    if head != b"PK" and head[:1] != b"\x80":  # torch's zip archives and its legacy pickles
        raise WeightsFormatError(f"{path} is not a weights file: neither safetensors nor written by torch.save")
    if head == b"PK" and (damage := zip_damage(path)):
        raise WeightsFormatError(f"{path} is truncated or not a weights file: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's message suggests weights_only=False.
        found = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", str(error))
        raise WeightsFormatError(
            f"{path} is refused: it contains pickled objects{f' ({found[1]})' if found else ''}, and loading them may "
            "run arbitrary code. If you trust the file, load it yourself and save only model.state_dict()."
        ) from error
    except Exception as error:  # a damaged or malicious file may fail in any way
        raise WeightsFormatError(f"{path} is truncated or not a weights file: {first_line(error)}") from error
    return _find_state(content, path)


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors, at the top level or under a usual key."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _NESTED if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsFormatError(f"{path} must contain a mapping of names to tensors, got {type(content).__name__}")
    plain = (int, float, str, type(None))  # counters and notes next to the tensors
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    allowed = plain if tensors else ()
    wrong = [
        f"{name!r} ({type(value).__name__})"
        for name, value in content.items()
        if not isinstance(value, (Tensor, *allowed))
    ]
    if wrong or not content:
        known = ", ".join(_NESTED)
        found = f"contains other values: {_some(wrong)}" if wrong else "is empty"
        raise WeightsFormatError(
            f"{path} must contain a mapping of names to tensors, at the top level or under one of {known}; it {found}"
        )
    abstract = [name for name, value in tensors.items() if value.is_meta or value.layout != torch.strided]
    if abstract:
        raise WeightsFormatError(f"{path} must contain dense tensors with values; these have none: {_some(abstract)}")
    return tensors


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _renamed(state: dict[str, Tensor], own: Iterable[str], path: Path) -> dict[str, Tensor]:
    """Gives weights the network's names.

    DataParallel, DistributedDataParallel, AveragedModel and torch.compile add ``module`` and ``_orig_mod`` to the names
    of the modules in them. Other libraries add a prefix to all names.

    Raises:
        WeightsFormatError: two names in the file become the same.
    """
    own = set(own)
    plain = {_without_wrappers(name): name for name in own}
    if len(plain) < len(own):  # the network has modules with and without these names
        plain = {name: name for name in own}
    names = {name: name if name in own else _without_wrappers(name) for name in state}
    while weights := [name for name in names.values() if not _is_counter(name)]:
        fits = any(name in own or name in plain for name in weights)
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
        if fits or prefix is None:
            break
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, short in names.items():
        target = short if short in own else plain.get(short, short)
        if target in result and not _same(result[target], state[name]):
            raise WeightsFormatError(f"{path} has two values of {target!r}: {origin[target]!r} and {name!r}")
        result[target], origin[target] = state[name], name
    return result


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def load_weights(model: nn.Module, path: str | Path, *, skip: Iterable[str] = ()) -> WeightsReport:
    """Load weights from a file into ``model``, in place. If they do not fit, nothing changes.

    Torch files are read with ``weights_only=True``. The state dict may be under the key ``state_dict``,
    ``model_state_dict``, ``model``, ``net`` or ``network``, or, in a file with only averaged weights,
    ``state_dict_ema``, ``model_ema``, ``ema_state_dict`` or ``ema``. Its names may contain ``module`` or ``_orig_mod``
    anywhere and start with ``model.``, ``net.``, ``network.`` or ``backbone.``. Counters that the network does not have
    are ignored. Values are converted to the network's dtypes and device.

    Args:
        model: the network.
        path: a safetensors file, or a state dict or checkpoint written by ``torch.save``.
        skip: paths of modules that are not loaded.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsFormatError: the file is damaged, contains no weights, or contains pickled objects.
        WeightsMismatch: names or shapes do not fit.
        ValueError: a weight is NaN or infinite.
    """
    own = model.state_dict()
    metadata, state = _checked(path)
    path = resolve(path)
    state = _renamed(state, own, path)
    prefixes = tuple(f"{name}." for name in skip)

    def skipped(name: str) -> bool:
        return bool(prefixes) and name.startswith(prefixes)

    state = {name: value for name, value in state.items() if not skipped(name)}
    expected = {name: value for name, value in own.items() if not skipped(name) and isinstance(value, Tensor)}
    absent = [name for name in expected if name not in state]
    counters = tuple(name for name in absent if _is_counter(name))
    missing = tuple(name for name in absent if name not in counters)
    ignored = tuple(name for name in state if name not in expected and _is_counter(name))
    unexpected = tuple(name for name in state if name not in expected and name not in ignored)
    mismatched = tuple(
        (name, tuple(value.shape), tuple(expected[name].shape))
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    )
    if missing or unexpected or mismatched:
        lines = [f"{path} does not fit {type(model).__name__}:"]
        if missing:
            lines.append(f"  missing ({len(missing)}): {_some(missing)}")
        if unexpected:
            lines.append(f"  unexpected ({len(unexpected)}): {_some(unexpected)}")
        if mismatched:
            shapes = _some(f"{name} {there} instead of {here}" for name, there, here in mismatched)
            lines.append(f"  of another shape ({len(mismatched)}): {shapes}")
        raise WeightsMismatch("\n".join(lines), missing, unexpected, mismatched)
    imaginary = [name for name, value in state.items() if value.is_complex() and not own[name].is_complex()]
    if imaginary:
        raise WeightsFormatError(f"{path} has complex weights, and the network has real ones: {_some(imaginary)}")
    weights = weights_of(model)
    require_finite(str(path), {name: value for name, value in state.items() if name in weights})
    state = {name: value for name, value in state.items() if name not in ignored}
    model.load_state_dict(state, strict=False)
    return WeightsReport(
        path=path,
        loaded=tuple(state),
        skipped=tuple(name for name in own if skipped(name)),
        absent_counters=counters,
        ignored=ignored,
        metadata=metadata,
    )


def _sorted_header(content: memoryview) -> tuple[bytes, memoryview]:
    """Split a file into its header and the tensors, and sort the header.

    safetensors writes metadata in random order; equal weights then give equal files.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    header = {name: dict(sorted(entry.items())) for name, entry in sorted(header.items())}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are 8-byte aligned
    return len(text).to_bytes(8, "little") + text, content[8 + length :]


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the network's state dict as a safetensors file with a checksum, atomically.

    Args:
        model: the network, on any device. In a wrapper (torch.compile, DataParallel, ...), the plain network is saved.
        path: the file. Missing folders are created.
        metadata: strings for the file's header.

    Raises:
        TypeError: metadata or the state dict contains other types.
        dfkd_fast.files.WriteError: the file could not be written; its previous content is kept.
    """
    write_tensors(path, unwrap(model).state_dict(), metadata)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file with a checksum, atomically; equal tensors give equal files.

    Raises:
        TypeError: metadata or the tensors contain other types.
        dfkd_fast.files.WriteError: the file could not be written; its previous content is kept.
    """
    metadata = dict(metadata or {})
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {text!r}")
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"all values must be tensors, got {type(value).__name__} for {name!r}")
        tensor = value.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # tied weights: safetensors stores no aliases
        storages.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    content = safetensors.torch.save(plain, metadata={**metadata, _CHECKSUM: _NO_CHECKSUM})
    header, body = _sorted_header(memoryview(content))
    digest = hashlib.sha256(header)
    digest.update(body)
    with atomic_write(path) as file:
        file.write(header.replace(_entry(_NO_CHECKSUM), _entry(_SHA256 + digest.hexdigest()), 1))
        file.write(body)
