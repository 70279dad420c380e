"""The embedding tables: what an id that training never met stands for, and names that tables can't have."""

import pytest
import torch

from recsys_moe.embeddings import FusedEmbeddings, one_id_each
from recsys_moe.transforms import MISSING, UNKNOWN


def test_missing_and_unknown_stand_for_nothing_until_training_meets_them() -> None:
    # Where the training part has no such row, scoring one must not add noise.
    tables = FusedEmbeddings(["a", "b"], [5, 2], 4)
    for weight in tables.state_dict().values():
        assert not weight[[MISSING, UNKNOWN]].any()
        assert weight[2:].all()
    ids_bf = torch.tensor([[MISSING, UNKNOWN], [UNKNOWN, MISSING]], dtype=torch.int32)
    assert not tables(one_id_each(["a", "b"], ids_bf)).values().any()


@pytest.mark.parametrize("name", ["type", "keys", "training", "a.b", "a b", "é"])
def test_a_feature_may_have_any_name(name: str) -> None:
    tables = FusedEmbeddings([name, "other"], [5, 5], 4)
    ids_bf = torch.tensor([[2, 3]], dtype=torch.int32)
    assert tables(one_id_each([name, "other"], ids_bf)).values().shape == (1, 8)
