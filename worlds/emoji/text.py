"""The world's tokenizer and text encoder configuration."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from .glyphs import english_name, lists
from .scenes import COLOUR_NAMES, PATTERNS
from .train_utils import World

START, END = "<|startoftext|>", "<|endoftext|>"
GLUE = "a photo of an and on the at in with background middle top bottom left right small large"


def build_tokenizer(tokens: int) -> CLIPTokenizer:
    """Train byte-pair codes, in CLIP's format, on all glyphs' names and the captions' words.

    Pairs that are equally frequent get their numbers in an arbitrary order: a model that was
    trained with one tokenizer needs that one.
    """
    names = [english_name(slug) for group in lists().values() for slug in group]
    corpus = names + [*COLOUR_NAMES, *PATTERNS, GLUE] * 50
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


def text_config(world: World, tokenizer: CLIPTokenizer, projection: int) -> CLIPTextConfig:
    """Return the text encoder's configuration for the world's sizes and this tokenizer."""
    plan = world["text"]
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
