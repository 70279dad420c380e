"""Every file in conf/ composes and fills the dataclass it is for; mistakes name the key and the nearest valid one."""

from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from recsys_moe.config import compose, conf_dir, lm_conf_dir, options
from recsys_moe.correlated import CorrelatedConfig, load_correlated_config
from recsys_moe.errors import UserError
from recsys_moe.fetch import load_fetch_config
from recsys_moe.llm.text import TextConfig
from recsys_moe.llm.trainer import BalanceConfig, LmTrainConfig
from recsys_moe.models import MODELS, MMoEConfig, ModelConfig, SharedBottomConfig
from recsys_moe.pipelines.tracking import TrackingConfig
from recsys_moe.pipelines.train import TrainJob, train
from recsys_moe.pipelines.train_lm import LmJob, settle
from recsys_moe.pipelines.tune import default_space, parse_space
from recsys_moe.schema import load_schema
from recsys_moe.serving.config import ServeConfig
from recsys_moe.sources import DataConfig
from recsys_moe.synth import SynthConfig, load_synth_config
from recsys_moe.trainer import TrainConfig
from recsys_moe.typed import parse

GROUPS = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig, "serve": ServeConfig}
FILES = sorted(path.relative_to(conf_dir()).with_suffix("") for path in conf_dir().rglob("*.yaml"))


def job(*overrides: str) -> TrainJob:
    config = compose(overrides)
    parts = {key: config[key] for key in ("data", "model", "train", "tracking", "runs_dir")}
    parsed: TrainJob = parse(TrainJob, parts, "configuration")
    return parsed


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_builds(file: Path) -> None:
    match file.parts:
        case ("config",):
            job("data=census_full")
        case ("schema", name):
            assert load_schema(conf_dir() / "schema" / f"{name}.yaml").tasks
        case ("synth", "task_correlation"):
            assert isinstance(load_correlated_config(), CorrelatedConfig)
        case ("synth", name):
            assert isinstance(load_synth_config(name), SynthConfig)
        case ("search", name):
            assert parse_space(default_space("home" if name == "network" else name))
        case ("fetch", name):
            config = load_fetch_config(name)
            # What it makes is what the data set of the same name reads.
            data = parse(DataConfig, compose([f"data={name}"])["data"], "data")
            assert data.source == f"runs/data/{name}"
            made = {file.name for file in config.files}
            assert {join.file for join in data.join} | {*data.held_out} <= made
            assert all(any(PurePath(file).match(pattern) for file in made) for pattern in data.files)
        case ("serve", "cluster"):
            pass  # in Ray Serve's own form: see test_cluster.py
        case ("experiment", name):
            job(f"experiment={name}")
        case ("llm", *rest):
            given = ["data.source=text", *(["model.router={name: hash}"] if rest[-1] == "routed" else [])]
            made = compose([*given, *([f"model={rest[1]}"] if rest[0] == "model" else [])], folder=lm_conf_dir())
            built = parse(LmJob, made, "configuration")
            unbalanced = replace(built.train, balance=BalanceConfig())
            settle(replace(built, train=unbalanced if rest[-1] == "routed" else built.train))
            if rest[0] != "model":
                assert built.train == replace(LmTrainConfig(), balance=BalanceConfig(auxiliary=0.01))
                assert built.data == TextConfig("text")
        case (group, name):
            # `custom` waits for what the user must give.
            given = ["data.source=logs", "data.schema=census_full"] if name == "custom" else []
            config = compose([f"{group}={name}", *given], needs_data=False)
            built = parse(GROUPS[group], config[group], group)
            if group == "data":
                assert built.load_schema(conf_dir() / "schema").tasks
        case _:
            pytest.fail(f"conf/{file}.yaml is in no group that a test builds; add it above")


def test_the_files_and_the_dataclasses_hold_the_same_defaults() -> None:
    built = job("data=census_full")
    assert built.train == TrainConfig()
    assert built.model == MMoEConfig()
    assert built.tracking == TrackingConfig()
    assert job("data=census_full", "model=shared_bottom").model == SharedBottomConfig()
    assert parse(ServeConfig, compose([], needs_data=False)["serve"], "serve") == ServeConfig()


