"""Log rows in object storage: an S3 server on loopback, and sentences for all that a bucket may refuse."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from recsys_moe import storage
from recsys_moe.describe import describe
from recsys_moe.errors import UserError
from recsys_moe.schema import Schema
from recsys_moe.sources import DataConfig, Join, Split, digest_files, list_files, open_parquet, read_part, read_rows
from recsys_moe.storage import Remote, locate
from recsys_moe.typed import parse

SCHEMA: Schema = parse(
    Schema,
    {
        "features": [
            {"name": "code", "kind": "categorical"},
            {"name": "x", "kind": "numeric"},
            {"name": "age", "kind": "numeric"},
        ],
        "tasks": [{"name": "t", "label": "y == 1"}],
    },
    "schema",
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[pafs.FileSystem]:
    """Two days of rows, a day of CSV and a table of users, in s3://shop."""
    connected_to(server, monkeypatch)
    made = pafs.S3FileSystem(endpoint_override=server, allow_bucket_creation=True, allow_bucket_deletion=True)
    made.create_dir("shop")
    pq.write_table(rows(0), "shop/logs/a.parquet", filesystem=made, row_group_size=40)
    pq.write_table(rows(1), "shop/logs/b.parquet", filesystem=made)
    pq.write_table(rows(1), "shop/logs/deeper/c.parquet", filesystem=made)
    with made.open_output_stream("shop/csv/d.csv.gz", compression="gzip") as out:
        pyarrow.csv.write_csv(rows(2), out)
    pq.write_table(pa.table({"user": range(10), "age": range(20, 30)}), "shop/users.parquet", filesystem=made)
    yield made
    made.delete_dir("shop")


def connected_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "very-secret", "REGION": "us-east-1", "ENDPOINT_URL": url}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    storage._connect.cache_clear()


def rows(day: int, count: int = 100) -> pa.Table:
    random = np.random.default_rng(day)
    code = [f"{n:03d}" for n in random.integers(0, 9, count)]
    columns = {"code": code, "x": random.normal(size=count).round(3), "y": np.arange(count) % 2, "user": np.arange(count) % 10}
    return pa.table(columns)


def data(source: str, **keys: Any) -> DataConfig:
    return DataConfig(name="d", source=source, schema="-", **keys)


def test_rows_and_joined_tables_are_those_of_local_files(bucket: pafs.FileSystem, tmp_path: Path) -> None:
    pafs.copy_files("shop", str(tmp_path), source_filesystem=bucket, destination_filesystem=pafs.LocalFileSystem())
    split = Split(order="permuted", seed=3)
    for folder, files in (("logs", ("*.parquet",)), ("logs", ("**/*.parquet",)), ("csv", ("*.csv.gz",))):
        here, there = (
            data(source, files=files, split=split, join=(Join(users, "user"),))
            for source, users in (
                (str(tmp_path / folder), "../users.parquet"),
                (f"s3://shop/{folder}/", "s3://shop/users.parquet"),
            )
        )
        for part in ("train", "test"):
            mine, theirs = (pa.concat_tables(read_part(config, SCHEMA, part)) for config in (here, there))
            assert mine.num_rows
            assert mine.equals(theirs)
    names = [str(path) for path in list_files(data("s3://shop/logs"))[0]]
    assert names == ["s3://shop/logs/a.parquet", "s3://shop/logs/b.parquet"]


@pytest.mark.parametrize("key", ["a#b", "a b", "what?", "100%", "a%20b", "[1]", "a*b"])
def test_a_key_is_any_text(bucket: pafs.FileSystem, key: str) -> None:
    pq.write_table(rows(3), f"shop/{key}/{key}.parquet", filesystem=bucket)
    pq.write_table(rows(4), "shop/a/a.parquet", filesystem=bucket)  # which nothing of the key may be taken for
    place = locate(f"s3://shop/{key}/{key}.parquet")
    assert locate(str(place)) == place
    assert open_parquet(place).metadata.num_rows == 100
    assert list_files(data(f"s3://shop/{key}"))[0] == [place]
    assert describe(locate(f"s3://shop/{key}"), ["y"]).rows == 100


