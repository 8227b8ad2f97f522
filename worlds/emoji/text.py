"""The world's tokenizers and text encoder configurations."""

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .glyphs import english_name, lists
from .scenes import COLOUR_NAMES, PATTERNS
from .train_utils import World

START, END = "<|startoftext|>", "<|endoftext|>"
GLUE = "a photo of an and on the at in with background middle top bottom left right small large"


def glyph_names() -> list[str]:
    """Return the English names of all glyphs, the held-out ones included."""
    return [english_name(slug) for group in lists().values() for slug in group]


def build_tokenizer(tokens: int) -> CLIPTokenizer:
    """Train byte-pair codes, in CLIP's format, on all glyphs' names and the captions' words.

    Pairs that are equally frequent get their numbers in an arbitrary order: a model that was
    trained with one tokenizer needs that one.
    """
    corpus = glyph_names() + [*COLOUR_NAMES, *PATTERNS, GLUE] * 50
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2400,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    import json

    model = json.loads(learner.to_str())["model"]
    vocab = dict.fromkeys(
        [
            *alphabet,
            *(c + "</w>" for c in alphabet),
            *sorted(model["vocab"], key=model["vocab"].get),
            START,
            END,
        ]
    )
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(
        {token: i for i, token in enumerate(vocab)}, merges, model_max_length=tokens
    )


def open_tokenizer(world: World) -> CLIPTokenizer:
    """Load the tokenizer in the world's folder; build it on first use.

    All models of a world use the same one.
    """
    folder = world.folder / "tokenizer"
    if not folder.exists():
        build_tokenizer(world["text"]["tokens"]).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_word_tokenizer(world: World) -> T5Tokenizer:
    """Build a tokenizer in T5's format: a token for each word of the captions.

    Other words are spelled in letters; what is not a letter of English is unknown.
    """
    texts = [*glyph_names(), *COLOUR_NAMES, *PATTERNS, GLUE]
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0), ("▁", -10.0)]
    vocabulary += [(f"▁{word}", -5.0) for word in words] + [
        (letter, -10.0) for letter in ascii_lowercase
    ]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=world["text"]["tokens"])


def build_t5(plan: Mapping[str, Any], tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build an untrained T5 encoder of a plan's width, layers and heads, for that tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=plan["width"],
            d_kv=plan["width"] // plan["heads"],
            d_ff=4 * plan["width"],
            num_layers=plan["layers"],
            num_heads=plan["heads"],
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def text_config(
    plan: Mapping[str, Any], tokenizer: CLIPTokenizer, projection: int
) -> CLIPTextConfig:
    """Return a CLIP text encoder's configuration for a plan's sizes and this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan["width"],
        intermediate_size=4 * plan["width"],
        num_hidden_layers=plan["layers"],
        num_attention_heads=plan["heads"],
        max_position_embeddings=plan["tokens"],
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