def test_overrides_reach_the_dataclasses() -> None:
    built = job("data=census_full", "model=shared_bottom", "train.seed=3", "data.split.seed=5", "model.tower_dims=[7,5]")
    assert (built.train.seed, built.data.split.seed, built.model.tower_dims) == (3, 5, (7, 5))
    assert built.model.name == "shared_bottom"


def test_an_experiment_changes_what_it_names_and_gives_way_to_overrides() -> None:
    built = job("experiment=peer_bench")
    assert (built.data.name, built.data.tasks) == ("census_nominal", ("income", "never_married"))
    assert (built.model.expert_dims, built.model.embedding_dim, built.train.batch_size) == ((16,), 4, 4096)
    assert job("experiment=peer_bench", "train.batch_size=7").train.batch_size == 7


def test_the_census_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_MOE_DATA", "/elsewhere")
    full, nominal = job("data=census_full").data, job("data=census_nominal").data
    assert full.source == nominal.source == "/elsewhere/census_income"
    assert (full.split.train, full.split.validation, full.split.test) == (79762, 10000, 10000)
    assert (nominal.files, nominal.held_out) == (("train.parquet",), ("test.parquet",))
    for data in (full, nominal):
        assert (data.split.order, data.split.seed) == ("permuted", 0)
        inputs = data.load_schema(conf_dir() / "schema").feature_names
        assert not {"education", "marital_stat", "income", "instance_weight"} & set(inputs)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=census_ful"], "data 'census_ful' is unknown; did you mean 'census_full'?"),
        (["model=mmeo"], "model 'mmeo' is unknown; did you mean 'mmoe'?"),
        (["model=qqq"], "model 'qqq' is unknown; valid: "),
        (["experiment=peer"], "experiment 'peer' is unknown; did you mean 'peer_bench'?"),
        (["trian.seed=1"], "unknown key 'trian.seed'; did you mean 'train'?"),
        (["--seed"], "'--seed' is not an override; write key=value"),
        (["train.seed"], "'train.seed' is not an override; write key=value"),
        (["train.sede=1"], "unknown key 'train.sede'; did you mean 'seed'?"),
        (["train.health.row=5"], "unknown key 'train.health.row'; did you mean 'rows'?"),
        (["train.health.held=2"], "'train.health.held' is 2; input should be less than or equal to 1"),
        (["train.seed=one"], "'train.seed' is 'one'; input should be a valid integer"),
        (["train.seed=-1"], "'train.seed' is -1; input should be greater than or equal to 0"),
        (["train.epochs=1.5"], "'train.epochs' is 1.5; input should be a valid integer"),
        (["train.epochs=true"], "'train.epochs' is True; input should be a valid integer"),
        (["train.lr=fast"], "'train.lr' is 'fast'; input should be a valid number"),
        (["train.lr=null"], "'train.lr' is None; input should be a valid number"),
        (["train.schedule=cosine"], "'train.schedule' is 'cosine'; input should be 'one_cycle' or 'constant'"),
        (["model.num_expert=4"], "unknown key 'model.num_expert'; did you mean 'num_experts'?"),
        # A key of the other family is unknown to this one.
        (["model=shared_bottom", "model.num_experts=4"], "unknown key 'model.num_experts'; valid: "),
        (["model.expert_dims=16"], "'model.expert_dims' is 16; input should be a valid array"),
        (["model.expert_dims=[16,x]"], "'model.expert_dims.1' is 'x'; input should be a valid integer"),
        (["train.balancing.name=gradnrm"], "'train.balancing.name' is 'gradnrm'; did you mean 'gradnorm'?"),
        (["train.balancing.name=dwa", "train.balancing.c=1"], "unknown key 'train.balancing.c'"),
        (["model.front.cross_layer=1"], "unknown key 'model.front.cross_layer'; did you mean 'cross_layers'?"),
        (["model.embedding_dim=6"], "'model.embedding_dim' is 6; input should be a multiple of 4"),
        (["model.name=mmeo"], "'model.name' is 'mmeo'; did you mean 'mmoe'?"),
        (["data.split.trian=0.5"], "unknown key 'data.split.trian'; did you mean 'train'?"),
        (["data.split.train=lots"], "'data.split.train' is 'lots'; "),
        (["data.split.train=1.5"], "'data.split.train' is 1.5; "),
        (["data.split.train=0"], "'data.split.train' is 0; "),
        (["tracking.ali=x"], "unknown key 'tracking.ali'; did you mean 'alias'?"),
        (["train.seed=[1"], "train.seed is '[1', which is not one whole list, dictionary or quoted text; close what is open"),
        (["data.source=[old]/x"], "data.source is '[old]/x', which is not one whole list"),
        (["data.tasks=[like],[finish]"], "data.tasks is '[like],[finish]', which is not one whole list"),
        (["data..source=x"], "'data..source=x' is not an override; write key=value"),
        (["experiment.seed=1"], "unknown key 'experiment.seed'; valid: data, model, "),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        job("data=feed_synth", *overrides)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/date=2024",
        "a,b",
        "a (1)",
        "choice(a)",
        "it's",
        'say "x"',
        "ä/ö",
        "a;b#c",
        "a[1]",
        "a{1}",
        "a,b\\",
        "a\\'b",
        "a:b",
        "x y",
    ],
)
def test_a_path_is_taken_as_it_stands(text: str) -> None:
    assert job("data=feed_synth", f"data.source={text}").data.source == text


