"""Arguments of a diffusers pipeline's call: which are said in other words here, and which pass."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from imprompt.errors import SettingError, first_line
from imprompt.families.base import Family
from imprompt.generation.settings import OWN_NAMES, Resolved
from imprompt.validation import suggestions

# what a pipeline must take besides its guidance, to be called with settings
NEEDED = ("prompt", "num_images_per_prompt", "num_inference_steps", "generator")
# what pipelines call their guidance scale
GUIDANCES = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
REFUSED = {  # argument -> why it is not passed on
    "return_dict": "a call always returns a Result",
    "ip_adapter_image": "the call's first argument takes image prompts",
    "ip_adapter_image_embeds": "the call's first argument takes image prompts, as files of features"
    " too",
    "callback_on_step_end_tensor_inputs": "on_step is told of steps, not of tensors",
}
PICTURES = {  # argument -> its name here, where the call gives that picture
    "image": "init_image or control_image",
    "mask_image": "mask_image",
    "control_image": "control_image",
}
# arguments of pipelines that take each batch of the base model for two branches, or add their own
OWN_GUIDANCE = {"sag_scale", "pag_scale", "token_indices"}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TEXTS = {  # encoded text, one row for all results or one for each image prompt -> what it replaces
    "prompt_embeds": "prompt",
    "negative_prompt_embeds": "negative_prompt",
    "prompt_embeds_mask": "",
    "negative_prompt_embeds_mask": "",
    "pooled_prompt_embeds": "",
    "negative_pooled_prompt_embeds": "",
    "prompt_attention_mask": "",
    "negative_prompt_attention_mask": "",
}
PER_PICTURE = ("latents",)  # tensors of one row for all pictures of a call, or one for each


def check_takes_settings(pipeline: Any, guidance: str) -> None:
    """Raise SettingError if a pipeline cannot be called with the settings of a call.

    guidance  its option for the guidance scale
    """
    takes = inspect.signature(pipeline.__call__).parameters
    if missing := [name for name in (*NEEDED, guidance) if name not in takes]:
        raise SettingError(
            f"a {type(pipeline).__name__} does not take {' and '.join(missing)}, so that settings "
            "do not reach it: call it yourself in `with adapter.using(prompt):` (docs/ecosystem.md)"
        )


@contextmanager
def refusals(pipeline: Any, started: Callable[[], object]) -> Iterator[None]:
    """Raise what a pipeline says of its arguments, before its first step, as SettingError.

    started  whether the pipeline has called the base model
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        if started():
            raise
        raise SettingError(
            f"a {type(pipeline).__name__} refuses this call: {first_line(error)}"
        ) from error


def checked_options(
    given: Mapping[str, Any] | None, pipeline: Any, ours: Mapping[str, Any], guidance: str
) -> dict[str, Any]:
    """Return the `pipeline_options` of a call, checked; SettingError.

    ours      options that the call itself gives the pipeline, such as its first picture
    guidance  the pipeline's option for the guidance scale
    """
    options = dict(given or {})
    takes = inspect.signature(pipeline.__call__).parameters
    own = {name: ours for name, ours in OWN_NAMES.items() if ours != "guidance"}
    own[guidance] = "guidance"
    for name in options:
        if name not in takes:
            other = "; give guidance" if name in GUIDANCES else suggestions(name, takes)
            raise _refused(name, f"a {type(pipeline).__name__} has no such option{other}")
        if name in own:
            raise _refused(name, f"give it as {own[name]}")
        if name in REFUSED:
            raise _refused(name, f"{REFUSED[name]}: leave it out")
        if name in ours:
            raise _refused(name, f"the call gives it already, by {PICTURES.get(name, name)}")
    _check_output(options.get("output_type", "pil"), "mask_image" in ours)
    return options


def check_image_guidance(settings: Resolved, pipeline: Any, options: Mapping[str, Any], *,
                         guided: bool, family: Family) -> None:  # fmt: skip
    """Raise SettingError if a call's image guidance cannot be applied.

    guided  whether the call has the text's guidance
    """
    if family.positive_first:
        raise SettingError(
            "image_guidance needs the negative branch of guidance first; a "
            f"{type(pipeline).__name__} runs it last: leave it out"
        )
    if family.separate_branches:
        raise SettingError(
            "image_guidance needs both branches of guidance in one call; a "
            f"{type(pipeline).__name__} runs them in separate calls: leave it out"
        )
    if own := OWN_GUIDANCE & {*inspect.signature(pipeline.__call__).parameters}:
        raise SettingError(
            f"image_guidance does not go together with the guidance of a {type(pipeline).__name__} "
            f"({', '.join(sorted(own))}), which counts two branches itself: leave it out"
        )
    if not guided:
        raise SettingError(
            "image_guidance needs the text's guidance, which is off at "
            f"{settings.guidance}: give more than 1"
        )
    if options.get("guidance_rescale"):
        raise SettingError(
            "image_guidance and guidance_rescale do not go together: the latter would measure "
            "another prediction"
        )


