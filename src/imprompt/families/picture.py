"""Where the picture is in a call of a transformer: its time, its grid, its rows, and the taps.

Rows of the table, in `imprompt.families.rows`, are made of these functions. Shape letters as in
`imprompt.adapter`; C channels, h and w of latents, F frames, I the picture's places.
"""

from collections.abc import Callable
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from imprompt.families.processor import Layout, Taps
from imprompt.families.transformers import Given, projection_of

PICTURE = 2  # what Ideogram 4 marks the picture's rows with
HISTORY = {"clean": (1, 2, 2), "history_2x": (2, 4, 4), "history_4x": (4, 8, 8)}  # Framepack's

# --- Progress, of the timestep that the model gets.


def by_timestep(timestep: Tensor, timesteps: int) -> Tensor:
    """Return the progress for a model that gets the training timestep."""
    return 1 - timestep / (timesteps - 1)


def by_sigma(sigma: Tensor, _timesteps: int) -> Tensor:
    """Return the progress for a model that gets sigma, from 1 to 0."""
    return 1 - sigma


def by_progress(time: Tensor, _timesteps: int) -> Tensor:
    """Return the progress for a model that gets it: from 0, noise, to 1, the picture."""
    return time


# --- Grids: rows and columns of the picture's places, in videos the number of frames before them.


def patches(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, C, h, w) or (B, C, F, h, w) that are cut into patches."""
    config, sizes = model.config, list(given["hidden_states"].shape[2:])
    side = config.patch_size
    frames = config.get("patch_size_t") or 1
    cut = [frames, side, side] if isinstance(side, int) else list(side)
    return tuple(size // part for size, part in zip(sizes, cut[-len(sizes) :], strict=True))


def new_frames(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, C, F, h, w): without the reference, where poses are given."""
    frames, *sides = patches(model, given)
    poses = given.get("pose_hidden_states")
    return frames if poses is None else poses.shape[2], *sides


def by_frames(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, F, C, h, w) that are cut into patches."""
    _, frames, _, height, width = given["hidden_states"].shape
    side = model.config.patch_size
    cut = (model.config.get("patch_size_t") or 1, side, side) if isinstance(side, int) else side
    return frames // cut[0], height // cut[1], width // cut[2]


def by_ids(ids: Tensor) -> tuple[int, ...]:
    """Return the grid from the ids (I, 3 or 4) of rows: time, row, column."""
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta:
        return 1, len(ids)  # the values are not known: an estimate needs their number alone
    own = ids[of_first_time(ids)]
    sides = own.amax(0) - own.amin(0) + 1
    return int(sides[1]), int(sides[2])


def of_first_time(ids: Tensor) -> Tensor:
    """Return which rows (I,) of ids are the picture's: reference pictures have a later time."""
    return ids[:, 0] == ids[:, 0].min()