def test_values_keep_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    built = job("data=feed_synth", "data.source=~/a,b", "data.tasks=['like', finish]", "train.lr=1e-3", 'tracking.register="5"')
    assert (built.data.source, built.data.tasks) == ("/home/me/a,b", ("like", "finish"))
    assert (built.train.lr, built.tracking.register) == (0.001, "5")
    assert job("data=feed_synth", "data.source=${runs_dir}/a=b", "tracking.uri=null").data.source == "runs/a=b"


def test_missing_names() -> None:
    with pytest.raises(UserError, match=r"'data' is missing; add data=NAME \(valid: census_full, "):
        compose([])
    assert "data" not in compose([], needs_data=False)


def test_a_value_that_the_user_must_give_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"data\.(source|schema)"):
        job("data=custom")
    built = job("data=custom", "data.source=logs", "data.schema=my.yaml")
    assert (built.data.source, built.data.schema) == ("logs", "my.yaml")


def test_unknown_schema_name(tmp_path: Path) -> None:
    data = job("data=census_full", "data.schema=census_fill").data
    with pytest.raises(UserError, match=r"'census_fill' is not a shipped schema; .* did you mean 'census_full'"):
        data.load_schema(conf_dir() / "schema")
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(schema_of_one()))
    assert job("data=census_full", f"data.schema={own}").data.load_schema(conf_dir() / "schema").task_names == ("y",)


def schema_of_one() -> dict[str, Any]:
    return {"features": [{"name": "x", "kind": "numeric"}], "tasks": [{"name": "y", "label": "y == 1"}]}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            ["model=home", "model.categories={likes: interaction}"],
            r"categories names the task 'likes', .*; did you mean 'like'\?",
        ),
        (
            ["model=esmm"],
            r"model=esmm: no task's mask is another task's label; say .* 'model.conversions=\{CONVERSION: CLICK\}'",
        ),
        (
            ["train.balancing.name=annealed", "train.balancing.gamma={likes: 0.9}"],
            r"train.balancing.gamma names the task 'likes', which the schema does not have; did you mean 'like'\?",
        ),
        (["model=aitm", "model.chain=[long_view, purchases]"], r"model.chain names the task 'purchases', .* 'purchase'\?"),
    ],
    ids=["home", "esmm", "balancing", "aitm"],
)
def test_a_model_that_does_not_fit_the_tasks_is_told_before_anything_is_prepared(
    model: list[str], told: str, tmp_path: Path
) -> None:
    wrong = job("data=feed_synth", *model, f"runs_dir={tmp_path}/runs")
    with pytest.raises(UserError, match=told):
        train(wrong)
    assert not list(tmp_path.iterdir())


def test_options_are_the_files() -> None:
    assert options("model") == sorted(name for config in MODELS for name in get_args(get_type_hints(config)["name"]))