def _check_output(kind: Any, pasted: bool) -> None:
    """Raise SettingError for an unknown kind of output, or one that cannot be pasted on."""
    if kind not in OUTPUT_TYPES:
        raise _refused("output_type", f"unknown{suggestions(kind, OUTPUT_TYPES)}")
    if pasted and kind != "pil":
        raise _refused(
            "output_type",
            "with mask_image only 'pil' can be made, as the rest of init_image is pasted on it",
        )


def _refused(name: str, why: str) -> SettingError:
    return SettingError(f"pipeline_options[{name!r}]: {why}")


def check_per_picture(options: Mapping[str, Any], pictures: int) -> None:
    """Raise SettingError unless options that are for each picture have one row, or one for each."""
    for name in PER_PICTURE:
        value = options.get(name)
        if value is None or (isinstance(value, Tensor) and len(value) in (1, pictures)):
            continue
        raise _refused(
            name, f"give a tensor of one row for all, or of {pictures}: one for each picture"
        )


def rows_for(options: Mapping[str, Any], batch: Sequence[int]) -> dict[str, Any]:
    """Return the options for a batch of pictures; those of `PER_PICTURE` are its own rows."""
    own = {name: options[name] for name in PER_PICTURE if options.get(name) is not None}
    return {**options, **{name: _rows(value, batch) for name, value in own.items()}}


def allow_clip_skip(pipeline: Any) -> None:
    """Let a pipeline's `clip_skip` find the last norm of CLIP's text encoder.

    diffusers looks for it in `text_model`, which the encoders of transformers 5 do not have.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # not as a submodule, which would rename its weights


def without_texts(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options other than encoded text, and the encoded text."""
    texts = {name: value for name, value in options.items() if name in TEXTS and value is not None}
    return {name: value for name, value in options.items() if name not in TEXTS}, texts


def check_texts(settings: Resolved, encoded: Mapping[str, Any], items: int, pipeline: Any) -> None:
    """Raise SettingError unless there is one text for all image prompts or one for each.

    A negative text is refused where the pipeline takes none.

    encoded  texts among the `pipeline_options`
    """
    if settings.negative_prompt and not takes_negative(pipeline):
        raise SettingError(f"a {type(pipeline).__name__} takes no negative_prompt: leave it out")
    for name, replaces in TEXTS.items():
        if name not in encoded:
            continue
        if replaces and getattr(settings, replaces):
            raise _refused(name, f"give it or {replaces}, not both")
        if not isinstance(encoded[name], Tensor) or len(encoded[name]) not in (1, items):
            raise _refused(
                name, f"give a tensor of one row for all, or of {items}: one for each image prompt"
            )
    if not isinstance(settings.prompt, str) and len(settings.prompt) != items:
        raise SettingError(
            f"{len(settings.prompt)} texts for {items} image prompts: give one for all, or one for "
            "each"
        )


def takes_negative(pipeline: Any) -> bool:
    """Return whether a pipeline's call takes a negative text in words."""
    return "negative_prompt" in inspect.signature(pipeline.__call__).parameters


def texts_for(
    settings: Resolved,
    encoded: Mapping[str, Tensor],
    batch: Sequence[int],
    no_words: str | None,
) -> dict[str, Any]:
    """Return the texts of a batch as diffusers takes them; one text for all is encoded once.

    encoded   texts that are given in place of words
    no_words  negative text if none is given; None leaves it out
    """
    words = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt or no_words}
    replaced = {TEXTS[name] for name in encoded}
    texts: dict[str, Any] = {**words, **encoded}
    texts = {name: text for name, text in texts.items() if name not in replaced}
    texts = {name: text for name, text in texts.items() if text is not None}
    # not every pipeline repeats encoded text
    if not encoded and all(isinstance(text, str) or len(text) == 1 for text in texts.values()):
        return {**texts, "num_images_per_prompt": len(batch)}
    numbers = [i // settings.num_images for i in batch]
    rows = {name: _rows(text, numbers) for name, text in texts.items()}
    return {**rows, "num_images_per_prompt": 1}


def _rows(text: Any, numbers: Sequence[int]) -> Any:
    """Return the rows of these numbers, or texts, from one for all or one for each."""
    if isinstance(text, str):
        return [text] * len(numbers)
    if isinstance(text, Tensor):
        return text.expand(len(numbers), *text.shape[1:]) if len(text) == 1 else text[numbers]
    return [text[number] for number in numbers]
