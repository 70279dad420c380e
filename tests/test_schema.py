"""The schema's rules, and the one sentence that a mistake is told in."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys_moe.errors import UserError
from recsys_moe.schema import Schema, load_schema
from recsys_moe.typed import dump, parse

GOOD: dict[str, Any] = {
    "features": [{"name": "age", "kind": "numeric", "buckets": 8}, {"name": "job", "kind": "categorical"}],
    "tasks": [
        {"name": "income", "label": "income == '50000+.'", "weight": "w * 2", "mask": "job != 'none'"},
        {"name": "college", "label": "degree in ['a', 'b'] and year > 3", "category": "school"},
    ],
    "group": "user",
}


def schema(**changes: Any) -> Schema:
    parsed: Schema = parse(Schema, GOOD | changes, "schema")
    return parsed


def feature(**keys: Any) -> dict[str, Any]:
    return {"features": [{"name": "age", "kind": "numeric"} | keys]}


def two(age: dict[str, Any], name: str, kind: str = "categorical") -> dict[str, Any]:
    return {"features": [{"name": "age", "kind": "numeric"} | age, {"name": name, "kind": kind}]}


def cross(*of: str) -> dict[str, Any]:
    return {"features": [*GOOD["features"], {"name": "both", "kind": "cross", "of": of, "buckets": 9}]}


def task(**keys: Any) -> dict[str, Any]:
    return {"tasks": [{"name": "income", "label": "income == 1"} | keys]}


def test_columns_are_each_named_once() -> None:
    s = schema()
    assert s.feature_names == ("age", "job")
    assert s.task_names == ("income", "college")
    assert s.label_columns == ("degree", "income", "job", "w", "year")
    assert s.columns == ("age", "job", "degree", "income", "w", "year", "user")


def test_a_cross_reads_no_column_of_its_own() -> None:
    s = schema(
        features=[
            *GOOD["features"],
            {"name": "city", "kind": "hashed", "buckets": 9},
            {"name": "degree", "kind": "cross", "of": ["job", "city"], "buckets": 9},
        ]
    )
    assert s.feature_names == ("age", "job", "city", "degree")
    assert s.feature_columns == ("age", "job", "city")
    assert s.columns.count("degree") == 1  # the label's column, which the cross only shares its name with


def test_levels_are_numbers_only_if_all_of_them_are() -> None:
    def values(*levels: Any) -> tuple[float, ...]:
        parsed: Any = schema(tasks=[{"name": "o", "label": "o", "kind": "ordinal", "levels": levels}]).tasks[0]
        return tuple(parsed.values)

    assert values(1, 2, 5) == (1, 2, 5)
    assert values("low", "middle", "high") == values(0, "some", "all") == (0, 1, 2)


def test_ten_thousand_columns_are_checked_in_a_moment() -> None:
    features = [{"name": f"c{n}", "kind": "categorical"} for n in range(10_000)]
    start = time.process_time()
    assert len(schema(features=features).feature_names) == 10_000
    with pytest.raises(UserError, match="feature 'c77' is declared twice"):
        schema(features=[*features, features[77]])
    assert time.process_time() - start < 5


def test_a_column_of_a_mask_or_weight_may_be_a_feature_too() -> None:
    # The mask reads `job`, which is known before anything happens: unlike a label, it may be an input.
    assert "job" in schema().feature_names


def test_select_tasks_keeps_the_others_labels_as_outcomes() -> None:
    one = schema().select_tasks(("college",))
    assert one.task_names == ("college",)
    assert one.columns == ("age", "job", "degree", "year", "user")
    # Else a later change of the features could smuggle the other task's label in.
    assert set(one.outcomes) == {"degree", "income", "year"}
    with pytest.raises(UserError, match="'income' can't be a feature"):
        parse(Schema, dump(one) | {"features": [{"name": "income", "kind": "categorical"}]}, "schema")


def test_select_tasks_keeps_the_order_asked_for() -> None:
    assert schema().select_tasks(("college", "income")).task_names == ("college", "income")
    with pytest.raises(UserError, match=r"'colege', which the schema lacks; did you mean 'college'\?"):
        schema().select_tasks(("colege",))


def test_dump_and_parse_are_inverse() -> None:
    assert parse(Schema, dump(schema()), "schema") == schema()


def test_load_schema_reads_yaml(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert load_schema(path) == schema()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (feature(kind="numerc"), "'features.0.kind' is 'numerc'; did you mean 'numeric'?"),
        (feature(bukets=3), "unknown key 'features.0.bukets'; did you mean 'buckets'?"),
        # The nearest name is one of this kind of feature, not of the other.
        (feature(min_count=3), "unknown key 'features.0.min_count'; valid: name, kind, log1p"),
        (feature(buckets="3"), "'features.0.buckets' is '3'; input should be a valid integer"),
        (feature(buckets=-3), "'features.0.buckets' is -3; input should be greater than or equal to 0"),
        (feature(log1p="yes"), "'features.0.log1p' is 'yes'; input should be a valid boolean"),
        ({"features": []}, "'features' is []"),
        ({"features": [{"kind": "numeric"}]}, "'features.0.name' is missing"),
        ({"features": [{"name": "age"}]}, "'features.0.kind' is missing"),
        ({"featuers": []}, "unknown key 'featuers'; did you mean 'features'?"),
        (task(lable="x"), "unknown key 'tasks.0.lable'; did you mean 'label'?"),
        (task(kind="regresion"), "'tasks.0.kind' is 'regresion'; did you mean 'regression'?"),
        (task(name="in come"), "'tasks.0.name' is 'in come'"),
        (task(loss_weight=0), "'tasks.0.loss_weight' is 0; input should be greater than 0"),
        (task(label="income >"), "expression 'income >' can't be read"),
        (task(mask="f(x)"), "expression 'f(x)' uses Call"),
        (task(weight="x ** 2"), "expression 'x ** 2' uses Pow"),
        ({"group": 3}, "'group' is 3; input should be a valid string"),
        ({"tasks": GOOD["tasks"][:1] * 2}, "task 'income' is declared twice"),
        ({"features": GOOD["features"][:1] * 2}, "feature 'age' is declared twice"),
        (feature(name="degree"), "column 'degree' can't be a feature: it is read by the label of task 'college'"),
        (feature(name=""), "'features.0.name' is ''"),
        (two({"buckets": 8}, "age.bucket"), "features 'age.bucket' and 'age' both have an input 'age__bucket'; rename one"),
        (two({"buckets": 8}, "age__bucket"), "features 'age__bucket' and 'age' both have an input 'age__bucket'; rename one"),
        (two({"missing_indicator": True}, "age.missing", "numeric"), "both have an input 'age.missing'; rename one"),
        (two({"name": "a.b", "kind": "categorical"}, "a__b"), "features 'a.b' and 'a__b' both have an input 'a__b'; rename"),
        ({"outcomes": ["age"]}, "column 'age' can't be a feature: it is listed under outcomes"),
        (feature(kind="hashed"), "'features.0.buckets' is missing"),
        (feature(kind="hashed", buckets=0), "'features.0.buckets' is 0; input should be greater than or equal to 1"),
        (feature(kind="hashed", buckets=2**31), "'features.0.buckets' is 2147483648; input should be less than"),
        (feature(kind="sequence"), "'features.0.max_length' is missing"),
        (feature(kind="multi", pooling="last"), "'features.0.pooling' is 'last'; input should be 'mean' or 'sum'"),
        (feature(kind="multi", separator=""), "'features.0.separator' is ''"),
        (feature(kind="multi", max_len=3), "unknown key 'features.0.max_len'; did you mean 'max_length'?"),
        (feature(kind="multi", buckets=9, min_count=2), "feature 'age' has buckets, so it has no vocabulary that min_count"),
        (feature(kind="embedding", dim=0), "'features.0.dim' is 0"),
        (cross("age", "job"), "cross 'both' is of 'age', which is no categorical or hashed feature; valid: job"),
        (cross("job", "jobs"), "cross 'both' is of 'jobs', which is no categorical or hashed feature; did you mean 'job'?"),
        (cross("job"), "'features.2.of' is ['job']"),
        (two({"kind": "embedding", "dim": 2}, "age.1", "numeric"), "features 'age.1' and 'age' both have an input 'age.1'"),
        (task(kind="multiclass"), "'tasks.0.classes' is missing"),
        (task(kind="multiclass", classes=["a"]), "'tasks.0.classes' is ['a']"),
        (task(kind="multiclass", classes=["1", 1.0]), "'tasks.0.classes.1' is 1.0"),
        (task(kind="multiclass", classes=["1", 1]), "task 'income' has classes ['1', 1], of which '1' is named twice"),
        (task(kind="multiclass", classes=["", "a"]), "task 'income' has classes ['', 'a'], of which '' is empty"),
        (task(kind="ordinal", levels=[2, 1]), "task 'income' has levels [2, 1], which do not rise; list the lowest first"),
        (task(kind="regression", loss="mae"), "'tasks.0.loss' is 'mae'; input should be 'mse' or 'huber'"),
        (task(kind="regression", classes=["a", "b"]), "unknown key 'tasks.0.classes'; "),
        (task(classes=["a", "b"]), "unknown key 'tasks.0.classes'; "),
        (task(kind=["binary"]), "'tasks.0.kind' is \"['binary']\"; did you mean 'binary'?"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        schema(**changes)
    message = str(caught.value)
    assert message.startswith("schema: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["categorical", "numeric"])
def test_names_that_only_look_alike_are_kept(kind: str) -> None:
    # Without buckets or an indicator, nothing else is called so.
    assert schema(**two({}, "age.bucket", kind)).feature_names == ("age", "age.bucket")
    assert schema(**two({"buckets": 8}, "age.bucket", "numeric")).feature_names == ("age", "age.bucket")
    assert schema(**two({"missing_indicator": True}, "age__missing", kind)).feature_names == ("age", "age__missing")


def test_schema_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml' can't be read \(No such file or directory\)"):
        load_schema(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("features: [\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_schema(broken)
    broken.write_text("")
    with pytest.raises(UserError, match="input should be an object"):
        load_schema(broken)


def test_a_schema_built_in_code_is_checked_too() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Schema(features=(), tasks=schema().tasks)
    with pytest.raises(AttributeError):
        schema().group = "other"  # type: ignore[misc]
