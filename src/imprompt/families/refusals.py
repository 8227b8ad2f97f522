"""Classes of diffusers that take no image prompts, and pipelines that were not run: why, by name.

Every transformer of diffusers has a row or stands here; a test holds that.
"""

MODELS = {  # class of models -> why it takes no image prompts
    "AceStepTransformer1DModel": "it makes sound",
    "StableAudioDiTModel": "it makes sound",
    "StableAudio3DiTModel": "it makes sound",
    "LongCatAudioDiTTransformer": "it makes sound",
    "MiniMaxMusic3Transformer1DModel": "it makes sound",
    "MiniMaxMusic3RVQDepthDecoder": "it makes sound",
    "T5FilmDecoder": "it makes sound",
    "RFD4ProteinaTransformer": "it makes proteins",
    "DiTTransformer2DModel": "it reads the number of a class, not a text",
    "Kandinsky6SRTransformer3DModel": "it enlarges a video and reads no text",
    "SanaWMLTX2RefinerTransformer3DModel": "it refines a video that another model made",
    "PriorTransformer": "it makes embeddings, not pictures",
    "Transformer2DModel": "it is a block of other models, or predicts tokens of a picture",
    "TransformerTemporalModel": "it is a block of other models",
    "DreamLiteTransformer2DModel": "it is a block of another model",
    "LatteTransformer3DModel": "its layers take every frame as an item of the batch",
    "OmniGenTransformer2DModel": "its text is token ids, and its guidance has branches of its own",
    "MiniMaxH3Transformer3DModel": "text, picture and sound are one packed sequence",
    "Cosmos3OmniTransformer": "text, picture and sound are one packed sequence",
    "WanAnimate2Transformer3DModel": "its latents are a list, and its calls fill a cache",
    "AnyFlowFARTransformer3DModel": "it makes a video in chunks, with a cache of those before",
    "SanaWMTransformer3DModel": "no row is written yet: it makes a video in chunks",
    "JoyImageEditPlusTransformer3DModel": "no row is written yet: its latents are patches, padded",
}

PIPELINES = {  # pipeline -> why it does not go with image prompts
    "StableDiffusion3PAGPipeline": "it replaces the processors of the layers in every call",
    "StableDiffusion3PAGImg2ImgPipeline": "it replaces the processors of the layers in every call",
}

NOT_RUN = {  # pipeline -> why no test runs it; its transformer is tested
    "VisualClozePipeline": "it needs a whole text encoder",
    "VisualClozeGenerationPipeline": "it needs a whole text encoder",
    "LongCatImageEditPipeline": "it needs a vision-language model's processor",
    "QwenImage21Pipeline": "it needs a vision-language model's processor",
    "ZImageOmniPipeline": "it needs a vision encoder's features",
    "HeliosPyramidPipeline": "the noise that it draws cannot be drawn at a tiny size",
    "HunyuanImageRefinerPipeline": "its VAE is of a kind of its own",
    "HunyuanVideo15ImageToVideoPipeline": "it needs a vision encoder",
    "Cosmos2_5_PredictBasePipeline": "it needs torchvision",
    "Cosmos2_5_TransferPipeline": "it needs torchvision",
    "BriaFiboEditPipeline": "it needs a prompt in JSON and a whole text encoder",
    "JoyImageEditPipeline": "it works at sizes near 1024 alone",
    "EasyAnimateControlPipeline": "diffusers 0.42.1 calls its text encoder wrongly",
    "EasyAnimateInpaintPipeline": "it needs masks of a video",
    "LTX2DFRPipeline": "it needs keyframes of another pipeline",
    "LTX2DFRTemporalRefinePipeline": "it needs keyframes of another pipeline",
    "LTX2HDRPipeline": "it needs a reference video",
    "LTX2InContextPipeline": "it needs a reference video",
}
