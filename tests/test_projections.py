"""The projections: sizes are read off a checkpoint's shapes, whatever they are."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from imprompt.projections.resampler import HEAD_DIM
from imprompt.variants import BY_NAME, VARIANTS, Variant
from tests.tiny import FEATURE_DIMS, seeded, tiny_projection

WIDTH, COUNT = st.integers(1, 40), st.integers(1, 6)
SIZES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "base": st.fixed_dictionaries({"embedding_dim": WIDTH, "token_dim": WIDTH, "tokens": COUNT}),
    "full": st.fixed_dictionaries({"feature_dim": WIDTH, "token_dim": WIDTH}),
    "plus": st.fixed_dictionaries(
        {
            "feature_dim": WIDTH,
            "token_dim": WIDTH,
            "tokens": COUNT,
            "width": WIDTH,
            "hidden": WIDTH,
            "depth": COUNT,
            "inner": st.integers(1, 3).map(lambda heads: heads * HEAD_DIM),
        }
    ),
}


def random_features(row: Variant, width: int, batch: int = 2, patches: int = 7) -> torch.Tensor:
    return torch.randn(batch, width) if row.feature == "pooled" else torch.randn(batch, patches, width)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in module.state_dict().items()}


@torch.no_grad()
@given(st.data())
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_from_shapes_rebuilds_the_same_structure(row: Variant, data: st.DataObject) -> None:
    sizes = data.draw(SIZES[row.name])
    with seeded(0):
        projection = row.projection(**sizes)
        features = random_features(row, sizes.get("feature_dim") or sizes["embedding_dim"])
    rebuilt = row.projection.from_shapes(shapes_of(projection))
    assert repr(rebuilt) == repr(projection)
    assert shapes_of(rebuilt) == shapes_of(projection)
    rebuilt.load_state_dict(projection.state_dict())
    tokens = rebuilt(features)
    assert torch.equal(tokens, projection(features))
    assert tokens.shape == (2, sizes.get("tokens", 2 if row.feature == "pooled" else 7), sizes["token_dim"])


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_rows_say_where_to_look(row: Variant) -> None:
    """The signature picks exactly this row, in the table's order; the feature key's last dimension is the feature's width."""
    shapes = shapes_of(tiny_projection(row.name, 16))
    assert next(other for other in VARIANTS if other.signature in shapes) is row
    assert shapes[row.feature_key][-1] == FEATURE_DIMS[row.feature]
    assert BY_NAME[row.name] is row


@torch.no_grad()
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_items_of_a_batch_do_not_mix(row: Variant) -> None:
    with seeded(1):
        projection = tiny_projection(row.name, 16)
        features = random_features(row, FEATURE_DIMS[row.feature], batch=3)
    alone = torch.cat([projection(item[None]) for item in features])
    torch.testing.assert_close(projection(features), alone, rtol=0, atol=1e-5)
