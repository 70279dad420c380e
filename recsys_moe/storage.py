"""Where files are: a path on this machine, or an URI of object storage (s3://, gs://, hdfs://), through pyarrow's filesystems.

Who may read comes from the environment and from the standard files (AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws/credentials,
GOOGLE_APPLICATION_CREDENTIALS), never from an URI: those stand in logs, in MLflow and in messages. AWS_ENDPOINT_URL names an
S3 server of one's own. Local files are memory-mapped.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.fs as pafs

from recsys_moe.errors import UserError

OPTIONS = {
    "s3": ("endpoint_override", "region", "scheme"),
    "gs": ("endpoint_override", "scheme"),
    "hdfs": ("user", "replication"),
}
"""What an URI's query may say, by scheme."""

_CONNECT_S, _ANSWER_S, _TRIES = 3, 30, 3


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder in object storage, with as much of Path's interface as log files need.

    >>> locate("s3://bucket/logs/") / "day.parquet"
    Remote('s3://bucket/logs/day.parquet')
    """

    scheme: str
    path: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" + (f"?{self.query}" if self.query else "")

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __truediv__(self, name: str) -> "Remote":
        return replace(self, path=f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> "Remote":
        return replace(self, path=str(PurePosixPath(self.path).parent))

    def resolve(self) -> "Remote":
        return self

    def is_file(self) -> bool:
        return bool(info(self).type == pafs.FileType.File)

    def is_dir(self) -> bool:
        return bool(info(self).type == pafs.FileType.Directory)

    def exists(self) -> bool:
        return bool(info(self).type != pafs.FileType.NotFound)

    def glob(self, pattern: str) -> list["Remote"]:
        from fsspec.utils import glob_translate

        if not pattern or pattern.startswith("/"):
            raise ValueError(pattern)
        filesystem, path = open_filesystem(self)
        fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        folder = f"{path}/{fixed}" if fixed else path
        below = "/" in pattern[len(fixed) :].lstrip("/") or "**" in pattern
        try:
            found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=below))
        except OSError as error:
            raise trouble(self, error) from None
        # The pattern alone is one: a key may hold what would be magic in it.
        fits = re.compile(glob_translate(pattern)).match
        names = sorted(item.path.removeprefix(path).lstrip("/") for item in found)
        return [self / name for name in names if fits(name)]


AnyPath = Path | Remote


def locate(text: str | Path) -> AnyPath:
    """A path on this machine, made absolute, or a place in object storage.

    Raises:
        UserError: a scheme that can't be read, no bucket, or an URI that holds credentials (which the message does not).
    """
    scheme, found, _ = str(text).partition("://")
    if isinstance(text, Path) or not found:
        return Path(text).absolute()
    if scheme not in OPTIONS:
        raise UserError(f"{scheme}:// can't be read; name a path on this machine, or s3://, gs:// or hdfs://")
    # Not urlsplit: a key is any text, and what would be a fragment or an escape elsewhere is a part of it.
    whole, _, query = str(text).partition("://")[2].rpartition("?")
    if not whole or "=" not in query.partition("/")[0]:
        whole, query = str(text).partition("://")[2], ""
    host, slash, key = whole.partition("/")
    path = (host.rpartition("@")[2] + slash + key).rstrip("/")
    shown = f"{scheme}://{path}"
    unknown = sorted(parse_qs(query, keep_blank_values=True).keys() - set(OPTIONS[scheme]))
    if "@" in host or unknown:
        raise UserError(
            f"the URI {shown!r} holds a name, a key or a token (only {', '.join(OPTIONS[scheme])} may follow a '?'); give "
            "credentials in the environment or in the cloud's own files instead"
        )
    if not host:
        raise UserError(f"the URI {shown!r} names no bucket or host; write {scheme}://BUCKET/FOLDER")
    return Remote(scheme, path, query)


def only_local(path: str | Path, what: str) -> Path:
    """A path on this machine.

    Raises:
        UserError: it is an URI, which Path would take for a folder called `s3:`.
    """
    if str(path).split("/")[0].endswith(":"):
        raise UserError(f"{what} {str(path)!r} must be a path on this machine or a shared disk; object storage is for log rows")
    return Path(path)


def open_filesystem(place: AnyPath) -> tuple[pafs.FileSystem, str]:
    """The filesystem that a place is in, and its path there.

    Raises:
        UserError: this machine lacks what the filesystem needs.
    """
    if isinstance(place, Path):
        return pafs.LocalFileSystem(use_mmap=True), str(place)
    host, _, rest = place.path.partition("/")
    try:
        if place.scheme == "hdfs":
            return _connect("hdfs", place.query, host), f"/{rest}"
        return _connect(place.scheme, place.query, host), place.path
    except OSError as error:
        raise trouble(place, error) from None


@lru_cache(maxsize=16)
def _connect(scheme: str, query: str, host: str) -> pafs.FileSystem:
    options: dict[str, Any] = {key: values[-1] for key, values in parse_qs(query).items()}
    if scheme == "hdfs":
        name, _, port = host.partition(":")
        if "replication" in options:
            options["replication"] = int(options["replication"])
        return pafs.HadoopFileSystem(name, int(port or 8020), **options)
    if scheme == "gs":
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=10), **options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    return pafs.S3FileSystem(
        connect_timeout=_CONNECT_S,
        request_timeout=_ANSWER_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        **options,
    )


def info(place: AnyPath) -> pafs.FileInfo:
    """What is there: its type, size and time.

    Raises:
        UserError: the storage does not answer or refuses; that nothing is there is no error.
    """
    filesystem, path = open_filesystem(place)
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise trouble(place, error) from None


def open_file(place: AnyPath) -> pa.NativeFile:
    """A file to read anywhere in."""
    filesystem, path = open_filesystem(place)
    return filesystem.open_input_file(path)


def open_stream(place: AnyPath, compression: str | None) -> pa.NativeFile:
    """A file to read from its beginning."""
    filesystem, path = open_filesystem(place)
    return filesystem.open_input_stream(path, compression=compression)


def digest(place: AnyPath) -> str:
    """What changes with a file's content: its SHA-256; in object storage its ETag, or else its size and time.

    To hash what lies in object storage would be to fetch all of it before every training, prepared or not.
    """
    if isinstance(place, Path):
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with open_file(place) as file:
            tag = file.metadata().get("ETag")
    except OSError as error:
        raise trouble(place, error) from None
    found = info(place)
    return f"{found.size}:{tag.decode() if tag else found.mtime_ns}"


def put(source: Path, target: AnyPath) -> None:
    """Move a whole file to its place, where it appears at once."""
    if isinstance(target, Path):
        source.replace(target)
        return
    filesystem, path = open_filesystem(target)
    try:
        pafs.copy_files(str(source), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
    except OSError as error:
        raise trouble(target, error) from None
    source.unlink()


_MEANINGS = (
    (  # first: that a library is missing is told as a file that does not exist
        ("libjvm", "libhdfs"),
        "needs Hadoop's client, which is not on this machine; install it and set JAVA_HOME and HADOOP_HOME",
    ),
    (
        ("NETWORK_CONNECTION", "curlCode", "onnection refused", "Could not connect", "timed out", "Timeout", "UNAVAILABLE"),
        "does not answer; check the network, and the bucket's region and endpoint",
    ),
    (("NO_SUCH_BUCKET", "bucket does not exist"), "is in a bucket that does not exist; check its name and region"),
    (("NO_SUCH_KEY", "does not exist", "No such file"), "does not exist; check the bucket and the key"),
    (
        (
            "ACCESS_DENIED",
            "INVALID_ACCESS_KEY",
            "SIGNATURE",
            "status 403",
            "status 401",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
        ),
        "may not be read or written with the credentials of this environment; check them and the bucket's policy",
    ),
)


def trouble(place: AnyPath, error: OSError) -> UserError:
    """What to say of an object storage that `error` came from."""
    text = str(error)
    for signs, meaning in _MEANINGS:
        if any(sign in text for sign in signs):
            return UserError(f"{str(place)!r} {meaning}")
    return UserError(f"{str(place)!r} can't be used ({' '.join(text.split())[:200]}); check it and its storage")
