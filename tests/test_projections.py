"""The projections: sizes are read off a checkpoint's shapes, whatever they are."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from imprompt.projections.resampler import HEAD_DIM
from imprompt.variants import BY_NAME, Variant, bearing
from tests.tiny import FACE_DIM, FEATURE_DIMS, seeded, tiny_projection

WIDTH, COUNT = st.integers(1, 40), st.integers(1, 6)
HEADS = st.integers(1, 3).map(lambda heads: heads * HEAD_DIM)
ROWS = list(BY_NAME.values())
PLUS = {
    "feature_dim": WIDTH,
    "token_dim": WIDTH,
    "tokens": COUNT,
    "hidden": WIDTH,
    "depth": COUNT,
    "inner": HEADS,
}
FACE = {"face_dim": WIDTH, "token_dim": WIDTH, "tokens": COUNT, "hidden": WIDTH}
SIZES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    **dict.fromkeys(
        ("base", "xlabs", "hunyuandit"),
        st.fixed_dictionaries({"embedding_dim": WIDTH, "token_dim": WIDTH, "tokens": COUNT}),
    ),
    "full": st.fixed_dictionaries({"feature_dim": WIDTH, "token_dim": WIDTH}),
    "redux": st.fixed_dictionaries({"feature_dim": WIDTH, "token_dim": WIDTH, "hidden": WIDTH}),
    **dict.fromkeys(
        ("plus", "portrait-unnorm", "ai-toolkit", "lynx"),
        st.fixed_dictionaries(PLUS | {"width": WIDTH}),
    ),
    "instantcharacter": st.fixed_dictionaries(
        PLUS
        | {
            "feature_dim": st.just(64),
            "inner": st.just(64),
            "width": WIDTH,
            "mlp": WIDTH,
            "layers": st.sampled_from([(1, 1), (2, 1)]),
        }
    ),
    "instantx-sd3": st.fixed_dictionaries(
        PLUS | {"width": WIDTH, "sinusoids": st.sampled_from((2, 8, 32))}
    ),
    **dict.fromkeys(("faceid", "portrait", "instantx"), st.fixed_dictionaries(FACE)),
    **dict.fromkeys(
        ("faceid-plus", "faceid-plus-v2", "faceid-plus-kolors"),
        st.fixed_dictionaries(PLUS | {"face_dim": WIDTH, "face_hidden": WIDTH}),
    ),
}


BOTH = {"face_dim": FACE_DIM, "feature_dim": FEATURE_DIMS["penultimate"]}
TINY: dict[str, dict[str, int]] = {
    "pooled": {"embedding_dim": FEATURE_DIMS["pooled"]},
    "penultimate": {"feature_dim": FEATURE_DIMS["penultimate"]},
    "last": {"feature_dim": FEATURE_DIMS["last"]},
    "face": {"face_dim": FACE_DIM},
    "raw face": {"feature_dim": FACE_DIM},
    "face and crop": BOTH,
    "raw face and square": BOTH,
    "character": {"feature_dim": 64},
}


def random_features(
    row: Variant, sizes: dict[str, int], batch: int = 2, patches: int = 7
) -> tuple[torch.Tensor, ...]:
    """In the order in which the projection takes them."""
    flat, states = sizes.get("face_dim") or sizes.get("embedding_dim"), sizes.get("feature_dim")
    if row.feature == "character":
        return tuple(torch.randn(batch, count * patches, states or 0) for count in (3, 1, 4))
    if row.name == "portrait-unnorm":
        flat, states = states, None
    return (
        *([torch.randn(batch, flat)] if flat else []),
        *([torch.randn(batch, patches, states)] if states else []),
    )


def tokens_of(projection: nn.Module, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Image tokens; at one time, where they depend on it."""
    made = projection(*features)
    if not hasattr(projection, "at"):
        return made
    at: Any = projection.at
    return at(made, torch.full((len(made),), 600.0))[0]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in module.state_dict().items()}


@torch.no_grad()
@given(st.data())
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_from_shapes_rebuilds_the_same_structure(row: Variant, data: st.DataObject) -> None:
    sizes = data.draw(SIZES[row.name])
    with seeded(0):
        projection = row.projection(**sizes)
        features = random_features(row, sizes)
    rebuilt = row.projection.from_shapes(shapes_of(projection))
    assert repr(rebuilt) == repr(projection)
    assert shapes_of(rebuilt) == shapes_of(projection)
    rebuilt.load_state_dict(projection.state_dict())
    tokens = tokens_of(rebuilt, features)
    assert torch.equal(tokens, tokens_of(projection, features))
    assert tokens.shape == (2, sizes.get("tokens", 7), sizes["token_dim"])
    assert row.token_shape(shapes_of(projection)) == (sizes.get("tokens"), sizes["token_dim"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_say_where_to_look(row: Variant) -> None:
    """The signature picks this row and those with the same projection.

    The feature key's last dimension is the feature's width.
    """
    shapes = shapes_of(tiny_projection(row.name, 16))
    found = bearing(shapes)
    assert row in found
    assert {other.signature for other in found} == {row.signature}
    assert all(set(shapes_of(tiny_projection(other.name, 16))) == set(shapes) for other in found)
    assert shapes[row.feature_key][-1] == FEATURE_DIMS[row.feature]
    assert bool(row.faces) == ("face" in row.feature)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_items_of_a_batch_do_not_mix(row: Variant) -> None:
    with seeded(1):
        projection = tiny_projection(row.name, 16)
        features = random_features(row, TINY[row.feature], batch=3)
    alone = torch.cat(
        [
            tokens_of(projection, tuple(feature[item : item + 1] for feature in features))
            for item in range(3)
        ]
    )
    torch.testing.assert_close(tokens_of(projection, features), alone, rtol=0, atol=1e-5)
