"""Reading log files and sharing out their rows, against naive numpy and pandas."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe import sources
from recsys_moe.config import compose, conf_dir
from recsys_moe.describe import describe
from recsys_moe.errors import UserError
from recsys_moe.expressions import Expression
from recsys_moe.schema import Schema
from recsys_moe.sources import (
    PARTS,
    DataConfig,
    Join,
    Split,
    count_rows,
    digest_files,
    list_files,
    list_joins,
    plan_chunks,
    read_part,
    read_rows,
)
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import dump, parse

SCHEMA: Schema = parse(
    Schema,
    {
        "features": [{"name": "code", "kind": "categorical"}, {"name": "x", "kind": "numeric"}],
        "tasks": [{"name": "t", "label": "y == 1"}],
        "group": "row",
    },
    "schema",
)


def table(rows: int, start: int = 0) -> pa.Table:
    """`row` numbers the rows through all files, so that a test can see where each one went."""
    row = np.arange(start, start + rows)
    return pa.table({"code": [f"{r:03d}" for r in row], "x": row / 4, "y": row % 2, "row": row, "unused": row})


def data(source: Path, **keys: Any) -> DataConfig:
    return DataConfig(name="d", source=str(source), schema="-", **keys)


def rows_of(config: DataConfig, part: str) -> list[int]:
    return [row for piece in read_part(config, SCHEMA, part) for row in piece["row"].to_pylist()]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """100 rows in a.parquet (row groups of 30) and 37 rows in b.parquet."""
    pq.write_table(table(100), tmp_path / "a.parquet", row_group_size=30)
    pq.write_table(table(37, 100), tmp_path / "b.parquet")
    return tmp_path


def test_permuted_is_numpys_permutation_by_seed(parquet: Path) -> None:
    config = data(parquet, split=Split(train=70, validation=20, test=10, order="permuted", seed=5))
    order = np.random.default_rng(5).permutation(137)
    # Which rows go where is the permutation's; within a part they keep the files' order. Rows beyond the sizes are unused.
    assert rows_of(config, "train") == sorted(order[:70])
    assert rows_of(config, "validation") == sorted(order[70:90])
    assert rows_of(config, "test") == sorted(order[90:100])


def test_given_order_splits_in_time_order(parquet: Path) -> None:
    config = data(parquet, split=Split(train=0.8, validation=0.1, test=0.1, order="given"))
    # 137 rows: 109.6 → 110, 13.7 → 14, and the last part takes what is left.
    assert rows_of(config, "train") == list(range(110))
    assert rows_of(config, "validation") == list(range(110, 124))
    assert rows_of(config, "test") == list(range(124, 137))


def test_held_out_files_are_shared_out_and_files_are_the_training_part_whole(parquet: Path) -> None:
    split = Split(validation=0.5, test=0.5, order="permuted", seed=0)
    config = data(parquet, files=("a.parquet",), held_out=("b.parquet",), split=split)
    order = 100 + np.random.default_rng(0).permutation(37)
    assert rows_of(config, "train") == list(range(100))
    assert rows_of(config, "validation") == sorted(order[:19])  # 18.5 rounds up
    assert rows_of(config, "test") == sorted(order[19:])


def test_a_held_out_file_is_never_trained_on(parquet: Path) -> None:
    # The default `files` matches everything in the folder, the held-out file too.
    config = data(parquet, held_out=("b.parquet",), split=Split(validation=0.5, test=0.5))
    assert rows_of(config, "train") == list(range(100))
    assert sorted(rows_of(config, "validation") + rows_of(config, "test")) == list(range(100, 137))
    (parquet / "link.parquet").symlink_to("b.parquet")
    assert rows_of(config, "train") == list(range(100))


def test_a_file_that_two_patterns_match_counts_once(parquet: Path) -> None:
    (parquet / "link.parquet").symlink_to("a.parquet")
    files, held_out = list_files(data(parquet, files=("b.parquet", "*.parquet", "a*", f"../{parquet.name}/a.parquet")))
    assert [path.name for path in files] == ["b.parquet", "a.parquet"]
    assert held_out == []
    files, held_out = list_files(data(parquet, files=("a.parquet",), held_out=("b*", "b.parquet")))
    assert [path.name for path in held_out] == ["b.parquet"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"files": ("*.parquet",), "held_out": ("*",)}, "data.held_out matches every file that data.files matches"),
        (
            {"files": ("b.parquet", "a*"), "held_out": ("b.parquet",)},
            "data.files names 'b.parquet', which data.held_out matches",
        ),
        ({"files": ("b.parquet",), "held_out": ("*.parquet",)}, "data.files names 'b.parquet', which data.held_out matches"),
    ],
)
def test_files_that_are_named_for_training_and_held_out(parquet: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(parquet, **keys), SCHEMA)


def test_held_out_needs_a_folder(parquet: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.held_out \['b.parquet'\] needs a folder, but data.source .*a.parquet' is a file"
    ):
        list_files(data(parquet / "a.parquet", held_out=("b.parquet",)))


def test_a_pattern_that_matches_a_folder(parquet: Path) -> None:
    (parquet / "written_by_spark.parquet").mkdir()
    with pytest.raises(UserError, match=r"'\*.parquet' matches the folder .*written_by_spark.parquet'; name the files in it"):
        list_files(data(parquet))


@given(
    rows=st.integers(20, 400),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.6, 0.2, 0.2), (0.7, 0.15, 0.15)]),
    order=st.sampled_from(["given", "permuted"]),
)
def test_shares_that_sum_to_one_use_every_row_once(rows: int, shares: tuple[float, float, float], order: Any) -> None:
    parts = sources._share_out(Split(*shares, order=order), rows, (0, 1, 2))
    counts = np.bincount(parts, minlength=3)
    assert counts.sum() == rows
    assert np.abs(counts - rows * np.array(shares)).max() <= 1


@given(rows=st.integers(30, 400), folds=st.integers(2, 5))
def test_folds_of_a_permutation_test_every_row_once(rows: int, folds: int) -> None:
    split = Split(validation=0.1, folds=folds, seed=3)
    parts = np.stack([sources._share_out(replace(split, fold=fold), rows, (0, 1, 2)) for fold in range(folds)])
    assert ((parts == 2).sum(0) == 1).all()
    assert ((parts >= 0).all(1)).all()  # what is neither tested nor validated on is trained on
    assert {int((fold == 1).sum()) for fold in parts} == {int(rows * 0.1 + 0.5)}
    first = np.random.default_rng(3).permutation(rows)[: rows // folds]
    assert (parts[0, first] == 2).all()


@given(rows=st.integers(50, 400), folds=st.integers(2, 4))
def test_folds_in_time_are_tested_by_what_came_before(rows: int, folds: int) -> None:
    keys = np.random.default_rng(0).permutation(rows)
    split = Split(order="sorted", by="t", validation=0.1, test=0.1, folds=folds)
    last = -1
    for fold in range(folds):
        parts = sources._share_out(replace(split, fold=fold), rows, (0, 1, 2), keys)
        trained, held, tested = (keys[parts == part] for part in range(3))
        assert trained.max() < held.min() <= held.max() < tested.min()
        assert len(trained) + len(held) == tested.min()
        assert tested.min() > last
        last = tested.max()
    assert last == rows - 1


def test_folds_that_are_none_are_refused(parquet: Path) -> None:
    with pytest.raises(ValueError, match=r"'data.split.fold' is 3, but data.split.folds is 3"):
        Split(folds=3, fold=3)
    with pytest.raises(UserError, match="leaves a part of fold 0 empty"):
        plan_chunks(data(parquet, split=Split(order="given", folds=9, test=0.1)), SCHEMA)
    with pytest.raises(UserError, match=r"leave data.held_out empty"):
        plan_chunks(data(parquet, held_out=("b.parquet",), split=Split(folds=3)), SCHEMA)


def test_files_are_numbered_in_the_order_of_the_patterns_then_by_name(parquet: Path) -> None:
    pq.write_table(table(5, 200), parquet / "c.parquet")
    config = data(parquet, files=("c.parquet", "[ab].parquet"), split=Split(train=5, validation=100, test=37, order="given"))
    assert rows_of(config, "train") == list(range(200, 205))
    assert rows_of(config, "validation") == list(range(100))


@pytest.mark.parametrize("chunk_rows", [1, 7, 30, 64, 1000])
def test_chunks_cover_every_row_once_whatever_their_size(parquet: Path, chunk_rows: int) -> None:
    config = data(parquet, split=Split(order="permuted"))
    whole = np.concatenate([c.parts for c in plan_chunks(config, SCHEMA)])
    chunks = plan_chunks(config, SCHEMA, chunk_rows)
    assert max(len(c.parts) for c in chunks) <= chunk_rows
    assert [c.index for c in chunks] == list(range(len(chunks)))
    # The protocol must not depend on how the work is cut.
    assert np.array_equal(np.concatenate([c.parts for c in chunks]), whole)
    for chunk in chunks:
        rows = []
        for piece, parts in sources.read_chunk(chunk, SCHEMA):
            assert len(parts) == piece.num_rows
            rows += piece["row"].to_pylist()
        assert rows == list(range(chunk.start, chunk.start + len(chunk.parts)))


def test_views_read_like_strings(tmp_path: Path) -> None:
    # As polars and DuckDB write texts.
    plain = table(20)
    views = plain.set_column(0, "code", plain["code"].cast(pa.string_view()))
    tags = [[code, "all"] for code in plain["code"].to_pylist()]
    views = views.append_column("tags", pa.array(tags, pa.list_(pa.string_view())))
    views = views.append_column("bytes", plain["code"].cast(pa.binary()).cast(pa.binary_view()))
    pq.write_table(views, tmp_path / "views.parquet")
    features = [{"name": "tags", "kind": "multi"}, *({"name": n, "kind": "categorical"} for n in ("code", "bytes"))]
    label = "code == '003'"  # a view in an expression
    schema: Schema = parse(Schema, {"features": features, "tasks": [{"name": "t", "label": "y == 1"}]}, "schema")
    rows = pa.concat_tables(read_rows(tmp_path / "views.parquet", schema))
    assert Expression(label)(rows).to_pylist() == [n == 3 for n in range(20)]
    transform = Transform(schema, PartialStatistics.of(rows, schema).finish(schema))
    inputs = transform(rows)
    assert inputs.ids[0].tolist() == inputs.ids[1].tolist() == list(range(2, 22))
    assert np.diff(inputs.lists[0].offsets).tolist() == [2] * 20
    found = describe(tmp_path / "views.parquet", ["y"])
    assert {c.name: c.use for c in found.columns}["tags"] == "feature"


def test_only_the_schemas_columns_are_read(parquet: Path) -> None:
    (piece,) = read_rows(parquet / "b.parquet", SCHEMA)
    assert piece.column_names == ["code", "x", "y", "row"]
    (piece,) = read_rows(parquet / "b.parquet", SCHEMA, labels=False)
    assert piece.column_names == ["code", "x"]
    assert piece.equals(table(37, 100).select(["code", "x"]))


def test_a_row_to_score_needs_no_label_columns(tmp_path: Path) -> None:
    pq.write_table(table(5).drop_columns(["y", "row"]), tmp_path / "new.parquet")
    assert count_rows(tmp_path / "new.parquet", SCHEMA) == 5
    with pytest.raises(UserError, match="label column 'y'"):
        count_rows(tmp_path / "new.parquet", SCHEMA, labels=True)


def test_csv_reads_like_parquet(tmp_path: Path) -> None:
    frame = table(137).to_pandas()
    frame.loc[3, ["code", "x"]] = None
    frame.to_csv(tmp_path / "a.csv", index=False)
    read = pa.concat_tables(list(read_rows(tmp_path / "a.csv", SCHEMA))).to_pandas()
    # Categories stay as written: "007" is not 7.
    assert read["code"][7] == "007"
    pd.testing.assert_frame_equal(read, frame[["code", "x", "y", "row"]], check_dtype=False)


def test_csv_is_one_chunk_and_split_like_parquet(tmp_path: Path, parquet: Path) -> None:
    csv = tmp_path / "csv"
    csv.mkdir()
    for name in ("a", "b"):
        pq.read_table(parquet / f"{name}.parquet").to_pandas().to_csv(csv / f"{name}.csv", index=False)
    split = Split(order="permuted", seed=3)
    chunks = plan_chunks(data(csv, split=split), SCHEMA, chunk_rows=10)
    assert [len(c.parts) for c in chunks] == [100, 37]
    for part in PARTS:
        assert rows_of(data(csv, split=split), part) == rows_of(data(parquet, split=split), part)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.CSV", "A.Csv.GZ"])
def test_csv_is_known_by_its_suffix(tmp_path: Path, name: str) -> None:
    frame = table(137).to_pandas()
    frame.to_csv(tmp_path / "plain.csv", index=False)
    content = (tmp_path / "plain.csv").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    (expected,), (read,) = read_rows(tmp_path / "plain.csv", SCHEMA), read_rows(tmp_path / name, SCHEMA)
    assert read.equals(expected)
    assert count_rows(tmp_path / name, SCHEMA) == 137


@pytest.mark.parametrize("name", ["a.csv.gz", "A.CSV"])
def test_every_suffix_of_csv_is_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert [path.name for path in list_files(data(tmp_path))[0]] == [name]


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b[:10] + b"no deflate", lambda b: b"code,x,y,row"])
def test_a_damaged_gzip_file(tmp_path: Path, harm: Any) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(harm(gzip.compress(table(5000).to_pandas().to_csv(index=False).encode())))
    with pytest.raises(UserError, match=r"a.csv.gz' can't be read as CSV \(.*\)"):
        plan_chunks(data(tmp_path), SCHEMA)


def test_csv_header_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    # As spreadsheets export it.
    (tmp_path / "a.csv").write_bytes('\ufeff"code","x","y","row"\r\n"a, b",1.5,1,0\r\n'.encode())
    (piece,) = read_rows(tmp_path / "a.csv", SCHEMA)
    assert piece.to_pylist() == [{"code": "a, b", "x": 1.5, "y": 1, "row": 0}]


def test_csv_label_that_is_missing_in_the_first_megabyte(tmp_path: Path) -> None:
    # The reader guesses a column's type from its first block: a label that is logged only later must not break it.
    lines = [f"{'a' * 100},1,{'' if row < 15_000 else row % 2},{row}" for row in range(16_000)]
    (tmp_path / "a.csv").write_text("\n".join(["code,x,y,row", *lines]) + "\n")
    pieces = list(read_rows(tmp_path / "a.csv", SCHEMA))
    labels = [y for piece in pieces for y in piece["y"].to_pylist()]
    assert labels == [None] * 15_000 + [0, 1] * 500


def test_a_single_file_may_be_the_source(parquet: Path) -> None:
    config = data(parquet / "b.parquet", split=Split(train=30, validation=4, test=3, order="given"))
    assert rows_of(config, "test") == [134, 135, 136]


def test_digest_changes_with_contents_and_names(parquet: Path) -> None:
    paths = [parquet / "a.parquet", parquet / "b.parquet"]
    before = digest_files(paths)
    assert digest_files(paths) == before
    assert digest_files(paths[::-1]) != before
    pq.write_table(table(38, 100), paths[1])
    assert digest_files(paths) != before


def without(column: str) -> pa.Table:
    return table(10).drop_columns([column])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ("y", "label column 'y' is not in"),
        ("code", "feature column 'code' is not in"),
        ("row", "group column 'row' is not in"),
    ],
)
def test_a_column_that_is_not_there(tmp_path: Path, suffix: str, column: str, sentence: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        without(column).to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(without(column), path)
    with pytest.raises(UserError, match=f"{sentence} .*a.{suffix}"):
        plan_chunks(data(tmp_path), SCHEMA)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_column_that_is_there_twice(tmp_path: Path, suffix: str) -> None:
    doubled = table(10).append_column("y", pa.array([1] * 10))
    if suffix == "csv":
        (tmp_path / "a.csv").write_text("code,x,y,row,y\na,1.5,1,0,1\n")
    else:
        pq.write_table(doubled, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"column 'y' stands in .*a.{suffix}' more than once; rename or remove"):
        plan_chunks(data(tmp_path), SCHEMA)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("header", [False, True], ids=["no bytes", "no rows"])
def test_an_empty_file(tmp_path: Path, suffix: str, header: bool) -> None:
    path = tmp_path / f"a.{suffix}"
    path.touch()
    if header and suffix == "csv":
        path.write_text("code,x,y,row\n")
    elif header:
        pq.write_table(table(0), path)
    with pytest.raises(UserError, match=f"a.{suffix}' is empty"):
        plan_chunks(data(tmp_path), SCHEMA)
    with pytest.raises(UserError, match=f"a.{suffix}' is empty"):
        list(read_rows(path, SCHEMA))


@pytest.mark.parametrize("name", ["absent.parquet", "absent.csv"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}' does not exist; name a Parquet or CSV file"):
        list(read_rows(tmp_path / name, SCHEMA))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}' is a folder; name a Parquet or CSV file"):
        list(read_rows(tmp_path / name, SCHEMA))


def test_a_truncated_parquet_file(parquet: Path) -> None:
    path = parquet / "a.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.parquet' is not a whole Parquet file \(.*\); write or fetch it again"):
        plan_chunks(data(parquet), SCHEMA)


def test_a_parquet_file_with_damaged_pages(parquet: Path) -> None:
    # The footer is whole, so that only reading the rows can find it out.
    path = parquet / "a.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = bytes(396)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet' is not a whole Parquet file"):
        list(read_part(data(parquet), SCHEMA, "train"))


@pytest.mark.parametrize(("column", "role"), [("y", "label"), ("x", "feature")])
def test_a_number_in_one_file_and_text_in_another_names_both(parquet: Path, column: str, role: str) -> None:
    path = parquet / "b.parquet"
    rows = pq.read_table(path)
    place = rows.column_names.index(column)
    text = rows.set_column(place, column, rows[column].cast(pa.string()))
    pq.write_table(text, path)
    sentence = rf"{role} column '{column}' is \w+ in '.*/a.parquet' and string in '.*/b.parquet'; write it in one type"
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(parquet), SCHEMA)
    if role == "label":  # what a feature of CSV is, the schema says
        path.unlink()
        text.set_column(place, column, pa.array(["yes", *text[column][1:].to_pylist()])).to_pandas().to_csv(
            parquet / "b.csv", index=False
        )
        with pytest.raises(UserError, match=sentence.replace("b.parquet", "b.csv")):
            plan_chunks(data(parquet), SCHEMA)
        (parquet / "b.csv").unlink()
    pq.write_table(rows.set_column(place, column, rows[column].cast(pa.float32())), path)
    assert plan_chunks(data(parquet), SCHEMA)  # numbers of any width are numbers


def test_a_string_in_a_numeric_csv_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("code,x,y,row\na,1.5,1,0\nb,many,0,1\n")
    sentence = r"a.csv' can't be read as CSV \(column 'x': row 3, the header being row 1: .* 'many'\); .*kind: categorical"
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(tmp_path), SCHEMA)


def test_a_row_of_a_csv_file_with_too_few_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("code,x,y,row\n" + "a,1.5,1,0\n" * 300_000 + "b,1\n")  # of several blocks
    with pytest.raises(UserError, match=r"row 300002, the header being row 1: Expected 4 columns, got 2: b,1\); mend"):
        plan_chunks(data(tmp_path), SCHEMA)


@pytest.mark.parametrize("content", ["code,x,y,row\na,1,1,0\n".encode("utf-16"), b"PAR1\0\n\1", b"x" * 200_000])
def test_what_is_called_csv_and_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a.csv' can't be read as CSV \(.*\); mend the file") as error:
        plan_chunks(data(tmp_path), SCHEMA)
    assert str(error.value).isprintable()


def test_a_label_without_values_in_one_csv_file_has_no_type_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("code,x,y,row\n" + "a,1.5,yes,0\n" * 20)
    (tmp_path / "b.csv").write_text("code,x,y,row\n" + "a,1.5,,0\n" * 20)
    schema = parse(Schema, dump(SCHEMA) | {"tasks": [{"name": "t", "label": "y == 'yes'"}]}, "schema")
    rows = pa.concat_tables(read_part(data(tmp_path), schema, "train"), promote_options="default")
    assert set(rows["y"].to_pylist()) == {"yes", None}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"files": ("z*.parquet",)}, r"data.files: no file matches 'z\*.parquet'"),
        ({"held_out": ("z.parquet",)}, "data.held_out: no file matches 'z.parquet'"),
        ({"files": ("/z.parquet",)}, "data.files: '/z.parquet' is no pattern below"),
        ({"files": ("",)}, "data.files: '' is no pattern below"),
        ({"split": Split(train=100, validation=30, test=30)}, r"asks for 100 \+ 30 \+ 30 of 137 rows"),
        ({"split": Split(train=0.9, validation=0.001, test=0.099)}, "leaves a part empty"),
    ],
)
def test_a_protocol_that_the_files_cannot_fill(parquet: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(parquet, **keys), SCHEMA)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name the folder or file"):
        plan_chunks(data(tmp_path / "absent"), SCHEMA)
    with pytest.raises(UserError, match=r"no file in .* matches any of \*.parquet, \*.csv"):
        plan_chunks(data(tmp_path), SCHEMA)


def test_the_census_protocol_by_hand(census: Path) -> None:
    # The figures that others publish stand on exactly these rows.
    schema = parse(
        Schema,
        {
            "features": [{"name": "age", "kind": "numeric"}],
            "tasks": [{"name": "married", "label": "marital_stat == 'Never married'"}],
        },
        "schema",
    )
    split = Split(train=79762, validation=10000, test=10000, order="permuted", seed=0)
    config = DataConfig(name="c", source=str(census), schema="-", files=("full42.parquet",), split=split)
    ages = pd.read_parquet(census / "full42.parquet", columns=["age"])["age"].to_numpy()
    order = np.random.default_rng(0).permutation(len(ages))
    test = pa.concat_tables(list(read_part(config, schema, "test")))["age"].to_numpy()
    assert np.array_equal(test, ages[np.sort(order[89762:])])


@pytest.fixture
def unsorted(tmp_path: Path) -> Path:
    """The 137 rows of `parquet` with a time that rises in another order; ten rows share each time."""
    time = np.random.default_rng(7).permutation(137) // 10
    for name, low, high in (("a", 0, 100), ("b", 100, 137)):
        pq.write_table(table(high - low, low).append_column("time", pa.array(time[low:high])), tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize("kind", ["int", "float", "timestamp", "text", "date"])
def test_sorted_is_a_stable_sort_by_a_column(unsorted: Path, kind: str) -> None:
    paths = sorted(unsorted.glob("*.parquet"))
    time = pa.concat_tables([pq.read_table(path) for path in paths])["time"].to_numpy()
    for path in paths:
        read = pq.read_table(path)
        values = read["time"].to_numpy()
        days = np.datetime64("2022-04-08") + values.astype("timedelta64[D]")
        forms: dict[str, Any] = {
            "int": values,
            "float": values / 4,
            "timestamp": pa.array(days.astype("datetime64[ns]"), pa.timestamp("ns", "UTC")),
            "text": [f"{day} 08:00:00" for day in days],
            "date": days,
        }
        pq.write_table(read.set_column(5, "time", pa.array(forms[kind])), path)
    order = np.argsort(time, kind="stable")
    config = data(unsorted, split=Split(order="sorted", by="time", train=0.8, validation=0.1, test=0.1))
    assert rows_of(config, "train") == sorted(order[:110])
    assert rows_of(config, "validation") == sorted(order[110:124])
    assert rows_of(config, "test") == sorted(order[124:])
    held_out = data(unsorted, held_out=("b.parquet",), split=Split(order="sorted", by="time", validation=0.5, test=0.5))
    order = 100 + np.argsort(time[100:], kind="stable")
    assert rows_of(held_out, "train") == list(range(100))
    assert rows_of(held_out, "test") == sorted(order[19:])


def test_csv_is_sorted_as_parquet_is(unsorted: Path, tmp_path: Path) -> None:
    split = Split(order="sorted", by="time")
    expected = rows_of(data(unsorted, split=split), "test")
    for path in unsorted.glob("*.parquet"):
        pq.read_table(path).to_pandas().to_csv(path.with_suffix(".csv"), index=False)
        path.unlink()
    assert rows_of(data(unsorted, split=split), "test") == expected


def test_what_nothing_can_be_sorted_by(unsorted: Path) -> None:
    for by, sentence in (
        ("code", "data.split.by: column 'code' of .* is '000' in row 0 .*, which is neither a number nor a time"),
        ("tiem", "key column 'tiem' is not in .*; did you mean 'time'"),
    ):
        if by == "code":
            renamed = pq.read_table(unsorted / "a.parquet")
            letters = pa.array([f"x{n}" for n in range(100)])
            pq.write_table(renamed.append_column("letters", letters), unsorted / "a.parquet")
            by, sentence = "letters", sentence.replace("'code'", "'letters'").replace("'000'", "'x0'")
        with pytest.raises(UserError, match=sentence):
            plan_chunks(data(unsorted / "a.parquet", split=Split(order="sorted", by=by)), SCHEMA)


@pytest.mark.parametrize(("hole", "told"), [(None, "null"), (float("nan"), "nan")])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_row_without_a_place_in_the_order_is_named_by_its_number_in_the_file(
    hole: float | None, told: str, suffix: str, tmp_path: Path
) -> None:
    times = [float(n) for n in range(200_000)]  # of several blocks, in either format
    times[150_000:] = [hole, hole, *times[150_002:]]
    table = pa.table({"time": pa.array(times, pa.float64(), from_pandas=False), "x": times, "clicked": [0, 1] * 100_000})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        lines = (f"{'' if time is None else time},1,0\n" for time in times)
        (tmp_path / "a.csv").write_text("time,x,clicked\n" + "".join(lines))
    sentence = rf"column 'time' of .*a.{suffix}' is {told} in row 150,000 \(counted from 0\), .*; leave such rows out"
    features = [{"name": "x", "kind": "numeric"}]
    schema = parse(Schema, {"features": features, "tasks": [{"name": "t", "label": "clicked == 1"}]}, "schema")
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(tmp_path, split=Split(order="sorted", by="time")), schema)


NAIVE, ZONED = pa.timestamp("us"), pa.timestamp("us", "Europe/Berlin")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_times_with_and_without_a_zone_have_no_common_order(tmp_path: Path, suffix: str) -> None:
    hours = pa.array([3_600_000_000 * n for n in range(20)])
    for name, kind in (("a", ZONED), ("b", ZONED), ("c", NAIVE)):
        table = pa.table({"x": np.arange(20.0), "time": hours.cast(NAIVE).cast(kind), "clicked": [0, 1] * 10})
        if suffix == "parquet":
            pq.write_table(table, tmp_path / f"{name}.parquet")
        else:
            table.to_pandas().to_csv(tmp_path / f"{name}.csv", index=False)
    features = [{"name": "x", "kind": "numeric"}]
    schema = parse(Schema, {"features": features, "tasks": [{"name": "t", "label": "clicked == 1"}]}, "schema")
    sentence = r"column 'time' holds times with a time zone in .*/a\.\w+' and times in .*/c\.\w+', which have no common order"
    with pytest.raises(UserError, match=sentence):
        plan_chunks(data(tmp_path, split=Split(order="sorted", by="time")), schema)
    (tmp_path / f"c.{suffix}").unlink()
    assert plan_chunks(data(tmp_path, split=Split(order="sorted", by="time")), schema)


@pytest.mark.parametrize("keys", [{"order": "sorted"}, {"by": "time"}, {"order": "given", "by": "time"}])
def test_sorting_needs_a_column_and_a_column_needs_sorting(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"'data.split.by' is .* with data.split.order=\w+; name a column with order=sorted"):
        parse(Split, keys, "split")


JOINED: Schema = parse(
    Schema,
    {
        "features": [
            {"name": "code", "kind": "categorical"},
            {"name": "city", "kind": "categorical"},
            {"name": "age", "kind": "numeric"},
            {"name": "genre", "kind": "categorical"},
        ],
        "tasks": [{"name": "t", "label": "y == 1"}],
        "group": "user",
    },
    "schema",
)


def joined_data(folder: Path, users: str = "users.parquet", text_keys: bool = False) -> tuple[DataConfig, pd.DataFrame]:
    """Logs in two files, users and items beside them; some users are unknown, some rows name none."""
    r = np.random.default_rng(3)
    logs = pd.DataFrame({"code": [f"c{n}" for n in range(60)], "user": r.integers(0, 9, 60), "item": r.choice(["x", "y"], 60)})
    logs["y"] = r.integers(0, 2, 60)
    logs["user"] = logs["user"].astype("Int64").mask(logs["user"] == 8)
    people = pd.DataFrame({"age": r.normal(size=7), "user": np.arange(7), "city": list("pqrstuv"), "unused": 1})
    items = pd.DataFrame({"item": ["y", "x"], "genre": ["drama", "news"], "code": "not this one"})
    if text_keys:
        people["user"] = people["user"].astype(str)
    logs[:40].to_parquet(folder / "a.parquet")
    logs[40:].to_parquet(folder / "b.parquet")
    people.to_csv(folder / users, index=False) if users.endswith("csv") else people.to_parquet(folder / users)
    items.to_parquet(folder / "items.parquet")
    joins = (Join(file=users, key="user"), Join(file="items.parquet", key="item"))
    people["user"] = people["user"].astype("Int64")
    return data(folder, join=joins), logs.merge(people, "left", "user").merge(items.drop(columns="code"), "left", "item")


@pytest.mark.parametrize(("users", "text_keys"), [("users.parquet", False), ("users.csv", False), ("users.parquet", True)])
def test_joined_columns_are_those_of_a_left_join(tmp_path: Path, users: str, text_keys: bool) -> None:
    config, expected = joined_data(tmp_path, users, text_keys)
    chunks = plan_chunks(config, JOINED, chunk_rows=7)
    read = pa.concat_tables([piece for chunk in chunks for piece, _ in sources.read_chunk(chunk, JOINED)])
    assert read.column_names == list(JOINED.columns)
    frame = read.to_pandas()
    assert 0 < frame["city"].isna().sum() < 30
    for name in JOINED.feature_names:
        pd.testing.assert_series_equal(frame[name], expected[name], check_dtype=False)
    # The log file's own column wins; a file that is joined is no log file.
    assert read["code"].to_pylist() == expected["code"].tolist()
    part = pa.concat_tables(list(read_part(config, JOINED, "train")))
    assert part.num_rows == 48
    assert set(part["city"].to_pylist()) == {None, *"pqrstuv"}


def test_rows_to_score_are_joined_as_for_training(tmp_path: Path) -> None:
    config, expected = joined_data(tmp_path)
    whole = tmp_path / "whole.parquet"
    expected.to_parquet(whole)
    joins = list_joins(config)
    assert count_rows(tmp_path / "b.parquet", JOINED, joins=joins) == 20
    (read,) = read_rows(tmp_path / "b.parquet", JOINED, labels=False, joins=joins)
    assert read["genre"].to_pylist() == expected["genre"].tolist()[40:]
    # Whoever has every column needs no second table.
    (tmp_path / "users.parquet").unlink()
    (read,) = read_rows(whole, JOINED, labels=False, joins=joins)
    assert read.num_rows == 60


def test_a_second_table_that_cannot_be_joined(tmp_path: Path) -> None:
    config, _ = joined_data(tmp_path)
    users = pd.read_parquet(tmp_path / "users.parquet")

    def sentence(frame: pd.DataFrame) -> str:
        frame.to_parquet(tmp_path / "users.parquet")
        with pytest.raises(UserError) as caught:
            plan_chunks(config, JOINED)
        return str(caught.value)

    assert "data.join: user 3 stands in 2 rows of" in sentence(pd.concat([users, users[3:4]]))
    assert "key column 'user' is not in" in sentence(users.rename(columns={"user": "uid"}))
    assert "none of the first 40 rows of" in sentence(users.assign(user=users["user"] + 100))
    told = sentence(users.drop(columns="city"))
    assert "feature column 'city' is not in" in told
    assert "users.parquet'" in told
    assert "users.parquet' is empty" in sentence(users[:0])
    (tmp_path / "users.parquet").unlink()
    with pytest.raises(UserError, match=r"data.join: '.*users.parquet' is no file; name a Parquet or CSV file below"):
        list_files(config)
    with pytest.raises(UserError, match=r"data.files names 'items.parquet', which data.join names too"):
        list_files(data(tmp_path, files=("items.parquet",), join=(Join(file="items.parquet", key="item"),)))


def test_the_kuairand_protocol_by_hand(kuairand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_MOE_DATA", str(kuairand.parent))
    config = parse(DataConfig, compose(["data=kuairand_time"])["data"], "data")
    schema = config.load_schema(conf_dir() / "schema")
    logs = pd.read_parquet(kuairand / "interactions.parquet")
    # Parts keep the file's order within; which rows they have is the sort's.
    test = logs.sort_values("time_ms", kind="stable")[int(0.8 * len(logs)) + 4183 :].sort_index()
    test = test.merge(pd.read_parquet(kuairand / "user_features.parquet"), "left", "user_id")
    read = pa.concat_tables(list(read_part(config, schema, "test"))).to_pandas()
    assert (read["is_comment"].sum(), read["is_profile_enter"].sum()) == (121, 188)
    for name in schema.columns:
        pd.testing.assert_series_equal(read[name], test[name], check_dtype=False, check_index=False)
    never = {"play_time_ms", "comment_stay_time", "label", "is_click", "is_follow", "is_comment", "is_forward", "long_view"}
    assert not never & set(schema.feature_names)
    assert {t.name: t.category for t in schema.tasks if t.category == "watch_time"} == {"long_view": "watch_time"}
