"""Fetching public data sets: from a local file server, small files in the documented formats, and all that goes wrong."""

import errno
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_moe import fetch as fetch_module
from recsys_moe.config import compose, conf_dir
from recsys_moe.errors import UserError
from recsys_moe.fetch import FetchConfig, download, fetch, load_fetch_config, unpack
from recsys_moe.labels import task_labels
from recsys_moe.sources import PARTS, DataConfig, read_part
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse


class FileServer(ThreadingHTTPServer):
    """Files in memory, with ranges. `breaks` are the numbers of bytes after which the next answers break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None, int]] = []
        self.breaks: list[int] = []
        self.with_ranges, self.with_length = True, True

    def put(self, name: str, content: bytes) -> str:
        self.files[f"/{name}"] = content
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        if content is None:
            self.send_error(404)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        wanted = self.headers.get("Range")
        start = 0
        if wanted and self.server.with_ranges and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.server.requests.append((self.path, wanted, start))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", etag)
        if self.server.with_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: self.server.breaks.pop(0)] if self.server.breaks else body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
LIMIT = 10_000_000


# Downloading


@pytest.mark.parametrize("digest", [None, SHA256, f"md5:{hashlib.md5(CONTENT).hexdigest()}"])
def test_a_file_arrives_whole(server: FileServer, tmp_path: Path, digest: str | None) -> None:
    told: list[tuple[str, int, int]] = []
    download(server.put("a.bin", CONTENT), tmp_path / "a", digest, LIMIT, lambda *step: told.append(step))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert told[-1] == ("download MB", 3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    download(server.put("a.bin", CONTENT), tmp_path / "a", digest, LIMIT)
    assert len(server.requests) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(server: FileServer, tmp_path: Path) -> None:
    server.breaks = [1_000_000, 500_000]
    download(server.put("a.bin", CONTENT), tmp_path / "a", SHA256, LIMIT)
    assert [start for _, _, start in server.requests] == [0, 1_000_000, 1_500_000]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_what_a_stopped_command_has_left_is_used(server: FileServer, tmp_path: Path) -> None:
    url = server.put("a.bin", CONTENT)
    server.breaks = [200_000] * 5
    with pytest.raises(
        UserError, match=r"the connection broke 5 times .*; 1,000,000 bytes are kept, run the same command again"
    ):
        download(url, tmp_path / "a", SHA256, LIMIT)
    download(url, tmp_path / "a", SHA256, LIMIT)
    assert server.requests[-1][2] == 1_000_000
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("change", ["file", "server"])
def test_no_two_halves_of_different_files(server: FileServer, tmp_path: Path, change: str) -> None:
    server.breaks = [1_000_000] * 5
    server.with_ranges = False
    url = server.put("a.bin", CONTENT)
    with pytest.raises(UserError, match="the connection broke"):
        download(url, tmp_path / "a", None, LIMIT)
    # The file has changed meanwhile, or the server knows no ranges: it is sent from its beginning.
    server.with_ranges = change == "file"
    other = CONTENT[::-1] if change == "file" else CONTENT
    download(server.put("a.bin", other), tmp_path / "a", None, LIMIT)
    assert (tmp_path / "a").read_bytes() == other


def test_a_part_that_is_longer_than_the_file(server: FileServer, tmp_path: Path) -> None:
    url = server.put("a.bin", CONTENT)
    (tmp_path / "a.part").write_bytes(CONTENT + b"more")
    (tmp_path / "a.part.validator").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()[:8]}"')
    download(url, tmp_path / "a", SHA256, LIMIT)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_digest_deletes_the_file(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the SHA256 \w{64}, not 0{64} as documented; it was deleted: fetch it again"):
        download(server.put("a.bin", CONTENT), tmp_path / "a", f"sha256:{'0' * 64}", LIMIT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_length", [True, False])
def test_more_than_there_can_be(server: FileServer, tmp_path: Path, with_length: bool) -> None:
    server.with_length = with_length
    with pytest.raises(UserError, match=r"sends [\d,]+ bytes or more, but the data set has at most 1,000,000"):
        download(server.put("a.bin", CONTENT), tmp_path / "a", None, 1_000_000)
    assert not (tmp_path / "a").exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("a.part")) <= 1_000_000


def test_an_address_that_is_not_there(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"answers 404 Not Found; the file may have moved: name its place with --url"):
        download(server.put("a", b"") + "bc", tmp_path / "a", None, LIMIT)
    with pytest.raises(UserError, match=r"'http://127.0.0.1:9/a' can't be reached \(.*refused\); check the network"):
        download("http://127.0.0.1:9/a", tmp_path / "a", None, LIMIT)
    with pytest.raises(UserError, match=r"'http://no.such.host.invalid/a' can't be reached"):
        download("http://no.such.host.invalid/a", tmp_path / "a", None, LIMIT)


def test_redirects_are_followed_but_not_out_of_encryption(server: FileServer, tmp_path: Path) -> None:
    url = server.put("a.bin", CONTENT)
    download(url.replace("/a.bin", "/moved/a.bin"), tmp_path / "a", SHA256, LIMIT)
    handler = fetch_module._NoDowngrade()
    request = fetch_module.urllib.request.Request("https://example.org/a")
    with pytest.raises(OSError, match=r"redirects to 'http://example.org/b'"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.org/b")
    request = fetch_module.urllib.request.Request("http://example.org/a")
    with pytest.raises(OSError, match=r"redirects to 'file:///etc/passwd'"):
        handler.redirect_request(request, None, 302, "", {}, "file:///etc/passwd")


# Unpacking


def tar(members: dict[str, bytes], **kinds: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("pack", [tar, zipped])
def test_members_are_copied_out_by_name_and_nothing_else(tmp_path: Path, pack: Any) -> None:
    members = {"set/data/a.csv": b"x\n1\n", "../../escape.csv": b"out", "/abs/b.csv": b"y\n2\n", "set/data/other.csv": b"no"}
    (tmp_path / "archive").write_bytes(pack(members))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "archive", {"a.csv": tmp_path / "out" / "1", "escape.csv": tmp_path / "out" / "2"}, 100)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"1": b"x\n1\n", "2": b"out"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_are_no_files(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "archive").write_bytes(tar({"other": b""}, **{"a.csv": kind}))
    with pytest.raises(UserError, match=r"the archive holds no file 'a.csv'; is it the right archive\?"):
        unpack(tmp_path / "archive", {"a.csv": tmp_path / "a"}, 100)


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("name", ["a.csv", "skipped.csv"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, pack: Any, name: str) -> None:
    (tmp_path / "archive").write_bytes(pack({name: bytes(2_000_000), "z.csv": b"small"}))
    if pack is zipped and name == "skipped.csv":  # what is not wanted of a zip is not read at all
        unpack(tmp_path / "archive", {"z.csv": tmp_path / "z"}, 1_000_000)
        return
    with pytest.raises(UserError, match=r"the archive unpacks to more than 1,000,000 bytes"):
        unpack(
            tmp_path / "archive", {"z.csv": tmp_path / "z", **({name: tmp_path / "a"} if name == "a.csv" else {})}, 1_000_000
        )


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b[:100] + bytes(60) + b[160:], lambda b: b"<html>"])
@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_damaged_archive(tmp_path: Path, pack: Any, harm: Any) -> None:
    (tmp_path / "archive").write_bytes(harm(pack({"a.csv": CONTENT[:5000]})))
    with pytest.raises(UserError, match=r"the archive is damaged \(.*\); fetch it again|holds no file 'a.csv'"):
        unpack(tmp_path / "archive", {"a.csv": tmp_path / "a"}, 100_000)


# The data sets, from small files in their documented formats


def census_lines(rows: int, seed: int) -> str:
    """As in census-income.data: fields split by a comma and a blank, the class with a full stop at its end."""
    r = np.random.default_rng(seed)
    nominal = ["Private", "Not in universe", "?", "NA", "Handlers equip cleaners etc ", "Spouse of householder"]
    lines = []
    for _ in range(rows):
        fields = [str(r.choice(nominal)) for _ in range(42)]
        for position, high in ((0, 91), (5, 900), (16, 99999), (17, 4608), (18, 9999), (30, 7), (39, 53)):
            fields[position] = str(r.integers(0, high))
        fields[2], fields[3] = str(r.integers(0, 52)), str(r.integers(0, 47))
        fields[4] = str(r.choice(["Children", "Bachelors degree(BA AB BS)", "Some college but no degree"]))
        fields[7] = str(r.choice(["Never married", "Divorced"]))
        fields[24] = f"{r.random() * 2000:.2f}"
        fields[40], fields[41] = str(r.choice(["94", "95"])), str(r.choice(["- 50000.", "50000+."]))
        lines.append(", ".join(fields))
    return "\n".join(lines) + "\n"


def census_archive() -> tuple[bytes, dict[str, int]]:
    inner = tar(
        {
            "census-income.data": census_lines(400, 0).encode(),
            "census-income.names": b"| no rows",
            "census-income.test": census_lines(200, 1).encode(),
        }
    )
    return zipped({"census.tar.gz": inner}), {"train.parquet": 400, "test.parquet": 200}


LOG = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward"),
    *("is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"),
    *("is_rand", "tab"),
)
USER_TEXTS = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)


def kuairand_archive(suffix: str) -> tuple[bytes, dict[str, int]]:
    r = np.random.default_rng(5)

    def log(rows: int, day: int) -> bytes:
        frame = pd.DataFrame({name: r.integers(0, 2, rows) for name in LOG})
        frame["user_id"], frame["video_id"] = r.integers(0, 30, rows), r.integers(0, 50, rows)
        frame["date"], frame["hourmin"] = 20220400 + day, 100 * r.integers(0, 24, rows)
        frame["time_ms"] = 1649000000000 + day * 86400000 + r.integers(0, 86400000, rows)
        return frame.to_csv(index=False).encode()

    users = pd.DataFrame({"user_id": np.arange(30)})
    for name in ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num"):
        users[name] = r.integers(0, 3, 30)
    for name in ("fans_user_num", "friend_user_num", "register_days", *(f"onehot_feat{n}" for n in range(18))):
        users[name] = r.integers(0, 3, 30)
    for name in USER_TEXTS:
        users[name] = r.choice(["UNKNOWN", "(0,10]", "500+"], 30)
    users["onehot_feat4"] = users["onehot_feat4"].astype(float).mask(users["user_id"] == 3)
    videos = pd.DataFrame({"video_id": np.arange(50), "author_id": r.integers(0, 9, 50), "video_type": "NORMAL"})
    videos["upload_dt"], videos["upload_type"] = "2022-03-01", r.choice(["ShortImport", "Kmovie"], 50)
    for name in ("visible_status", "server_width", "server_height", "music_id", "music_type"):
        videos[name] = r.integers(0, 3, 50)
    videos["video_duration"] = r.choice([17200.0, np.nan], 50)
    videos["tag"] = r.choice(["12,65", "3", None], 50)
    folder = f"KuaiRand-{suffix.title()}/data"
    files = {
        f"log_standard_4_08_to_4_21_{suffix}.csv": log(300, 9),
        f"log_standard_4_22_to_5_08_{suffix}.csv": log(200, 25),
        f"log_random_4_22_to_5_08_{suffix}.csv": log(100, 26),
        f"user_features_{suffix}.csv": users.to_csv(index=False).encode(),
        f"video_features_basic_{suffix}.csv": videos.to_csv(index=False).encode(),
        f"video_features_statistic_{suffix}.csv": b"video_id,counts\n1,2\n",
    }
    rows = dict(zip([f.name for f in load_fetch_config(f"kuairand_{suffix}").files], (300, 200, 100, 30, 50), strict=True))
    return tar({f"{folder}/{name}": content for name, content in files.items()}), rows


def movielens_archive() -> tuple[bytes, dict[str, int]]:
    r = np.random.default_rng(6)
    ratings = "".join(
        f"{r.integers(1, 41)}::{r.integers(1, 31)}::{r.integers(1, 6)}::{978300760 + r.integers(0, 10**7)}\n"
        for _ in range(600)
    )
    users = "".join(
        f"{u}::{r.choice(['F', 'M'])}::{r.choice([1, 18, 25])}::{r.integers(0, 21)}::{r.choice(['48067', '98107-2117'])}\n"
        for u in range(1, 41)
    )
    movies = "".join(f"{m}::Misérables, Les ({1950 + m})::Drama|Musical\n" for m in range(1, 30)) + "30::Untitled::Comedy\n"
    members = {"ml-1m/ratings.dat": ratings, "ml-1m/users.dat": users, "ml-1m/movies.dat": movies, "ml-1m/README": "read me"}
    return zipped({name: text.encode("latin-1") for name, text in members.items()}), {
        "ratings.parquet": 600,
        "users.parquet": 40,
        "movies.parquet": 30,
    }


ARCHIVES = {
    "census_income": census_archive,
    "kuairand_pure": lambda: kuairand_archive("pure"),
    "kuairand_1k": lambda: kuairand_archive("1k"),
    "movielens_1m": movielens_archive,
}


def small(config: FetchConfig, url: str, archive: bytes, rows: dict[str, int]) -> FetchConfig:
    """The shipped configuration with what a small archive changes: the address, the digest and the rows."""
    digest = config.digest and f"{config.digest.split(':')[0]}:{hashlib.new(config.digest.split(':')[0], archive).hexdigest()}"
    files = tuple(replace(file, rows=file.rows and rows[file.name]) for file in config.files)
    return replace(config, url=url, digest=digest, files=files)


@pytest.fixture(scope="module")
def archives() -> dict[str, tuple[bytes, dict[str, int]]]:
    return {name: make() for name, make in ARCHIVES.items()}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_fetched_set_fits_its_configuration(server: FileServer, tmp_path: Path, archives: Any, name: str) -> None:
    archive, rows = archives[name]
    config = small(load_fetch_config(name), server.put("archive", archive), archive, rows)
    folder = tmp_path / "runs" / "data" / name
    summary = fetch(config, folder)
    assert summary["files"] == rows
    assert {path.name: pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")} == rows
    assert [path.name for path in folder.parent.iterdir()] == [name]
    # Again: it is there.
    assert fetch(config, folder) == summary
    assert len(server.requests) == 1
    data = parse(DataConfig, compose([f"data={name}", f"runs_dir={tmp_path}/runs"])["data"], "data")
    schema = data.load_schema(conf_dir() / "schema")
    tables = {part: pa.concat_tables(list(read_part(data, schema, part))) for part in PARTS}
    used = sum(rows[file] for file in rows if not file.startswith(("log_random", "user", "video", "movies")))
    assert sum(table.num_rows for table in tables.values()) == used
    statistics = PartialStatistics.of(tables["train"], schema).finish(schema)
    inputs = Transform(schema, statistics)(tables["test"])
    # Hardly any value of the test part is new: types agree between the files, and joined columns are there.
    assert (inputs.ids > 1).mean() > 0.9
    labels, weights = task_labels(tables["train"], schema)
    assert weights.all()
    assert ((labels.mean(1) > 0.1) & (labels.mean(1) < 0.9)).all()


def test_census_as_ucis_test_file_reads(census: Path, server: FileServer, tmp_path: Path) -> None:
    # The rows of the real file, written as UCI writes them, come back as they were.
    real = pq.read_table(census / "full42.parquet").slice(0, 2000)
    lines = [
        ", ".join("" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in row.values())
        for row in real.to_pylist()
    ]
    text = "\n".join(lines).encode() + b"\n"
    archive = zipped({"census.tar.gz": tar({"census-income.data": text, "census-income.test": text})})
    rows = {"train.parquet": 2000, "test.parquet": 2000}
    fetch(small(load_fetch_config("census_income"), server.put("a", archive), archive, rows), tmp_path / "census")
    read = pq.read_table(tmp_path / "census" / "test.parquet")
    assert read.column_names == real.column_names
    for name in real.column_names:
        expected = real[name].cast(pa.string()) if pa.types.is_large_string(real[name].type) else real[name]
        if name == "instance_weight":
            np.testing.assert_allclose(read[name].to_numpy(), expected.to_numpy(), rtol=1e-5)
        else:
            assert read[name].equals(expected), name


def test_movielens_is_latin_1_and_codes_stay_text(server: FileServer, tmp_path: Path, archives: Any) -> None:
    archive, rows = archives["movielens_1m"]
    fetch(small(load_fetch_config("movielens_1m"), server.put("a", archive), archive, rows), tmp_path / "ml")
    movies = pq.read_table(tmp_path / "ml" / "movies.parquet").to_pydict()
    assert movies["title"][0] == "Misérables, Les (1951)"
    assert (movies["year"][0], movies["year"][-1], movies["genres"][-1]) == (1951, None, "Comedy")
    assert set(pq.read_table(tmp_path / "ml" / "users.parquet")["zip_code"].to_pylist()) == {"48067", "98107-2117"}


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"users.dat": b"1::F::1::10\n"}, r"'users.dat' is not in its documented format \(line 1 has 4 fields, not 5\)"),
        ({"ratings.dat": b"1::2::five::978300760\n"}, r"'ratings.dat' is not in its documented format \(invalid literal"),
        ({"movies.dat": b""}, r"'movies.dat' is not in its documented format \(it is empty\)"),
        (
            {"ratings.dat": b"1::2::5::978300760\n"},
            r"'ratings.dat' of 'http:.*' has 1 rows, not 600 as documented; fetch it again",
        ),
    ],
)
def test_an_archive_with_other_contents(
    server: FileServer, tmp_path: Path, archives: Any, members: dict[str, bytes], sentence: str
) -> None:
    whole, rows = archives["movielens_1m"]
    with zipfile.ZipFile(io.BytesIO(whole)) as box:
        archive = zipped({Path(name).name: box.read(name) for name in box.namelist()} | members)
    config = small(load_fetch_config("movielens_1m"), server.put("a", archive), archive, rows)
    with pytest.raises(UserError, match=sentence):
        fetch(config, tmp_path / "ml")
    # Nothing is left that a next call would take for good.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_census_file_with_too_few_columns(server: FileServer, tmp_path: Path) -> None:
    archive = zipped({"census.tar.gz": tar({"census-income.data": b"1, 2, 3\n", "census-income.test": b"1\n"})})
    config = small(
        load_fetch_config("census_income"), server.put("a", archive), archive, {"train.parquet": 1, "test.parquet": 1}
    )
    with pytest.raises(UserError, match=r"'census-income.data' is not in its documented format \(.*42 columns"):
        fetch(config, tmp_path / "census")


@pytest.mark.parametrize("where", ["_check_size", "_copy", "_write_parquet"])
def test_a_full_disk_keeps_the_download(
    server: FileServer, tmp_path: Path, archives: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    archive, rows = archives["movielens_1m"]
    config = small(load_fetch_config("movielens_1m"), server.put("a", archive), archive, rows)

    def full(*arguments: Any, **keys: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, where, full)
        with pytest.raises(UserError, match=r"the disk is full at '.*'; free some space and run the same command again"):
            fetch(config, tmp_path / "ml")
    assert [path.name for path in tmp_path.iterdir()] == ["ml.download"]
    fetch(config, tmp_path / "ml")
    assert len(server.requests) == (2 if where == "_check_size" else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


def test_a_second_fetch_of_a_set_is_told_of_the_first(server: FileServer, tmp_path: Path, archives: Any) -> None:
    archive, rows = archives["movielens_1m"]
    config = small(load_fetch_config("movielens_1m"), server.put("a", archive), archive, rows)
    sentences = []

    def again(phase: str, done: int, total: int) -> None:
        with pytest.raises(UserError, match=r"another fetch is at work in '.*ml.download'; wait for it") as caught:
            fetch(config, tmp_path / "ml")
        sentences.append(str(caught.value))

    fetch(config, tmp_path / "ml", again)
    assert sentences
    assert len(server.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


def test_a_folder_that_holds_something_else(server: FileServer, tmp_path: Path, archives: Any) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine' exists already; name a new folder or delete it"):
        fetch(load_fetch_config("movielens_1m"), tmp_path / "mine")
    archive, rows = archives["movielens_1m"]
    fetch(small(load_fetch_config("movielens_1m"), server.put("a", archive), archive, rows), tmp_path / "ml")
    with pytest.raises(UserError, match=r"ml' holds movielens_1m, not census_income; name another folder"):
        fetch(load_fetch_config("census_income"), tmp_path / "ml")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\); choose another folder"):
        fetch(load_fetch_config("movielens_1m"), tmp_path / "file" / "ml")


def test_the_command_checks_what_a_mirror_sends(server: FileServer, tmp_path: Path, archives: Any) -> None:
    url = server.put("ml.zip", archives["movielens_1m"][0])
    command = [sys.executable, "-m", "recsys_moe", "data", "fetch", "movielens_1m", "--url", url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "not a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20 as documented" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_official_addresses_are_encrypted_and_checked() -> None:
    for name in ARCHIVES:
        config = load_fetch_config(name)
        assert config.url.startswith("https://")
        # By a digest, or where none is published by the rows of each file.
        assert config.digest or all(file.rows for file in config.files)