def image_ids(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents (B, I, C) from their own ids."""
    return by_ids(given["img_ids"])


def joint_ids(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents (B, I, C) from ids (T + I, 3) of text and picture."""
    return by_ids(given["position_ids"][given["encoder_hidden_states"].shape[1] :])


def marked(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid from ids (B, T + I, 3), where an indicator marks the picture's rows."""
    return by_ids(given["position_ids"][0][given["indicator"][0] == PICTURE])


def by_shapes(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents from the sizes (F, h, w) of each item's pictures.

    The first is made and the others are references; where layers are made, all but the last are.
    """
    own = given["img_shapes"][0]
    if not isinstance(own, list):
        return tuple(own)
    layers = len(own) - 1 if given.get("additional_t_cond") is not None else 1
    return layers * own[0][0], *own[0][1:]


def by_last_shape(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents from sizes of which the references' stand first."""
    return tuple(given["img_shapes"][0][-1])


def list_patches(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents that are a list of (C, F, h, w), cut into patches."""
    side = given.get("patch_size", 2)
    _, frames, height, width = given["x"][0].shape
    return frames // given.get("f_patch_size", 1), height // side, width // side


def last_channels(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, F, h, w, C) that are cut into patches."""
    sizes = given["hidden_states"].shape[1:4]
    return tuple(size // part for size, part in zip(sizes, model.config.patch_size, strict=True))


def by_sizes(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of a packed video (B, F·h·w, C) from its coordinates, else its sizes."""
    if given.get("video_coords") is None:
        return given["num_frames"], given["height"], given["width"]
    return own_frames(given["video_coords"])[1]


def own_frames(coordinates: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return where a video's own places begin, and their grid, from coordinates (B, 3, places).

    They may be (B, 3, places, 2): of where each place begins and ends.
    Frames that it is conditioned on stand before or after its own: the longest run of frames in
    order of time is the video.
    """
    time, *sides = coordinates[0] if coordinates.ndim == 3 else coordinates[0, ..., 0]
    frame = [len(one.unique()) for one in sides]
    times = time[:: prod(frame)]
    breaks = (times.diff() <= 0).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(times)]
    count, begin = max((end - start, start) for start, end in pairwise(bounds))
    return begin * prod(frame), (count, *frame)


# --- Which rows of a query belong to the picture; `count` is the number of its places.


def first(_model: Any, _name: str, _given: Given, count: int) -> slice:
    """Return the first rows, before references or a text."""
    return slice(0, count)


def last(_model: Any, _name: str, _given: Given, count: int) -> slice:
    """Return the last rows, after a text."""
    return slice(-count, None)


def after_text(_model: Any, name: str, given: Given, count: int) -> slice:
    """Return the rows after the text in blocks of one stream, else the first.

    References follow, or stand before them.
    """
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    start = 0 if ids.is_meta else int(of_first_time(ids).int().argmax())
    if not name.startswith("transformer_blocks"):
        start += given["encoder_hidden_states"].shape[1]
    return slice(start, start + count)


def after_own_text(_model: Any, _name: str, given: Given, count: int) -> Tensor:
    """Return the indices (B, I) of rows after each item's own text, whose mask tells its length."""
    lengths = given["encoder_attention_mask"].sum(1, keepdim=True).long()
    return lengths + torch.arange(count, device=lengths.device)


def after_history(_model: Any, _name: str, given: Given, count: int) -> Tensor:
    """Return the indices (B, I) of rows after those of earlier frames (B, C, F, h, w)."""
    past = ((given.get(f"latents_{name}"), cut) for name, cut in HISTORY.items())
    start = sum(
        prod(-(-size // part) for size, part in zip(latents.shape[2:], cut, strict=True))
        for latents, cut in past
        if latents is not None
    )
    latents = given["hidden_states"]
    rows = torch.arange(start, start + count, device=latents.device)
    return rows.expand(len(latents), -1)


def after_gist(model: Any, _name: str, given: Given, count: int) -> slice:
    """Return the rows after those of a text that Bria FIBO 2 condenses to a gist.

    Where the gists of a batch differ in length, they stand last.
    """
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
    config = model.config
    gists = compute_gist_count(
        [text.shape[2]] if mask is None else mask.sum(1).tolist(),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    start = gists[0] if min(gists) == max(gists) else 0
    return slice(start, start + count)


def own_places(_model: Any, _name: str, given: Given, count: int) -> slice:
    """Return the rows of a video's own places: see `own_frames`."""
    coordinates = given.get("video_coords")
    start = 0 if coordinates is None else own_frames(coordinates)[0]
    return slice(start, start + count)


def where_marked(_model: Any, _name: str, given: Given, count: int) -> Tensor:
    """Return the indices (B, I) of rows that the indicator marks."""
    return (given["indicator"] == PICTURE).nonzero()[:, 1].view(-1, count)


# --- Taps.


def tapped(query: str, layout: Layout, out: str | None = "to_out") -> Callable[[Any], Taps]:
    """Return taps that are the same for all layers."""
    return lambda _layer: Taps(query, layout, out)


def normed(layout: Layout) -> Callable[[Any], Taps]:
    """Return taps at the norm of the query, or at its projection in models without that norm."""

    def of(layer: Any) -> Taps:
        has_norm = getattr(layer, "norm_q", None) is not None
        return Taps("norm_q", layout, "to_out") if has_norm else Taps("to_q", "BLD", "to_out")

    return of


def flux_taps(layer: Any) -> Taps:
    """Return Flux's taps.

    Single blocks have no output layer of their own, double blocks keep the text's rows apart.
    """
    if getattr(layer, "pre_only", False):
        return Taps("norm_q", "BLHd", None)
    return Taps("norm_q", "BLHd", "to_out", ("norm_added_q", "to_add_out"))


JOINT_INPUTS = ("to_q", "to_qkv_mlp_proj", "img_qkv_proj", "img_attn_qkv")


def own_width(layer: Any) -> int:
    """Return the width of the rows that a joint attention reads, picture and text."""
    return projection_of(layer, JOINT_INPUTS).in_features


# --- Sizes of pictures.


def own_area(pipeline: Any, width: int, height: int) -> tuple[int, int]:
    """Return the size nearest to the pipeline's own area, as HiDream's computes it."""
    unit, side = 2 * pipeline.vae_scale_factor, pipeline.default_sample_size
    factor = sqrt((side * pipeline.vae_scale_factor) ** 2 / (width * height))
    return int(width * factor // unit * unit), int(height * factor // unit * unit)


def own_sizes(pipeline: Any, width: int, height: int) -> tuple[int, int]:
    """Return the pipeline's own size with the nearest aspect ratio, as Kandinsky's chooses it."""
    if (width, height) in pipeline.resolutions:
        return width, height
    return min(pipeline.resolutions, key=lambda size: abs(size[0] / size[1] - width / height))
