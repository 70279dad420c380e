"""Public data sets from their official places: downloaded, checked, unpacked, converted to Parquet.

A download goes on where an earlier one stopped. Nothing in an archive decides where a file is written: the members that the
configuration names are copied out by name, links and anything else are left alone. The folder appears whole or not at all.
"""

import errno
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field

from recsys_moe.config import conf_dir, options
from recsys_moe.errors import UserError, nearest
from recsys_moe.formats import read
from recsys_moe.shards import write_json
from recsys_moe.typed import parse, typed

MB = 1_000_000
ROW_GROUP = 1_000_000
_PIECE = 1 << 20
_ATTEMPTS = 5
_TIMEOUT_S = 60

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, what is done and what there is in all: megabytes of a download, files of an archive."""


@typed
class FetchedFile:
    """A Parquet file to make: of which member of the archive (its name without folders), in which format, with how many rows
    where that is documented."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+\.parquet$")]
    member: str
    format: Literal["census_income", "csv", "movielens_ratings", "movielens_users", "movielens_movies"]
    rows: int | None = None


@typed
class FetchConfig:
    """A public data set. `digest` is null where its publisher gives none; `inner` is an archive within the archive."""

    name: str
    homepage: str
    licence: str
    url: Annotated[str, Field(pattern=r"^https?://")]
    digest: Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")] | None
    max_mb: Annotated[int, Field(ge=1)]
    max_unpacked_mb: Annotated[int, Field(ge=1)]
    files: Annotated[tuple[FetchedFile, ...], Field(min_length=1)]
    inner: str | None = None


def load_fetch_config(name: str, url: str | None = None) -> FetchConfig:
    """A data set of `conf/fetch`; `url` is a mirror of its archive.

    Raises:
        UserError: no such data set, or an address that is none.
    """
    if name not in options("fetch"):
        raise UserError(f"data set {name!r} is unknown; {nearest(name, options('fetch'))}")
    path = conf_dir() / "fetch" / f"{name}.yaml"
    data = yaml.safe_load(path.read_text())
    config: FetchConfig = parse(FetchConfig, data | ({"url": url} if url else {}), f"data set {name!r}")
    return config


def fetch(config: FetchConfig, folder: Path, progress: Progress = lambda phase, done, total: None) -> dict[str, Any]:
    """Download a data set, check it and convert it to Parquet in `folder`; returns what its fetch.json says.

    What an earlier call has left is used: a folder that is there already, or the beginning of a download.

    Raises:
        UserError: the address can't be reached or answers something else, the archive is not the documented one, the disk is
            full, or the folder holds something else.
    """
    about = {"name": config.name, "folder": str(folder), "homepage": config.homepage, "licence": config.licence}
    if folder.exists():
        if not (folder / "fetch.json").is_file():
            raise UserError(f"{str(folder)!r} exists already; name a new folder or delete it")
        return about | {"files": _read_summary(folder, config)}
    downloads = folder.with_name(f"{folder.name}.download")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    archive = downloads / "archive"
    with _disk_errors(folder):
        downloads.mkdir(parents=True, exist_ok=True)
    with _alone(downloads), _disk_errors(folder):
        download(config.url, archive, config.digest, config.max_mb * MB, progress)
        try:
            temporary.mkdir()
            files = _convert(config, archive, temporary, progress)
            write_json(temporary / "fetch.json", {"name": config.name, "url": config.url, "files": files})
            temporary.rename(folder)
        except UserError:
            archive.unlink()  # it is whole and yet the wrong one
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(downloads)
    return about | {"files": files}


def _read_summary(folder: Path, config: FetchConfig) -> Any:
    found = json.loads((folder / "fetch.json").read_text())
    if found["name"] != config.name:
        raise UserError(f"{str(folder)!r} holds {found['name']}, not {config.name}; name another folder")
    return found["files"]


@contextmanager
def _alone(downloads: Path) -> Iterator[None]:
    """Hold a lock on the folder of a download: two at once would append to one file. It goes with its process."""
    handle = os.open(downloads, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another fetch is at work in {str(downloads)!r}; wait for it, or name another folder") from None
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {str(folder.parent)!r}; free some space and run the same command again: what has been "
                "downloaded is kept"
            ) from None
        raise UserError(f"{str(folder)!r} can't be written ({error.strerror or error}); choose another folder") from None


class _Interrupted(Exception):
    """The connection broke: what has come so far is kept."""


def download(
    url: str, target: Path, digest: str | None, max_bytes: int, progress: Progress = lambda phase, done, total: None
) -> None:
    """Download `url` to `target`, on from where an earlier call stopped (`target`.part); nothing to do where it is already.

    Raises:
        UserError: the address can't be reached, the connection keeps breaking, there are more than `max_bytes`, or the digest
            (`sha256:…` or `md5:…`) is another one, in which case the file is deleted.
    """
    part = target.with_name(target.name + ".part")
    if not target.exists():
        for attempt in range(_ATTEMPTS):
            try:
                _receive(url, part, max_bytes, progress)
                break
            except _Interrupted as error:
                time.sleep(attempt)
                reason = str(error)
        else:
            size = part.stat().st_size if part.exists() else 0
            raise UserError(
                f"{url!r}: the connection broke {_ATTEMPTS} times ({reason}); {size:,} bytes are kept, run the same command "
                "again to go on from there"
            )
        os.replace(part, target)
        _validator(part).unlink(missing_ok=True)
    if digest:
        kind, _, wanted = digest.partition(":")
        with target.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
        if found != wanted:
            target.unlink()
            raise UserError(
                f"what {url!r} sent has the {kind.upper()} {found}, not {wanted} as documented; it was deleted: fetch "
                "it again, or from another mirror with --url"
            )