def test_a_file_that_is_written_anew_has_another_digest(bucket: pafs.FileSystem) -> None:
    paths = [locate("s3://shop/logs/a.parquet")]
    before = digest_files(paths)
    assert digest_files(paths) == before
    pq.write_table(rows(7), "shop/logs/a.parquet", filesystem=bucket)
    assert digest_files(paths) != before


def test_a_bucket_is_described(bucket: pafs.FileSystem) -> None:
    found = describe(locate("s3://shop/logs"), ["y"])
    assert found.rows == 200
    assert "data.source=s3://shop/logs" in found.train_command(Path("shop.yaml"))


def test_a_file_is_put_whole(bucket: pafs.FileSystem, tmp_path: Path) -> None:
    (tmp_path / "scores").write_bytes(b"whole")
    storage.put(tmp_path / "scores", locate("s3://shop/out/scores.parquet"))
    assert bucket.open_input_file("shop/out/scores.parquet").read() == b"whole"
    assert not (tmp_path / "scores").exists()
    (tmp_path / "scores").write_bytes(b"whole")
    with pytest.raises(UserError, match="'s3://nowhere/x' is in a bucket that does not exist"):
        storage.put(tmp_path / "scores", locate("s3://nowhere/x"))


@pytest.mark.parametrize("source", ["s3://shop/none", "s3://nowhere/logs"])
def test_what_is_not_there(bucket: pafs.FileSystem, source: str) -> None:
    with pytest.raises(UserError, match=rf"data.source '{source}' does not exist"):
        list_files(data(source))
    with pytest.raises(UserError, match=rf"'{source}' does not exist"):
        next(read_rows(locate(source), SCHEMA))


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connected_to(f"http://127.0.0.1:{port}", monkeypatch)
    start = time.monotonic()
    with pytest.raises(UserError, match="'s3://shop/logs' does not answer; check the network") as caught:
        list_files(data("s3://shop/logs"))
    assert time.monotonic() - start < 20
    assert "secret" not in str(caught.value)


def test_access_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        connected_to(f"http://127.0.0.1:{refusing.server_address[1]}", monkeypatch)
        with pytest.raises(UserError, match="'s3://shop/logs' may not be read or written with the credentials"):
            list_files(data("s3://shop/logs"))
        refusing.shutdown()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:very-secret@shop/logs",
        "s3://shop/logs?access_key=very-secret",
        "gs://shop/logs?endpoint_override=localhost&token=very-secret",
        "hdfs://host:1/logs?kerb_ticket=very-secret",
        "s3://shop/logs?token=very-secret#region=eu-west-1",
    ],
)
def test_credentials_in_an_uri_are_refused_and_not_repeated(uri: str) -> None:
    for where in ({"source": uri}, {"source": "logs", "join": ({"file": uri, "key": "user"},)}):
        with pytest.raises(UserError, match="holds a name, a key or a token") as caught:
            parse(DataConfig, {"name": "d", "schema": "-", **where}, "data")
        assert "secret" not in str(caught.value)


def test_other_uris() -> None:
    with pytest.raises(UserError, match="ftp:// can't be read"):
        locate("ftp://host/x")
    with pytest.raises(UserError, match="names no bucket"):
        locate("s3:///x")
    with pytest.raises(UserError, match="runs_dir 's3://shop/runs' must be a path on this machine"):
        storage.only_local("s3://shop/runs", "runs_dir")
    place = locate("s3://shop/logs/?region=eu-west-1&endpoint_override=localhost")
    assert isinstance(place, Remote)
    assert locate(str(place)) == place
    assert (place / "a.csv.gz").suffix == ".gz"
    assert locate("logs") == Path("logs").absolute()


def test_hadoop_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise OSError("Unable to load libhdfs: ./libhdfs.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(pafs, "HadoopFileSystem", absent)
    storage._connect.cache_clear()
    with pytest.raises(UserError, match="needs Hadoop's client"):
        list_files(data("hdfs://host:8020/logs"))
