"""The model families: one file each. `MODELS` is the registry."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from recsys_moe.models.adatt import AdaTT, AdaTTConfig
from recsys_moe.models.family import Family
from recsys_moe.models.home import HoME, HoMEConfig
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.ple import PLE, PLEConfig
from recsys_moe.models.shared_bottom import SharedBottom, SharedBottomConfig
from recsys_moe.models.single_task import SingleTask, SingleTaskConfig
from recsys_moe.schema import Schema

ModelConfig = Annotated[
    SingleTaskConfig | SharedBottomConfig | MMoEConfig | PLEConfig | AdaTTConfig | HoMEConfig, Field(discriminator="name")
]

MODELS: dict[type[Any], type[Family]] = {
    SingleTaskConfig: SingleTask,
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
    AdaTTConfig: AdaTT,
    HoMEConfig: HoME,
}


def settle(config: Any, schema: Schema) -> Any:
    """`config` with what the schema knows: HoME's categories, where it names none, are the tasks' own.

    >>> from recsys_moe.schema import BinaryTask, Categorical
    >>> schema = Schema((Categorical("c", "categorical"),), (BinaryTask("like", "y", category="interaction"),))
    >>> settle(HoMEConfig(), schema).categories
    {'like': 'interaction'}
    """
    if isinstance(config, HoMEConfig) and config.categories is None:
        return replace(config, categories={task.name: task.category for task in schema.tasks})
    return config