def _receive(url: str, part: Path, max_bytes: int, progress: Progress) -> None:
    """One attempt: append to `part` until everything is there."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "recsys-moe", "Accept-Encoding": "identity"}
    validator = _validator(part).read_text() if have and _validator(part).exists() else ""
    if validator:
        # Only if the file is still the same one; else the server sends it from its beginning.
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with _open(url, headers, part) as response:
        if response.status != 206 or response.headers.get("Content-Range", "").split("-")[0] != f"bytes {have}":
            have = 0
            # Without one of these a broken download starts again from nothing.
            etag = response.headers.get("ETag", "")
            _validator(part).write_text(etag if etag.startswith('"') else response.headers.get("Last-Modified", ""))
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else 0
        _check_size(url, max(total, have), max_bytes)
        with part.open("ab" if have else "wb") as file:
            while piece := _read_piece(response):
                have += len(piece)
                _check_size(url, have, max_bytes)
                file.write(piece)
                progress("download MB", have // MB, max(total, have) // MB)
    if have < total:
        raise _Interrupted(f"{have:,} of {total:,} bytes came")


def _validator(part: Path) -> Path:
    return part.with_name(part.name + ".validator")


def _check_size(url: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise UserError(
            f"{url!r} sends {size:,} bytes or more, but the data set has at most {max_bytes:,}; this is something else, check "
            "the address"
        )


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """What was asked for encrypted must not come in the clear from elsewhere."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://" if req.full_url.startswith("https://") else ("https://", "http://")):
            raise urllib.error.URLError(f"it redirects to {newurl!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str], part: Path) -> Any:
    try:
        opener = urllib.request.build_opener(_NoDowngrade)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no more than we have, which therefore is of no use
            part.unlink(missing_ok=True)
            raise _Interrupted("the file has become shorter") from None
        raise UserError(
            f"{url!r} answers {error.code} {error.reason}; the file may have moved: name its place with --url"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url!r} can't be reached ({reason}); check the network, or name a mirror with --url") from None


def _read_piece(response: Any) -> bytes:
    try:
        piece: bytes = response.read(_PIECE)
        return piece
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from None


def _convert(config: FetchConfig, archive: Path, folder: Path, progress: Progress) -> dict[str, int]:
    """Unpack and convert in `folder`; returns the rows of each file."""
    limit = config.max_unpacked_mb * MB
    if config.inner:
        unpack(archive, {config.inner: folder / "inner"}, limit)
        archive = folder / "inner"
    # Our readers know a CSV file by its suffix; to the others a name is nothing.
    raw = {file.member: (folder / file.name).with_suffix(".csv") for file in config.files}
    progress("unpack", 0, len(raw))
    unpack(archive, raw, limit, lambda done: progress("unpack", done, len(raw)))
    (folder / "inner").unlink(missing_ok=True)
    rows = {}
    for done, file in enumerate(config.files):
        progress("convert", done, len(config.files))
        rows[file.name] = _write_parquet(read(raw[file.member], file.format, file.member), folder / file.name)
        raw[file.member].unlink()
        if file.rows is not None and rows[file.name] != file.rows:
            raise UserError(
                f"{file.member!r} of {config.url!r} has {rows[file.name]:,} rows, not {file.rows:,} as documented; fetch "
                "it again, or from another mirror with --url"
            )
    progress("convert", len(config.files), len(config.files))
    return rows


def _write_parquet(tables: Iterator[pa.Table], target: Path) -> int:
    """Write tables as one file, in row groups of about ROW_GROUP rows; returns the rows."""
    first = next(tables)
    rows, waiting = 0, []
    with pq.ParquetWriter(target, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            rows += table.num_rows
            waiting.append(table)
            if sum(piece.num_rows for piece in waiting) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return rows


def unpack(archive: Path, members: dict[str, Path], limit: int, progress: Callable[[int], None] = lambda done: None) -> None:
    """Copy members of a zip or tar archive (whatever its compression) out, each to its place; known by name without folders.

    Raises:
        UserError: the archive is damaged, lacks one of them, or would unpack to more than `limit` bytes.
    """
    missing = dict(members)
    try:
        for name, stream in _members(archive, missing, limit):
            with missing.pop(name).open("wb") as file:
                limit -= _copy(stream, file, limit)
            progress(len(members) - len(missing))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
        raise UserError(f"the archive is damaged ({str(error).splitlines()[0]}); fetch it again") from None
    if missing:
        raise UserError(f"the archive holds no file {next(iter(missing))!r}; is it the right archive?")


def _members(archive: Path, wanted: dict[str, Path], limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    """The plain files among the members that are still wanted, each with its content."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            for entry in box.infolist():
                name = PurePosixPath(entry.filename).name
                if name in wanted and not entry.is_dir():
                    with box.open(entry) as stream:
                        yield name, stream
        return
    total = 0
    with tarfile.open(archive, "r|*") as tape:
        for member in tape:
            # A tape is read past what is skipped: a bomb would cost hours even if nobody wants it.
            total += member.size
            _check_unpacked(total, limit)
            name = PurePosixPath(member.name).name
            if name in wanted and member.isreg():
                content = tape.extractfile(member)
                assert content is not None
                yield name, content


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> int:
    size = 0
    while piece := source.read(_PIECE):
        size += len(piece)
        _check_unpacked(size, limit)
        target.write(piece)
    return size


def _check_unpacked(size: int, limit: int) -> None:
    if size > limit:
        raise UserError(f"the archive unpacks to more than {limit:,} bytes; is it the right archive?")
